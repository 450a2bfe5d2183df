# The base station: the target model on PyTorch, with or without CUDA.
#
#   docker build -f docker/basestation.Dockerfile -t edgedraft-basestation:cuda .
#   docker build … -t edgedraft-basestation:cpu --build-arg TORCH=cpu --build-arg TORCH_INDEX=…
#
# PyTorch's wheels contain CUDA 13.0; the host needs NVIDIA's driver, 580 or later, and container toolkit.
#
# PYTHON_IMAGE: any base with Python 3.11 and venv; a digest (python@sha256:…) pins it.
ARG PYTHON_IMAGE=docker.io/library/python:3.11.14-slim-bookworm

# --build-context wheels=FOLDER adds a folder of wheels; with --build-arg PIP_NO_INDEX=1 pip uses no index.
FROM scratch AS wheels

FROM ${PYTHON_IMAGE} AS build
# Without PIP_INDEX_URL, pip's own configuration names the index.
ARG PIP_INDEX_URL
ARG PIP_NO_INDEX
# cuda or cpu
ARG TORCH=cuda
# An index with PyTorch's wheels, if pip's has none without CUDA. Nothing else is installed from it.
ARG TORCH_INDEX
WORKDIR /build
RUN python3 -m venv /opt/edgedraft && python3 -m venv /opt/tools
# Dependencies first, so that a change of the code keeps their layers cached.
COPY docker/locks/torch-${TORCH}.txt ./
RUN --mount=type=bind,from=wheels,target=/wheels \
    /opt/edgedraft/bin/pip install --no-cache-dir --find-links /wheels --require-hashes --no-deps \
        ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} --requirement torch-${TORCH}.txt \
    || { echo "PyTorch was not found: TORCH_INDEX must name an index with the wheels of TORCH=${TORCH} (docs/server.md)" >&2; exit 1; }
COPY docker/locks/build.txt docker/locks/basestation.txt ./
RUN --mount=type=bind,from=wheels,target=/wheels \
    /opt/tools/bin/pip install --no-cache-dir --find-links /wheels --require-hashes --no-deps --requirement build.txt \
    && /opt/edgedraft/bin/pip install --no-cache-dir --find-links /wheels --require-hashes --no-deps \
        --requirement basestation.txt
COPY pyproject.toml README.md LICENSE ./
COPY protocol protocol
COPY common common
COPY basestation basestation
RUN /opt/tools/bin/hatchling build --target wheel --directory /dist \
    && /opt/edgedraft/bin/pip install --no-cache-dir --no-index --no-deps /dist/*.whl \
    && /opt/edgedraft/bin/pip check \
    && /opt/edgedraft/bin/pip uninstall --yes pip \
    && rm -f /opt/edgedraft/bin/edgedraft-export /opt/edgedraft/bin/edgedraft-device /opt/edgedraft/bin/edgedraft-bench \
    && /opt/tools/bin/cyclonedx-py environment --output-file /opt/edgedraft/sbom.json /opt/edgedraft/bin/python

FROM ${PYTHON_IMAGE}
ARG TORCH=cuda
# An image with CUDA refuses to start without a usable GPU.
ENV EDGEDRAFT_BASESTATION_TORCH_DEVICE=${TORCH}
RUN install --directory --owner=10001 --group=10001 --mode=700 /keys /hub
COPY --from=build /opt/edgedraft /opt/edgedraft
# Models downloaded from the hub are cached in /hub.
ENV PATH=/opt/edgedraft/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HF_HOME=/hub
USER 10001:10001
VOLUME ["/keys", "/hub"]
EXPOSE 5755
HEALTHCHECK --interval=30s --timeout=5s --start-period=300s \
    CMD ["python3", "-c", "from socket import create_connection; create_connection(('127.0.0.1', 5755), 4)"]
ENTRYPOINT ["edgedraft-basestation"]
CMD ["--help"]
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title=edgedraft-basestation \
    org.opencontainers.image.version=${VERSION} \
    org.opencontainers.image.revision=${REVISION} \
    org.opencontainers.image.licenses=Apache-2.0
