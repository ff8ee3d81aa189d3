# Guard with its model and its policies. Runs with a read-only root and any user id; only /tmp is ever written.
#
#   docker build --tag guard .                              the standard torch, which on x86-64 brings CUDA
#   docker build --build-arg TORCH_INDEX=URL --tag guard .  the torch of another package index, e.g. a CPU build

FROM python:3.11-slim-bookworm AS build
# The compiler builds the kernels; without them Guard computes with torch, slower.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ libc6-dev \
 && rm -rf /var/lib/apt/lists/*
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/guard
WORKDIR /src
# First what changes seldom, so that its layer is kept.
ARG TORCH=torch
ARG TORCH_INDEX=
COPY constraints.txt ./
RUN /opt/guard/bin/pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$TORCH"
COPY . .
RUN /opt/guard/bin/pip install --constraint constraints.txt '.[audit,crypto,llama-guard,otel,sidecar]'

FROM python:3.11-slim-bookworm
# OpenMP, for the kernels.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libgomp1 \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/guard /opt/guard
ENV PATH=/opt/guard/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 8080 50051 9090
# To be overridden where TLS is on: guard client health takes --tls-ca, --tls-cert and --tls-key.
HEALTHCHECK --start-period=60s --interval=10s --timeout=5s CMD ["guard", "client", "health"]
ENTRYPOINT ["guard"]
CMD ["serve"]
