#!/usr/bin/env bash
# Builds images with docker, or with buildah if docker is not running.
#
#   docker/images.sh [--dry-run] [NAME…]     device, basestation, export, device-jetson; default: the first three
#
# From the environment:
#   ARCH           amd64 or arm64; default this machine's
#   TAG            default latest; the base station's is TAG-cuda or TAG-cpu
#   TORCH          cuda (default) or cpu: PyTorch of the base station
#   PIP_INDEX_URL  the index of packages; default that of pip in the base image
#   TORCH_INDEX    an index with PyTorch's wheels; without CUDA (TORCH=cpu, export) they are in few others
#   ONNXRUNTIME    the wheel of device-jetson, which needs one; COMPUTE_CAPABILITY: of the boards it is for
#   PYTHON_IMAGE   the base image, CUDA_IMAGE that of device-jetson; a digest pins it
#   WHEELS         a folder of wheels that pip uses instead of an index
#   BUILD_FLAGS    extra flags for the builder
#
# --dry-run prints the commands, and fails where they could not start.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=${TORCH:-cuda}

main() {
  run=()
  if [ "${1-}" = --dry-run ]; then
    run=(echo)
    shift
  fi
  [ $# -gt 0 ] || set -- device basestation export
  local name
  for name in "$@"; do
    [ -f "docker/$name.Dockerfile" ] || fail "there is no docker/$name.Dockerfile"
    [ "$name" != device-jetson ] || [ -n "${ONNXRUNTIME-}" ] ||
      fail "ONNXRUNTIME is missing: a wheel with code for the board's GPU (docs/jetson.md)"
  done
  check
  for name in "$@"; do
    build "$name"
  done
}

check() {
  case $TORCH in
    cuda | cpu) ;;
    *) fail "TORCH is '$TORCH'; allowed: cuda, cpu" ;;
  esac
  ARCH=${ARCH:-$(this_arch)}
  if docker info >/dev/null 2>&1; then
    BUILDER=docker
  elif command -v buildah >/dev/null; then
    BUILDER=buildah
  else
    fail "neither docker nor buildah is available; run: apt-get install buildah"
  fi
  [ "$ARCH" = "$(this_arch)" ] || runs_foreign_programs ||
    fail "this machine cannot run programs for $ARCH; run: apt-get install qemu-user-static binfmt-support, or: docker run --privileged --rm tonistiigi/binfmt --install $ARCH"
}

# The kernel hands programs of another architecture to qemu.
runs_foreign_programs() {
  local machine=aarch64
  [ "$ARCH" = arm64 ] || machine=x86_64
  [ -e "${BINFMT:-/proc/sys/fs/binfmt_misc}/qemu-$machine" ]
}

build() {
  local arguments=(--platform "linux/$ARCH" --tag "localhost/edgedraft-$1:$(tag "$1")" --file "docker/$1.Dockerfile"
    --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)")
  local name
  for name in PIP_INDEX_URL TORCH_INDEX TORCH ONNXRUNTIME COMPUTE_CAPABILITY PYTHON_IMAGE CUDA_IMAGE; do
    [ -z "${!name-}" ] || ! grep -q "^ARG $name\b" "docker/$1.Dockerfile" || arguments+=(--build-arg "$name=${!name}")
  done
  [ -z "${WHEELS-}" ] || arguments+=(--build-context "wheels=$WHEELS" --build-arg PIP_NO_INDEX=1)
  # shellcheck disable=SC2206 # split the flags
  arguments+=(${BUILD_FLAGS-})
  if [ "$BUILDER" = docker ]; then
    "${run[@]}" docker buildx build --load "${arguments[@]}" .
  else
    "${run[@]}" buildah build --format docker "${arguments[@]}" .  # the OCI format has no health check
  fi
}

# The base station has two builds, with a tag each.
tag() {
  local tag=${TAG:-latest}
  [ "$1" != basestation ] || tag+=-$TORCH
  echo "$tag"
}

this_arch() {
  case $(uname -m) in
    x86_64) echo amd64 ;;
    aarch64) echo arm64 ;;
    *) fail "there is no image for $(uname -m)" ;;
  esac
}

fail() {
  echo "error: $1" >&2
  exit 1
}

main "$@"
