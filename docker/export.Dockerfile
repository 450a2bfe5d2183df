# Build time: exports a draft model as a bundle.
#
#   docker build -f docker/export.Dockerfile -t edgedraft-export --build-arg TORCH_INDEX=… .
#   docker run --rm --user "$(id -u)" -v "$PWD/models:/work" edgedraft-export \
#     convert /work/draft /work/bundle --target /work/target
#
# `sample` needs pip, which the image does not have.
# PYTHON_IMAGE: any base with Python 3.11 and venv; a digest (python@sha256:…) pins it.
ARG PYTHON_IMAGE=docker.io/library/python:3.11.14-slim-bookworm

# --build-context wheels=FOLDER adds a folder of wheels; with --build-arg PIP_NO_INDEX=1 pip uses no index.
FROM scratch AS wheels

FROM ${PYTHON_IMAGE} AS build
# Without PIP_INDEX_URL, pip's own configuration names the index.
ARG PIP_INDEX_URL
ARG PIP_NO_INDEX
# An index with PyTorch's wheels, if pip's has none without CUDA. Nothing else is installed from it.
ARG TORCH_INDEX
WORKDIR /build
RUN python3 -m venv /opt/edgedraft && python3 -m venv /opt/tools
# Dependencies first, so that a change of the code keeps their layers cached.
COPY docker/locks/torch-cpu.txt ./
RUN --mount=type=bind,from=wheels,target=/wheels \
    /opt/edgedraft/bin/pip install --no-cache-dir --find-links /wheels --require-hashes --no-deps \
        ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} --requirement torch-cpu.txt \
    || { echo "PyTorch was not found: TORCH_INDEX must name an index with this wheel (docs/server.md)" >&2; exit 1; }
COPY docker/locks/build.txt docker/locks/export.txt ./
RUN --mount=type=bind,from=wheels,target=/wheels \
    /opt/tools/bin/pip install --no-cache-dir --find-links /wheels --require-hashes --no-deps --requirement build.txt \
    && /opt/edgedraft/bin/pip install --no-cache-dir --find-links /wheels --require-hashes --no-deps \
        --requirement export.txt
COPY pyproject.toml README.md LICENSE ./
COPY protocol protocol
COPY common common
COPY export export
RUN /opt/tools/bin/hatchling build --target wheel --directory /dist \
    && /opt/edgedraft/bin/pip install --no-cache-dir --no-index --no-deps /dist/*.whl \
    && /opt/edgedraft/bin/pip check \
    && /opt/edgedraft/bin/pip uninstall --yes pip \
    && rm -f /opt/edgedraft/bin/edgedraft-device /opt/edgedraft/bin/edgedraft-basestation /opt/edgedraft/bin/edgedraft-bench \
    && /opt/tools/bin/cyclonedx-py environment --output-file /opt/edgedraft/sbom.json /opt/edgedraft/bin/python

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
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title=edgedraft-export \
    org.opencontainers.image.version=${VERSION} \
    org.opencontainers.image.revision=${REVISION} \
    org.opencontainers.image.licenses=Apache-2.0
