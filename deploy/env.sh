#!/usr/bin/env bash
# Makes .env with fresh secrets for docker-compose.yml; leaves an existing one alone.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ -e .env ]]; then
  echo ".env is already there: left as it is." >&2
  exit 0
fi
secret() { head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n'; }
umask 077
cat > .env <<EOF
POSTGRES_PASSWORD=$(secret)
WHETSTONE_ADMIN_TOKEN=wst_$(secret)
WHETSTONE_WORKER_TOKEN=wst_$(secret)
EOF
echo "Made .env. Next: docker compose up -d --build" >&2
