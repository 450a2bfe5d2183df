#!/usr/bin/env bash
# Installs the device on a board over ssh: the image (or a Python environment if the board has no docker), the bundle,
# its keys, and a service that starts at boot. Running it again replaces only what has changed.
#
#   docker/flash.sh [OPTION]… HOST           HOST is an ssh destination, user@address; the user is root or may use sudo
#
#   --bundle DIR        the bundle; default build/bundle
#   --server ENDPOINT   the base station's address as seen from the board, tcp://HOST:5755; required
#   --keys DIR          the base station's key folder on this machine, in which the board's key is enrolled; required
#   --station HOST      enroll over ssh on HOST; --keys is a folder there
#   --name NAME         name under which the board is enrolled; default its host name
#   --image FILE        load this image (from docker save) instead of building one
#   --image-name NAME   device, or device-jetson
#   --provider NAME     ONNX Runtime execution provider
#   --port PORT         port of the service on the board's loopback; default 8080
#   --dry-run           print each step without running it
set -euo pipefail
cd "$(dirname "$0")/.."

BUNDLE=build/bundle SERVER='' KEYS='' STATION='' NAME='' IMAGE='' IMAGE_NAME=device
PROVIDER=CPUExecutionProvider PORT=8080 DRY_RUN='' HOST=''
READY_SECONDS=${READY_SECONDS:-120}
# On the board: the board's key, the base station's public key, the bundle and, without docker, the environment.
STATE=/var/lib/edgedraft
# On the board: the options of the service.
CONFIGURATION=/etc/edgedraft/device.toml
USER_ID=10001

main() {
  options "$@"
  check
  step "look at $HOST"
  local engine
  engine=$(engine)
  if [ "$engine" = docker ]; then
    send_image
  else
    send_environment
  fi
  send_bundle
  make_key "$engine"
  make_api_key
  enroll
  send_configuration "$engine"
  send_unit "$engine"
  step "start edgedraft-device at boot, and now"
  on_board "systemctl daemon-reload && systemctl enable --quiet edgedraft-device && systemctl restart edgedraft-device"
  wait_until_ready "$engine"
}

options() {
  while [ $# -gt 0 ]; do
    case $1 in
      --bundle) BUNDLE=${2:?} && shift ;;
      --server) SERVER=${2:?} && shift ;;
      --keys) KEYS=${2:?} && shift ;;
      --station) STATION=${2:?} && shift ;;
      --name) NAME=${2:?} && shift ;;
      --image) IMAGE=${2:?} && shift ;;
      --image-name) IMAGE_NAME=${2:?} && shift ;;
      --provider) PROVIDER=${2:?} && shift ;;
      --port) PORT=${2:?} && shift ;;
      --dry-run) DRY_RUN=yes ;;
      --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' docker/flash.sh && exit ;;
      -*) fail "$1 is not an option (see --help)" ;;
      *) [ -z "$HOST" ] || fail "one board at a time: $HOST or $1" && HOST=$1 ;;
    esac
    shift
  done
}

