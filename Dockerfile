# The image of every pod and machine that runs jobs, with the versions of requirements.lock.
#
#   docker build --target cuda -t tokendiff:0.2.0 .
#   docker build --target cpu --build-arg TORCH_CPU_INDEX=... -t tokendiff:0.2.0-cpu .
#
# The CUDA libraries come as Python packages with torch; of the host the image needs the driver and
# NVIDIA's container runtime. The CPU image is some gigabytes smaller. TORCH_CPU_INDEX is the index
# of CPU builds that torch's own installation page names for pip.

ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS wanted
WORKDIR /build
COPY pyproject.toml ./
# What the package asks for, and no tool of development.
RUN python -c 'import tomllib; file = tomllib.load(open("pyproject.toml", "rb")); project = file["project"]; print(*file["build-system"]["requires"], *project["dependencies"], *project["optional-dependencies"]["lora"], sep="\n")' > wanted.txt

FROM python:${PYTHON_VERSION}-slim AS packages-cuda
COPY requirements.lock /build/
COPY --from=wanted /build/wanted.txt /build/
RUN --mount=type=cache,target=/var/cache/pip \
    pip install --cache-dir /var/cache/pip --prefix /install \
        -r /build/wanted.txt -c /build/requirements.lock

FROM python:${PYTHON_VERSION}-slim AS packages-cpu
ARG TORCH_CPU_INDEX=""
COPY requirements.lock /build/
COPY --from=wanted /build/wanted.txt /build/
RUN --mount=type=cache,target=/var/cache/pip \
    test -n "$TORCH_CPU_INDEX" \
        || { echo "target cpu needs --build-arg TORCH_CPU_INDEX=...; see the Dockerfile" >&2; exit 1; } \
    && PIP_EXTRA_INDEX_URL="$TORCH_CPU_INDEX" \
    pip install --cache-dir /var/cache/pip --prefix /install \
        -r /build/wanted.txt -c /build/requirements.lock

FROM python:${PYTHON_VERSION}-slim AS base
# wget: KubeRay's probes of a node call it. g++: torch.compile and Triton build their kernels with it.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 tokendiff \
    && useradd --uid 1000 --gid 1000 --create-home tokendiff \
    && install --directory --owner 1000 --group 1000 /data
ENV PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    TOKENDIFF_ROOT=/data
WORKDIR /app

# Packages change seldom and the code often: the code is the last and smallest layer.
FROM base AS cpu
COPY --from=packages-cpu /install /usr/local
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation . && rm -rf build ./*.egg-info
USER 1000:1000
CMD ["tokendiff", "--help"]

FROM base AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages-cuda /install /usr/local
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation . && rm -rf build ./*.egg-info
USER 1000:1000
CMD ["tokendiff", "--help"]
