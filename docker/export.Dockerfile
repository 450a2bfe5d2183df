# Build time: exports a draft model as a bundle.
#
#   docker build -f docker/export.Dockerfile -t edgedraft-export .
#   docker run --rm -v "$PWD/models:/work" edgedraft-export convert /work/draft /work/bundle --target /work/target
#
# PYTHON_IMAGE: any base with Python 3.11 and venv; a digest (python@sha256:…) pins it.
ARG PYTHON_IMAGE=docker.io/library/python:3.11.14-slim-bookworm

# --build-context wheels=FOLDER adds a folder of wheels; with --build-arg PIP_NO_INDEX=1 pip uses no index.
FROM scratch AS wheels

FROM ${PYTHON_IMAGE} AS build
ARG PIP_NO_INDEX
# The conversion runs on the CPU.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /build
RUN python3 -m venv /opt/edgedraft
COPY constraints.txt ./
RUN --mount=type=bind,from=wheels,target=/wheels \
    /opt/edgedraft/bin/pip install --no-cache-dir --index-url "${TORCH_INDEX}" --find-links /wheels \
        --constraint constraints.txt torch
COPY pyproject.toml docker/requirements.py ./
# Dependencies first, so that a change of the code keeps their layer cached.
RUN --mount=type=bind,from=wheels,target=/wheels \
    python3 requirements.py export >requirements.txt \
    && /opt/edgedraft/bin/pip install --no-cache-dir --find-links /wheels --constraint constraints.txt \
        --requirement requirements.txt
COPY README.md LICENSE ./
COPY protocol protocol
COPY common common
COPY export export
RUN --mount=type=bind,from=wheels,target=/wheels \
    /opt/edgedraft/bin/pip install --no-cache-dir --find-links /wheels --no-deps . \
    && /opt/edgedraft/bin/pip uninstall --yes pip \
    && rm -f /opt/edgedraft/bin/edgedraft-device /opt/edgedraft/bin/edgedraft-basestation /opt/edgedraft/bin/edgedraft-bench

FROM ${PYTHON_IMAGE}
RUN install --directory --owner=10001 --group=10001 --mode=700 /work /hub
COPY --from=build /opt/edgedraft /opt/edgedraft
ENV PATH=/opt/edgedraft/bin:$PATH PYTHONDONTWRITEBYTECODE=1 HF_HOME=/hub
USER 10001:10001
VOLUME ["/work", "/hub"]
WORKDIR /work
HEALTHCHECK NONE
ENTRYPOINT ["edgedraft-export"]
CMD ["--help"]
