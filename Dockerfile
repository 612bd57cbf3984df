# Two targets from one set of pins:
#   docker build --target cpu -t rlhf-ray:cpu .
#   docker build --target gpu -t rlhf-ray:gpu .
# Both run as an ordinary user. The cpu target holds no compiler; the gpu target needs one, because Triton builds its launchers
# when a kernel is first used. The gpu target has not been run on a GPU yet.

FROM python:3.11-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/rlhf
ENV PATH=/opt/rlhf/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 DS_BUILD_OPS=0
COPY requirements /build/requirements
RUN pip install -r /build/requirements/build.txt

FROM build AS build-cpu
RUN pip install --no-deps -r /build/requirements/torch-cpu.txt \
    || pip install --no-deps --index-url https://download.pytorch.org/whl/cpu -r /build/requirements/torch-cpu.txt
RUN pip install --no-deps -r /build/requirements/cpu.txt -r /build/requirements/dev.txt \
    && pip install --no-deps --no-build-isolation -r /build/requirements/deepspeed.txt
COPY pyproject.toml README.md LICENSE CHANGELOG.md /build/
COPY configs /build/configs
COPY rlhf_ray /build/rlhf_ray
RUN pip install --no-deps --no-build-isolation /build

FROM build AS build-gpu
RUN pip install --no-deps -r /build/requirements/gpu.txt \
    && pip install --no-deps --no-build-isolation -r /build/requirements/deepspeed.txt
COPY pyproject.toml README.md LICENSE CHANGELOG.md /build/
COPY configs /build/configs
COPY rlhf_ray /build/rlhf_ray
RUN pip install --no-deps --no-build-isolation /build

FROM python:3.11-slim-bookworm AS runtime
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 libnuma1 wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ray
ENV PATH=/opt/rlhf/bin:$PATH RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 PYTHONUNBUFFERED=1
USER 1000
WORKDIR /home/ray
ENTRYPOINT []
CMD ["rlhf-ray", "--help"]

FROM runtime AS cpu
COPY --from=build-cpu /opt/rlhf /opt/rlhf

FROM runtime AS gpu
USER root
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
USER 1000
# "utility" brings NVIDIA's management library, by which Ray and vLLM ask about GPUs.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-gpu /opt/rlhf /opt/rlhf
