#!/usr/bin/env bash
# Brings the compose file up for real: one worker, a study launched with curl, a second worker, the study to its end.
# Prints what it counts, and takes everything down again (KEEP=1 leaves it up).
#   deploy/smoke.sh                             with docker compose
#   COMPOSE=podman-compose deploy/smoke.sh      with another tool
set -euo pipefail
cd "$(dirname "$0")/.."
read -r -a compose <<<"${COMPOSE:-docker compose}"
trials=${TRIALS:-12}
url=http://127.0.0.1:${WHETSTONE_PORT:-8000}

deploy/env.sh
set -a; . ./.env; set +a
mkdir -p "${WHETSTONE_DATA_DIR:-data}"
down() { "${compose[@]}" down -v --remove-orphans >/dev/null 2>&1 || true; }
[[ -n ${KEEP:-} ]] || trap down EXIT

api() { curl -sS --fail-with-body -H "Authorization: Bearer $WHETSTONE_ADMIN_TOKEN" -H 'Content-Type: application/json' "$@"; }
field() { python3 -c "import json, sys; print(json.load(sys.stdin)$1)"; }
wait_for() { # seconds, what, command...
  local end=$((SECONDS + $1)) what=$2; shift 2
  until "$@" >/dev/null 2>&1; do
    if ((SECONDS > end)); then echo "gave up waiting for $what" >&2; "${compose[@]}" logs >&2 || true; exit 1; fi
    sleep 1
  done
}

echo "== up, with one worker"
"${compose[@]}" up -d --scale worker=1
wait_for 180 "the server" curl -sf "$url/readyz"
echo "== launch with curl"
study=$(api "$url/api/v1/studies" -d '{"preset": "mini", "name": "smoke", "budget": {"trials": '"$trials"'},
  "settings": {"data": "strokes", "epochs": 2, "pairs_per_epoch": 2048, "validation_tasks": 200}, "pruner": "none"}' | field "['study']")
finished() { [[ $(api "$url/api/v1/studies/$study" | field "['state']") == finished ]]; }
done_at_least() { (($(api "$url/api/v1/studies/$study" | field "['counts']['complete']") >= $1)); }
wait_for 240 "two trials" done_at_least 2
echo "== scale to two workers"
"${compose[@]}" up -d --scale worker=2
wait_for 600 "the study" finished

api "$url/api/v1/studies/$study" | python3 -c '
import json, sys
study = json.load(sys.stdin)
print("study", study["name"], study["state"], {state: n for state, n in study["counts"].items() if n}, "best", study["best"]["value"])'
api "$url/api/v1/studies/$study/trials?limit=200" | python3 -c '
import collections, json, sys
trials = json.load(sys.stdin)["items"]
numbers = [t["trial"] for t in trials]
workers = collections.Counter(t["worker"] for t in trials)
print(len(numbers), "trials,", len(set(numbers)), "numbers; by worker", dict(workers))
assert len(numbers) == len(set(numbers)) == int(sys.argv[1]) and len(workers) == 2' "$trials"
echo "== all as it should be"
