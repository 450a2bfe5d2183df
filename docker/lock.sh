#!/usr/bin/env bash
# Writes docker/locks: every package of each image, with its version and the hashes of its files.
#
#   docker/lock.sh
#
# Needs uv and pip, in PATH or as UV and PIP. Versions are those of constraints.txt; those of the base station stay as they are until
# its lock is deleted. uv's own configuration names the index; TORCH_INDEX is one with PyTorch's CPU wheels.
set -euo pipefail
cd "$(dirname "$0")/.."

LOCKS=docker/locks
# What PyTorch's wheels with CUDA depend on, and those without do not.
OF_TORCH='^(torch|triton|nvidia-.*|cuda-.*)=='

main() {
  local torch all
  torch=torch==$(sed -n 's/^torch==//p' constraints.txt)
  all=$(mktemp -d)
  # shellcheck disable=SC2064 # expand $all now
  trap "rm -rf '$all'" EXIT
  printf 'hatchling\ncyclonedx-bom\n' | lock "$LOCKS/build.txt" 3.11 aarch64-manylinux_2_28 -
  lock "$LOCKS/device.txt" 3.11 aarch64-manylinux_2_28 pyproject.toml --extra device --constraint constraints.txt
  lock "$LOCKS/device-jetson.txt" 3.12 aarch64-manylinux_2_28 pyproject.toml --extra device \
    --constraint constraints.txt --no-emit-package onnxruntime
  cat "$LOCKS/basestation.txt" "$LOCKS/torch-cuda.txt" >"$all/basestation.txt" 2>/dev/null || true
  printf '%s\n' "$torch" | lock "$all/basestation.txt" 3.11 x86_64-manylinux_2_28 pyproject.toml --extra basestation \
    --constraint -
  of_torch no "$all/basestation.txt" >"$LOCKS/basestation.txt"
  of_torch yes "$all/basestation.txt" >"$LOCKS/torch-cuda.txt"
  lock "$all/export.txt" 3.11 x86_64-manylinux_2_28 pyproject.toml --extra export --constraint constraints.txt
  of_torch no "$all/export.txt" >"$LOCKS/export.txt"
  torch_without_cuda "$torch+cpu" "$all" >"$LOCKS/torch-cpu.txt"
}

# lock FILE PYTHON PLATFORM SOURCE [OPTION]…
lock() {
  local file=$1 python=$2 platform=$3
  shift 3
  "${UV:-uv}" pip compile --quiet --no-header --no-annotate --generate-hashes --python-version "$python" \
    --python-platform "$platform" --output-file "$file" "$@" >/dev/null
}

# torch_without_cuda REQUIREMENT FOLDER: downloads the wheel, which only pip finds in every kind of index.
torch_without_cuda() {
  "${PIP:-pip}" download --quiet --dest "$2" --no-deps --only-binary :all: --platform manylinux_2_28_x86_64 \
    --python-version 3.11 ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$1" >&2
  printf '%s \\\n    --hash=sha256:%s\n' "$1" "$(sha256sum "$2"/torch-*.whl | cut -d' ' -f1)"
}

# of_torch yes|no FILE: the entries of a lock that are PyTorch and its CUDA, or the others.
of_torch() {
  awk -v wanted="$1" -v names="$OF_TORCH" '/^[a-z]/ { of = $1 ~ names ? "yes" : "no" } of == wanted' "$2"
}

main "$@"
