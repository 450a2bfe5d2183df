#!/usr/bin/env bash
# Builds images without a registry: the device for amd64 and arm64, the base station without CUDA. debootstrap makes
# the base images, pip downloads the wheels. build/images caches both.
#
#   docker/offline.sh [PIP]     default: the pip in PATH
#
# Needs root, buildah and the requirements of docker/base.sh; the tests need shellcheck, ssh and sshd as well.
set -euo pipefail
cd "$(dirname "$0")/.."

PIP=${1-pip}
CACHE=build/images
PYTHON_VERSION=3.11

export BUILDAH_ISOLATION=chroot BUILD_FLAGS=--layers

main() {
  local arch
  mkdir -p "$CACHE"
  for arch in amd64 arm64; do
    base "$arch"
    wheels "device-$arch" "$arch" constraints.txt '.[device]'
    image device "$arch"
  done
  arch=$(dpkg --print-architecture)
  base "$arch"
  wheels "basestation-$arch" "$arch" docker/basestation-constraints.txt '.[basestation]' transformers
  TORCH=cpu image basestation "$arch"
}

# base ARCH: builds localhost/edgedraft-base:ARCH.
base() {
  local tar=$CACHE/base-$1.tar
  [ -e "$tar" ] || docker/base.sh "$1" "$tar"
  printf 'FROM scratch\nADD base-%s.tar /\n' "$1" |
    buildah build --layers --platform "linux/$1" --tag "localhost/edgedraft-base:$1" --file - "$CACHE"
}

# wheels FOLDER ARCH CONSTRAINTS REQUIREMENT…: downloads the wheels of an image for its platform.
wheels() {
  local folder=$CACHE/wheels/$1 arch=$2 constraints=$3 machine glibc platforms=()
  shift 3
  [ ! "$folder/complete" -nt pyproject.toml ] || [ ! "$folder/complete" -nt "$constraints" ] || return 0
  [ "$arch" = arm64 ] && machine=aarch64 || machine=x86_64
  for glibc in 2_28 2_27 2_26 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_$machine"); done
  rm -rf "$folder"
  "$PIP" download --quiet --dest "$folder" --constraint "$constraints" --only-binary :all: \
    "${platforms[@]}" --platform "manylinux2014_$machine" --implementation cp --python-version "$PYTHON_VERSION" \
    "$@" hatchling
  touch "$folder/complete"
}

# image NAME ARCH: builds localhost/edgedraft-NAME:ARCH.
image() {
  ARCH=$2 TAG=$2 PYTHON_IMAGE=localhost/edgedraft-base:$2 WHEELS=$PWD/$CACHE/wheels/$1-$2 docker/images.sh "$1"
}

main "$@"
