# One file, three targets: api (coordinator, REST, pages), worker (CPU) and worker-cuda.
#   docker compose build                                    builds api and worker
#   docker compose --profile gpu build                      builds worker-cuda too
# TORCH_CPU_INDEX and TORCH_CUDA_INDEX pick the index of torch builds; an empty one takes pip's own settings.

FROM python:3.11-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/venv/bin:$PATH \
    WHETSTONE_HOME=/var/lib/whetstone \
    WHETSTONE_DATA=/data \
    WHETSTONE_ARTIFACTS=/var/lib/whetstone-artifacts
RUN python3 -m venv /opt/venv \
 && useradd --uid 1000 --create-home --shell /usr/sbin/nologin whetstone \
 && mkdir -p /data "$WHETSTONE_HOME" "$WHETSTONE_ARTIFACTS" \
 && chown whetstone:whetstone "$WHETSTONE_HOME" "$WHETSTONE_ARTIFACTS"
WORKDIR /app

FROM scratch AS source
COPY pyproject.toml constraints.txt README.md LICENSE /
COPY hpo /hpo
COPY model /model
COPY workers /workers
COPY api /api
COPY cli /cli
COPY presets /presets

FROM base AS cpu
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install -qq torch==2.13.0 ${TORCH_CPU_INDEX:+--index-url "$TORCH_CPU_INDEX"}

# The coordinator's GP sampler fits its kernel with torch, so this image holds the CPU build too.
FROM cpu AS api
COPY --from=source / ./
RUN pip install -qq --constraint constraints.txt '.[server]'
USER whetstone
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=6 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
CMD ["whetstone", "serve", "--host", "0.0.0.0"]

FROM cpu AS worker
COPY --from=source / ./
RUN pip install -qq --constraint constraints.txt '.[worker]'
USER whetstone
CMD ["whetstone", "worker"]

FROM base AS worker-cuda
ARG TORCH_CUDA_INDEX=https://download.pytorch.org/whl/cu130
RUN pip install -qq torch==2.13.0 ${TORCH_CUDA_INDEX:+--index-url "$TORCH_CUDA_INDEX"}
COPY --from=source / ./
RUN pip install -qq --constraint constraints.txt '.[worker]'
USER whetstone
CMD ["whetstone", "worker", "--device", "cuda"]
