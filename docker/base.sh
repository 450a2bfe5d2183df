#!/usr/bin/env bash
# Makes a base image without a registry: Debian with Python as a tar file, in place of python:*-slim.
#
#   docker/base.sh amd64|arm64 FILE.tar
#
# Needs root and debootstrap, and for a foreign architecture qemu-user-static and binfmt-support.
set -euo pipefail

SUITE=bookworm
PACKAGES=python3,python3-venv,ca-certificates

main() {
  local arch=$1 tar=$2 root
  root=$(mktemp -d)
  # shellcheck disable=SC2064 # expand $root now
  trap "rm -rf '$root'" EXIT
  [ "$arch" = "$(dpkg --print-architecture)" ] || register_emulator
  debootstrap --variant=minbase --arch="$arch" --include="$PACKAGES" "$SUITE" "$root" >&2
  slim "$root"
  chmod 755 "$root"
  tar --create --one-file-system --exclude="./dev/*" --exclude="./proc/*" --exclude="./sys/*" --directory "$root" --file "$tar.part" .
  mv "$tar.part" "$tar"
}

# Registers qemu with the kernel's binfmt_misc.
register_emulator() {
  local table=/proc/sys/fs/binfmt_misc
  [ -e "$table/register" ] || mount -t binfmt_misc binfmt_misc "$table"
  [ -e "$table/qemu-aarch64" ] || update-binfmts --enable qemu-aarch64
}

# Deletes the files that a slim image does not have.
slim() {
  rm -rf "$1"/usr/share/{doc,info,locale,man} "$1"/var/cache/{apt,debconf} "$1"/var/lib/apt/lists/* "$1"/var/log/*
  find "$1" -name __pycache__ -prune -exec rm -rf {} +
  mkdir -p "$1"/var/cache/apt/archives/partial
}

main "$@"
