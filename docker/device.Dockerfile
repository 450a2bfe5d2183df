# The device: the draft model on ONNX Runtime, for linux/arm64 and linux/amd64; no compiler, no torch.
#
#   docker build -f docker/device.Dockerfile -t edgedraft-device .
#
# PYTHON_IMAGE: any base with Python 3.11 and venv; a digest (python@sha256:…) pins it.
ARG PYTHON_IMAGE=docker.io/library/python:3.11.14-slim-bookworm

# --build-context wheels=FOLDER adds a folder of wheels; with --build-arg PIP_NO_INDEX=1 pip uses no index.
FROM scratch AS wheels

FROM ${PYTHON_IMAGE} AS build
# Without PIP_INDEX_URL, pip's own configuration names the index.
ARG PIP_INDEX_URL
ARG PIP_NO_INDEX
WORKDIR /build
RUN python3 -m venv /opt/edgedraft && python3 -m venv /opt/tools
# Dependencies first, so that a change of the code keeps their layer cached.
COPY docker/locks/build.txt docker/locks/device.txt ./
RUN --mount=type=bind,from=wheels,target=/wheels \
    /opt/tools/bin/pip install --no-cache-dir --find-links /wheels --require-hashes --no-deps --requirement build.txt \
    && /opt/edgedraft/bin/pip install --no-cache-dir --find-links /wheels --require-hashes --no-deps \
        --requirement device.txt
COPY pyproject.toml README.md LICENSE ./
COPY protocol protocol
COPY common common
COPY device device
# Removed afterwards: the hub client that tokenizers depends on, and files that the device does not use.
RUN /opt/tools/bin/hatchling build --target wheel --directory /dist \
    && /opt/edgedraft/bin/pip install --no-cache-dir --no-index --no-deps /dist/*.whl \
    && /opt/edgedraft/bin/pip uninstall --yes \
        certifi charset-normalizer filelock fsspec hf-xet huggingface-hub pyyaml requests tqdm urllib3 setuptools pip \
    && find /opt/edgedraft -depth -type d \( -name tests -o -path '*/onnxruntime/transformers' \) -exec rm -rf {} + \
    && rm -f /opt/edgedraft/bin/edgedraft-export /opt/edgedraft/bin/edgedraft-basestation /opt/edgedraft/bin/edgedraft-bench \
    && /opt/tools/bin/cyclonedx-py environment --output-file /opt/edgedraft/sbom.json /opt/edgedraft/bin/python

FROM ${PYTHON_IMAGE}
RUN install --directory --owner=10001 --group=10001 --mode=700 /keys
COPY --from=build /opt/edgedraft /opt/edgedraft
ENV PATH=/opt/edgedraft/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
VOLUME /keys
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8080/healthz', timeout=4)"]
ENTRYPOINT ["edgedraft-device"]
CMD ["--help"]
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title=edgedraft-device \
    org.opencontainers.image.version=${VERSION} \
    org.opencontainers.image.revision=${REVISION} \
    org.opencontainers.image.licenses=Apache-2.0
