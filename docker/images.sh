#!/usr/bin/env bash
# Builds images with docker, or with buildah if docker is not running.
#
#   docker/images.sh [--dry-run] [NAME…]     device, basestation, export, device-jetson; default: the first three
#
# From the environment:
#   ARCH          amd64 or arm64; default this machine's
#   TAG           default latest
#   PYTHON_IMAGE  the base image, L4T_IMAGE that of device-jetson; a digest pins it
#   WHEELS        a folder of wheels that pip uses instead of an index
#   BUILD_FLAGS   extra flags for the builder
#   TORCH         cpu builds the base station without CUDA
set -euo pipefail
cd "$(dirname "$0")/.."

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
    build "$name"
  done
}

build() {
  local arguments=(--platform "linux/${ARCH:-$(this_arch)}" --tag "localhost/edgedraft-$1:${TAG:-latest}"
    --file "docker/$1.Dockerfile")
  local name
  for name in PYTHON_IMAGE L4T_IMAGE TORCH; do
    [ -z "${!name-}" ] || arguments+=(--build-arg "$name=${!name}")
  done
  [ -z "${WHEELS-}" ] || arguments+=(--build-context "wheels=$WHEELS" --build-arg PIP_NO_INDEX=1)
  # shellcheck disable=SC2206 # split the flags
  arguments+=(${BUILD_FLAGS-})
  if docker info >/dev/null 2>&1; then
    "${run[@]}" docker buildx build --load "${arguments[@]}" .
  elif command -v buildah >/dev/null; then
    "${run[@]}" buildah build --format docker "${arguments[@]}" .  # the OCI format has no health check
  else
    fail "neither docker nor buildah is available"
  fi
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
