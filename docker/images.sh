#!/usr/bin/env bash
# Builds images with docker or buildah, whichever is there.
#
#   docker/images.sh [--dry-run] [NAME…]     device, basestation, export, device-jetson; without a name the first three
#
# From the environment:
#   ARCH          amd64 or arm64; this machine's without it
#   TAG           latest without it
#   PYTHON_IMAGE  another base, L4T_IMAGE another one for device-jetson; by digest to pin it
#   WHEELS        a folder of wheels to take instead of the index's
#   BUILD_FLAGS   more flags for the builder
#   TORCH         cpu for a base station without CUDA
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
    [ -f "docker/$name.Dockerfile" ] || fail "no docker/$name.Dockerfile"
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
  # shellcheck disable=SC2206 # several flags in one variable
  arguments+=(${BUILD_FLAGS-})
  if docker info >/dev/null 2>&1; then
    "${run[@]}" docker buildx build --load "${arguments[@]}" .
  elif command -v buildah >/dev/null; then
    "${run[@]}" buildah build --format docker "${arguments[@]}" .  # other formats have no health check
  else
    fail "neither a running docker nor buildah is here"
  fi
}

this_arch() {
  case $(uname -m) in
    x86_64) echo amd64 ;;
    aarch64) echo arm64 ;;
    *) fail "no image is made for $(uname -m)" ;;
  esac
}

fail() {
  echo "error: $1" >&2
  exit 1
}

main "$@"
