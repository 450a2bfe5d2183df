# The device on a Jetson's GPU: linux/arm64 on NVIDIA L4T.
#
#   docker build -f docker/device-jetson.Dockerfile -t edgedraft-device-jetson .
#   … serve --provider CUDAExecutionProvider      or TensorrtExecutionProvider
#
# ONNX Runtime runs unsupported operators on the CPU, and all of them if there is no GPU.
# The base must match the board's JetPack; ONNX Runtime must be built for the base's CUDA and Python.
ARG L4T_IMAGE=nvcr.io/nvidia/l4t-jetpack:r36.4.0

# --build-context wheels=FOLDER adds a folder of wheels; with --build-arg PIP_NO_INDEX=1 pip uses no index.
FROM scratch AS wheels

FROM ${L4T_IMAGE} AS build
ARG PYTHON=python3.11
ARG ONNXRUNTIME=onnxruntime-gpu
ARG PIP_NO_INDEX
WORKDIR /build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends "${PYTHON}" "${PYTHON}-venv" \
    && rm -rf /var/lib/apt/lists/* \
    && "${PYTHON}" -m venv /opt/edgedraft
COPY pyproject.toml constraints.txt docker/requirements.py ./
# Dependencies first, so that a change of the code keeps their layer cached.
RUN --mount=type=bind,from=wheels,target=/wheels \
    /opt/edgedraft/bin/python requirements.py device >requirements.txt \
    && /opt/edgedraft/bin/pip install --no-cache-dir --find-links /wheels --constraint constraints.txt \
        --requirement requirements.txt
COPY README.md LICENSE ./
COPY protocol protocol
COPY common common
COPY device device
# As in device.Dockerfile. The CPU package of ONNX Runtime, which the extra installs, is replaced: both packages
# contain the same module.
# hadolint ignore=DL3013
RUN --mount=type=bind,from=wheels,target=/wheels \
    /opt/edgedraft/bin/pip install --no-cache-dir --find-links /wheels --no-deps . \
    && /opt/edgedraft/bin/pip uninstall --yes onnxruntime \
    && /opt/edgedraft/bin/pip install --no-cache-dir --find-links /wheels --constraint constraints.txt "${ONNXRUNTIME}" \
    && /opt/edgedraft/bin/pip uninstall --yes \
        certifi charset-normalizer filelock fsspec hf-xet huggingface-hub pyyaml requests tqdm urllib3 setuptools pip \
    && find /opt/edgedraft -depth -type d \( -name tests -o -path '*/onnxruntime/transformers' \) -exec rm -rf {} + \
    && rm -f /opt/edgedraft/bin/edgedraft-export /opt/edgedraft/bin/edgedraft-basestation /opt/edgedraft/bin/edgedraft-bench

FROM ${L4T_IMAGE}
ARG PYTHON=python3.11
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends "${PYTHON}" \
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
