#!/usr/bin/env bash
# Builds images without a registry: the device for amd64 and arm64, the base station without CUDA. debootstrap makes
# the base images, pip downloads the wheels. build/images caches both.
#
#   docker/offline.sh [PIP]     default: the pip in PATH
#
# Needs root; `make test-images` checks first that the programs are there. TORCH_INDEX: as for docker/images.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

PIP=${1-pip}
CACHE=build/images
# Of the base image that docker/base.sh makes; wheels for older glibc 2 run on it too.
PYTHON_VERSION=3.11 NEWEST_GLIBC=36

export BUILDAH_ISOLATION=chroot BUILD_FLAGS=--layers

main() {
  local arch
  [ "$(id -u)" = 0 ] || { echo "error: docker/offline.sh needs root" >&2 && exit 1; }
  mkdir -p "$CACHE"
  for arch in amd64 arm64; do
    base "$arch"
    wheels "device-$arch" "$arch" build device
    image device "$arch"
  done
  arch=$(dpkg --print-architecture)
  base "$arch"
  wheels "basestation-$arch" "$arch" build torch-cpu basestation
  TORCH=cpu image basestation "$arch"
}

# base ARCH: builds localhost/edgedraft-base:ARCH.
base() {
  local tar=$CACHE/base-$1.tar
  [ -e "$tar" ] || docker/base.sh "$1" "$tar"
  printf 'FROM scratch\nADD base-%s.tar /\n' "$1" |
    buildah build --layers --platform "linux/$1" --tag "localhost/edgedraft-base:$1" --file - "$CACHE"
}

# wheels FOLDER ARCH LOCK…: downloads the wheels of an image for its platform.
wheels() {
  local folder=$CACHE/wheels/$1 arch=$2 machine glibc name files=() platforms=()
  shift 2
  for name in "$@"; do files+=("docker/locks/$name.txt"); done
  ! cmp --silent "$folder/locked" <(cat "${files[@]}") || return 0
  [ "$arch" = arm64 ] && machine=aarch64 || machine=x86_64
  for ((glibc = NEWEST_GLIBC; glibc >= 17; glibc--)); do platforms+=(--platform "manylinux_2_${glibc}_$machine"); done
  rm -rf "$folder"
  for name in "${files[@]}"; do
    "$PIP" download --quiet --dest "$folder" --require-hashes --no-deps --only-binary :all: \
      ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
      "${platforms[@]}" --platform "manylinux2014_$machine" --implementation cp --python-version "$PYTHON_VERSION" \
      --requirement "$name"
  done
  cat "${files[@]}" >"$folder/locked"
}

# image NAME ARCH: builds localhost/edgedraft-NAME:ARCH.
image() {
  ARCH=$2 TAG=$2 PYTHON_IMAGE=localhost/edgedraft-base:$2 WHEELS=$PWD/$CACHE/wheels/$1-$2 docker/images.sh "$1"
}

main "$@"