check() {
  [ -n "$HOST" ] || fail "which board? docker/flash.sh [OPTION]… HOST (see --help)"
  [ -f "$BUNDLE/manifest.json" ] || fail "$BUNDLE is not a bundle; export one with: edgedraft-export convert MODEL BUNDLE"
  [[ $SERVER =~ ^tcp://[^/:]+:[0-9]+$ ]] || fail "--server is '$SERVER'; allowed: tcp://HOST:PORT, as seen from the board"
  [ -n "$KEYS" ] || fail "--keys is missing: the folder that edgedraft-basestation keys new created"
  [ -z "$IMAGE" ] || [ -f "$IMAGE" ] || fail "$IMAGE is not a file"
  [[ $PORT =~ ^[0-9]+$ ]] || fail "--port is '$PORT'; allowed: a number"
}

engine() {
  if ask_board "command -v docker >/dev/null && docker info >/dev/null 2>&1"; then echo docker; else echo python; fi
}

send_image() {
  local image=localhost/edgedraft-$IMAGE_NAME:latest file=$IMAGE
  if [ -z "$file" ]; then
    file=build/images/$IMAGE_NAME-$(board_arch).tar
    step "build $image for $(board_arch)"
    run env ARCH="$(board_arch)" docker/images.sh "$IMAGE_NAME"
    if docker info >/dev/null 2>&1; then
      run docker save --output "$file" "$image"
    else
      run rm -f "$file"
      run buildah push "$image" "docker-archive:$file:$image"
    fi
  fi
  step "load $file"
  stream "$file" "docker load --quiet"
}

# Copies the packages of the device; pip on the board installs the dependencies of the device extra.
send_environment() {
  step "no docker on the board: create an environment in $STATE/venv"
  on_board "id edgedraft >/dev/null 2>&1 || useradd --uid $USER_ID --no-create-home --shell /usr/sbin/nologin edgedraft"
  on_board "mkdir -p $STATE/source && rm -rf $STATE/source/*"
  pipe "tar --create --exclude=__pycache__ pyproject.toml constraints.txt README.md LICENSE protocol common device" \
    "tar --extract --no-same-owner --directory $STATE/source"
  on_board "[ -x $STATE/venv/bin/python ] || python3 -m venv $STATE/venv"
  on_board "cd $STATE/source && $STATE/venv/bin/pip install --quiet --constraint constraints.txt '.[device]'"
}

# The manifest contains the hashes of all files, so an equal manifest means an equal bundle.
send_bundle() {
  local hash
  hash=$(sha256sum "$BUNDLE/manifest.json" | cut -d' ' -f1)
  if ask_board "echo '$hash  $STATE/bundle/manifest.json' | sha256sum --check --status 2>/dev/null"; then
    step "the board has this bundle already"
    return
  fi
  step "copy the bundle $BUNDLE"
  on_board "rm -rf $STATE/bundle.new && mkdir -p $STATE/bundle.new"
  pipe "tar --create --directory $BUNDLE ." "tar --extract --no-same-owner --directory $STATE/bundle.new"
  on_board "chmod -R a+rX $STATE/bundle.new && rm -rf $STATE/bundle && mv $STATE/bundle.new $STATE/bundle"
}

make_key() {
  if ask_board "[ -e $STATE/keys/device.pub ]"; then
    step "the board has a key already"
    return
  fi
  step "create the board's key"
  on_board "mkdir -p $STATE/keys && chown $USER_ID:$USER_ID $STATE/keys && chmod 700 $STATE/keys"
  if [ "$1" = docker ]; then
    on_board "docker run --rm --network none -v $STATE/keys:/keys localhost/edgedraft-$IMAGE_NAME keys new /keys/device"
  else
    on_board "setpriv --reuid $USER_ID --regid $USER_ID --clear-groups $STATE/venv/bin/edgedraft-device keys new $STATE/keys/device"
  fi
}

# Clients of the service send this key; it stays the same.
make_api_key() {
  if ask_board "[ -e $STATE/keys/api ]"; then
    step "the board has an API key already"
    return
  fi
  step "create the API key of the service"
  on_board "umask 077 && head -c 32 /dev/urandom | base64 | tr +/ -_ > $STATE/keys/api && chown $USER_ID:$USER_ID $STATE/keys/api"
}

# A key that is already enrolled keeps its name.
enroll() {
  local key name=$NAME
  step "enroll the board's key at the base station and copy the base station's key to the board"
  if [ -n "$DRY_RUN" ]; then
    at_station "edgedraft-basestation keys enroll $KEYS ${NAME:-NAME} KEY"
  else
    key=$(ask_board "cat $STATE/keys/device.pub" | cut -d' ' -f2)
    [ -n "$name" ] || name=$(ask_board hostname)
    at_station "edgedraft-basestation keys list $KEYS" | grep --fixed-strings -- "$key" >/dev/null ||
      at_station "edgedraft-basestation keys enroll $KEYS $(printf %q "$name") $(printf %q "$key")"
  fi
  pipe "$(station_shell "cat $KEYS/station.pub")" "cat > $STATE/keys/station.pub && chmod 644 $STATE/keys/station.pub"
}

send_configuration() {
  step "install the configuration"
  on_board "mkdir -p ${CONFIGURATION%/*}"
  send "$CONFIGURATION" "$(configuration "$1")"
}

send_unit() {
  step "install the unit"
  send /etc/systemd/system/edgedraft-device.service "$(unit "$1")"
}

# send FILE TEXT: writes a file on the board that everyone may read.
send() {
  local file
  file=$(mktemp)
  printf "%s\n" "$2" >"$file"
  [ -z "$DRY_RUN" ] || sed 's/^/    | /' "$file"
  stream "$file" "cat > $1 && chmod 644 $1"
  rm -f "$file"
}

# The paths and the address are the container's if there is one.
configuration() {
  local state=$STATE bind=http://127.0.0.1:$PORT
  [ "$1" = python ] || state='' bind=http://0.0.0.0:8080
  cat <<TOML
bundle = "$state/bundle"
server = "$SERVER"
key = "$state/keys/device"
station-key = "$state/keys/station.pub"
provider = "$PROVIDER"
api-key-file = "$state/keys/api"
bind = "$bind"
TOML
}

unit() {
  cat <<UNIT
[Unit]
Description=edgedraft device
After=network-online.target $([ "$1" = python ] || echo docker.service)
Wants=network-online.target

[Service]
Restart=always
RestartSec=5
TimeoutStopSec=10
UNIT
  if [ "$1" = docker ]; then
    cat <<UNIT
ExecStartPre=-/usr/bin/env docker rm --force edgedraft-device
ExecStart=/usr/bin/env docker run --rm --name edgedraft-device --read-only --tmpfs /tmp --cap-drop ALL \\
  --security-opt no-new-privileges --publish 127.0.0.1:$PORT:8080 $(gpu)\\
  --volume $STATE/bundle:/bundle:ro --volume $STATE/keys:/keys:ro --volume $CONFIGURATION:$CONFIGURATION:ro \\
  localhost/edgedraft-$IMAGE_NAME serve
ExecStop=/usr/bin/env docker stop --time 5 edgedraft-device
UNIT
  else
    cat <<UNIT
User=$USER_ID
Group=$USER_ID
ExecStart=$STATE/venv/bin/edgedraft-device serve
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
UNIT
  fi
  printf '\n[Install]\nWantedBy=multi-user.target\n'
}

gpu() {
  [ "$PROVIDER" = CPUExecutionProvider ] || echo '--runtime nvidia '
}

wait_until_ready() {
  local url=http://127.0.0.1 python=$STATE/venv/bin/python waited=0
  step "wait until it is ready"
  if [ "$1" = docker ]; then
    python="docker exec edgedraft-device python3" url+=:8080
  else
    url+=:$PORT
  fi
  local probe="$python -c \"from urllib.request import urlopen; urlopen('$url/readyz', timeout=5)\""
  if [ -n "$DRY_RUN" ]; then
    on_board "$probe"
    return
  fi
  until ask_board "$probe" 2>/dev/null; do
    [ $((waited += 2)) -lt "$READY_SECONDS" ] ||
      fail "not ready after $READY_SECONDS s; see: ssh $HOST journalctl --unit edgedraft-device"
    sleep 2
  done
  echo "ready: http://127.0.0.1:$PORT/v1 on the board; to reach it from here: ssh -N -L $PORT:127.0.0.1:$PORT $HOST"
  echo "API key: $STATE/keys/api on the board"
}

board_arch() {
  local machine
  machine=$(ask_board "uname -m")
  case $machine in
    aarch64) echo arm64 ;;
    x86_64) echo amd64 ;;
    *) fail "there is no image for $machine" ;;
  esac
}

