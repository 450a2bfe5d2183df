# The device on a Jetson's GPU: linux/arm64 on CUDA 13.2, that of JetPack 7.2 (docs/jetson.md).
#
#   docker build -f docker/device-jetson.Dockerfile -t edgedraft-device-jetson --build-arg ONNXRUNTIME=WHEEL .
#   … serve --provider CUDAExecutionProvider      or TensorrtExecutionProvider
#
# The base must have the CUDA of the board's JetPack; a digest (cuda@sha256:…) pins it.
ARG CUDA_IMAGE=nvcr.io/nvidia/cuda:13.2.1-cudnn-runtime-ubuntu24.04

# --build-context wheels=FOLDER adds a folder of wheels; with --build-arg PIP_NO_INDEX=1 pip uses no index.
FROM scratch AS wheels

FROM ${CUDA_IMAGE} AS build
# Without PIP_INDEX_URL, pip's own configuration names the index.
ARG PIP_INDEX_URL
ARG PIP_NO_INDEX
WORKDIR /build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/edgedraft \
    && python3 -m venv /opt/tools
# Dependencies first, so that a change of the code keeps their layer cached.
COPY docker/locks/build.txt docker/locks/device-jetson.txt ./
RUN --mount=type=bind,from=wheels,target=/wheels \
    /opt/tools/bin/pip install --no-cache-dir --find-links /wheels --require-hashes --no-deps --requirement build.txt \
    && /opt/edgedraft/bin/pip install --no-cache-dir --find-links /wheels --require-hashes --no-deps \
        --requirement device-jetson.txt
# The board vendor's wheel: a file of the folder of wheels, NAME==VERSION, or an address with #sha256=….
ARG ONNXRUNTIME
# Those of the boards that the wheel must have code for: Orin and Thor.
ARG COMPUTE_CAPABILITY="8.7 11.0"
RUN --mount=type=bind,from=wheels,target=/wheels \
    [ -n "${ONNXRUNTIME}" ] \
    || { echo "ONNXRUNTIME is missing: a wheel with code for the board's GPU (docs/jetson.md)" >&2; exit 1; } \
    && /opt/edgedraft/bin/pip install --no-cache-dir --find-links /wheels --no-deps "${ONNXRUNTIME}"
COPY pyproject.toml README.md LICENSE ./
COPY protocol protocol
COPY common common
COPY device device
# As in device.Dockerfile.
RUN /opt/tools/bin/hatchling build --target wheel --directory /dist \
    && /opt/edgedraft/bin/pip install --no-cache-dir --no-index --no-deps /dist/*.whl \
    && /opt/edgedraft/bin/python -c "from device.drafting.cuda_provider import check_code; check_code('${COMPUTE_CAPABILITY}')" \
    && /opt/edgedraft/bin/pip uninstall --yes \
        certifi charset-normalizer filelock fsspec hf-xet huggingface-hub pyyaml requests tqdm urllib3 setuptools pip \
    && find /opt/edgedraft -depth -type d \( -name tests -o -path '*/onnxruntime/transformers' \) -exec rm -rf {} + \
    && rm -f /opt/edgedraft/bin/edgedraft-export /opt/edgedraft/bin/edgedraft-basestation /opt/edgedraft/bin/edgedraft-bench \
    && /opt/tools/bin/cyclonedx-py environment --output-file /opt/edgedraft/sbom.json /opt/edgedraft/bin/python

FROM ${CUDA_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && install --directory --owner=10001 --group=10001 --mode=700 /keys
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
LABEL org.opencontainers.image.title=edgedraft-device-jetson \
    org.opencontainers.image.version=${VERSION} \
    org.opencontainers.image.revision=${REVISION} \
    org.opencontainers.image.licenses=Apache-2.0
