# The base station: the target model on PyTorch, with or without CUDA.
#
#   docker build -f docker/basestation.Dockerfile -t edgedraft-basestation .
#   docker build … --build-arg TORCH=cpu
#
# PyTorch's wheels contain CUDA; the host needs NVIDIA's driver and container toolkit.
# PYTHON_IMAGE: any base with Python 3.11 and venv; a digest (python@sha256:…) pins it.
ARG PYTHON_IMAGE=docker.io/library/python:3.11.14-slim-bookworm

# --build-context wheels=FOLDER adds a folder of wheels; with --build-arg PIP_NO_INDEX=1 pip uses no index.
FROM scratch AS wheels

FROM ${PYTHON_IMAGE} AS build
ARG TORCH=cuda
ARG PIP_NO_INDEX
WORKDIR /build
RUN python3 -m venv /opt/edgedraft
COPY docker/basestation-constraints.txt constraints.txt
RUN --mount=type=bind,from=wheels,target=/wheels \
    case "${TORCH}" in \
        cuda) index=https://pypi.org/simple ;; \
        cpu) index=https://download.pytorch.org/whl/cpu ;; \
        *) echo "TORCH is ${TORCH}; allowed: cuda, cpu" >&2; exit 1 ;; \
    esac \
    && /opt/edgedraft/bin/pip install --no-cache-dir --index-url "${index}" --find-links /wheels \
        --constraint constraints.txt torch
COPY pyproject.toml docker/requirements.py ./
# Dependencies first, so that a change of the code keeps their layer cached.
RUN --mount=type=bind,from=wheels,target=/wheels \
    python3 requirements.py basestation >requirements.txt \
    && /opt/edgedraft/bin/pip install --no-cache-dir --find-links /wheels --constraint constraints.txt \
        --requirement requirements.txt
COPY README.md LICENSE ./
COPY protocol protocol
COPY common common
COPY basestation basestation
RUN --mount=type=bind,from=wheels,target=/wheels \
    /opt/edgedraft/bin/pip install --no-cache-dir --find-links /wheels --no-deps . \
    && /opt/edgedraft/bin/pip uninstall --yes pip \
    && rm -f /opt/edgedraft/bin/edgedraft-export /opt/edgedraft/bin/edgedraft-device /opt/edgedraft/bin/edgedraft-bench

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