step() {
  echo "== $1"
}

# Ways to run a command. ask_board changes nothing, so it also runs in a dry run.
ask_board() {
  board_shell "$1" </dev/null
}

on_board() {
  show "$HOST: $1" || board_shell "$1" </dev/null
}

# stream FILE COMMAND: feeds a local file to a command on the board. pipe COMMAND COMMAND: from local to board.
stream() {
  show "$HOST: $2 < $1" || board_shell "$2" <"$1"
}

pipe() {
  show "$1 | $HOST: $2" || bash -o pipefail -ec "$1" | board_shell "$2"
}

at_station() {
  show "${STATION:-here}: $1" || bash -ec "$(station_shell "$1")"
}

run() {
  show "here: $*" || "$@"
}

station_shell() {
  if [ -n "$STATION" ]; then echo "ssh $STATION $(printf %q "$1") </dev/null"; else echo "$1"; fi
}

board_shell() {
  local quoted
  quoted=$(printf %q "$1")
  # shellcheck disable=SC2029 # only "id -u" must expand on the board
  ssh "$HOST" "if [ \$(id -u) = 0 ]; then sh -ec $quoted; else sudo sh -ec $quoted; fi"
}

# In a dry run, prints the step; otherwise fails, so that the command after || runs.
show() {
  [ -n "$DRY_RUN" ] && echo "    $1"
}

fail() {
  echo "error: $1" >&2
  exit 1
}

main "$@"
