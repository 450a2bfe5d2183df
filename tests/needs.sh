#!/bin/sh
# Fails if programs or files are missing, and says which Debian packages have them.
#
#   tests/needs.sh NAME=PACKAGE…     NAME is a program, or the absolute path of a file
missing=''
for pair; do
  case $pair in
    /*) [ -e "${pair%=*}" ] ;;
    *) command -v "${pair%=*}" >/dev/null ;;
  esac || missing="$missing ${pair#*=}"
done
[ -z "$missing" ] || {
  echo "error: Debian packages are missing; run: apt-get install$missing" >&2
  exit 1
}
