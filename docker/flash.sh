#!/usr/bin/env bash
# Installs the device on a board over ssh: the image (or a Python environment if the board has no docker), the bundle,
# its keys, and a service that starts at boot. Running it again replaces only what has changed.
#
#   docker/flash.sh [OPTION]… HOST           HOST is an ssh destination, user@address; the user is root or may use sudo
#
#   --bundle DIR        the bundle; default build/bundle
#   --server ENDPOINT   the base station's address as seen from the board, tcp://HOST:5755; required
#   --keys DIR          the base station's key folder, in which the board's key is enrolled; required
#   --station-command COMMAND
#                       runs edgedraft-basestation where the keys are; default edgedraft-basestation. With compose:
#                       "docker compose -f docker/compose.yaml exec -T basestation edgedraft-basestation" --keys /keys
#   --station HOST      run that command over ssh on HOST
#   --name NAME         name under which the board is enrolled; default its host name
#   --image IMAGE       a file from docker save, or an image in a registry; default: build one
#   --image-name NAME   device, or device-jetson
#   --provider NAME     ONNX Runtime execution provider
#   --port PORT         port of the service on the board's loopback; default 8080
#   --dry-run           make all checks, and print each step without running it
#
# A board whose service does not become healthy gets back all that it had. A run that was interrupted can be repeated.
set -euo pipefail
cd "$(dirname "$0")/.."

BUNDLE=build/bundle SERVER='' KEYS='' STATION='' STATION_COMMAND=edgedraft-basestation NAME='' IMAGE=''
IMAGE_NAME=device PROVIDER=CPUExecutionProvider PORT=8080 DRY_RUN='' HOST=''
READY_SECONDS=${READY_SECONDS:-120}
# On the board: the board's key, the base station's public key, the bundle and, without docker, the environment.
STATE=/var/lib/edgedraft
# On the board: the options of the service.
CONFIGURATION=/etc/edgedraft/device.toml
UNIT=/etc/systemd/system/edgedraft-device.service
USER_ID=10001

main() {
  options "$@"
  check_options
  step "look at $HOST"
  probe
  check_provider
  check_image
  check_station
  keep_previous
  if [ "$ENGINE" = docker ]; then
    send_image
  else
    send_environment
  fi
  send_bundle
  [ "$ENGINE" = docker ] || replace venv
  make_key
  make_api_key
  enroll
  step "install the configuration"
  on_board "mkdir -p ${CONFIGURATION%/*}"
  send "$CONFIGURATION" "$(configuration)"
  step "install the unit"
  send "$UNIT" "$(unit)"
  step "start edgedraft-device at boot, and now"
  on_board "systemctl daemon-reload && systemctl enable --quiet edgedraft-device && systemctl restart edgedraft-device"
  wait_until_ready
}

options() {
  while [ $# -gt 0 ]; do
    case $1 in
      --bundle) BUNDLE=${2:?} && shift ;;
      --server) SERVER=${2:?} && shift ;;
      --keys) KEYS=$(printf %q "${2:?}") && shift ;;
      --station) STATION=${2:?} && shift ;;
      --station-command) STATION_COMMAND=${2:?} && shift ;;
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

check_options() {
  [ -n "$HOST" ] || fail "which board? docker/flash.sh [OPTION]… HOST (see --help)"
  [ -f "$BUNDLE/manifest.json" ] || fail "$BUNDLE is not a bundle; export one with: edgedraft-export convert MODEL BUNDLE"
  [[ $SERVER =~ ^tcp://[^/:]+:[0-9]+$ ]] || fail "--server is '$SERVER'; allowed: tcp://HOST:PORT, as seen from the board"
  [ -n "$KEYS" ] || fail "--keys is missing: the folder that edgedraft-basestation keys new created"
  [[ $IMAGE != *.tar ]] || [ -f "$IMAGE" ] || fail "$IMAGE is not a file"
  [[ $IMAGE_NAME =~ ^device(-jetson)?$ ]] || fail "--image-name is '$IMAGE_NAME'; allowed: device, device-jetson"
  [[ $PROVIDER =~ ^(CPU|CUDA|Tensorrt)ExecutionProvider$ ]] ||
    fail "--provider is '$PROVIDER'; allowed: CPUExecutionProvider, CUDAExecutionProvider, TensorrtExecutionProvider"
  [[ $PORT =~ ^[0-9]+$ ]] || fail "--port is '$PORT'; allowed: a number"
}

# Finds out what the board is: ENGINE (docker or python) and ARCH.
probe() {
  local words status=0
  words=$(ssh -o BatchMode=yes -o ConnectTimeout=10 "$HOST" true 2>&1 </dev/null) || status=$?
  [ "$status" = 0 ] || fail_to_connect "$status" "$(tail -n 1 <<<"$words")"
  words=$(ssh "$HOST" '[ "$(id -u)" = 0 ] || sudo -n true' 2>&1 </dev/null) ||
    fail "$HOST is reached, but its user is not root and cannot use sudo without a password (${words##*$'\n'}); allow it in /etc/sudoers.d, or use root@"
  ARCH=$(board_arch)
  if ! ask_board "command -v docker >/dev/null"; then
    ENGINE=python
    step "no docker on the board: use Python"
    ask_board "python3 -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null" ||
      fail "$HOST has neither docker nor Python 3.11 with venv; on the board run: sudo apt-get install python3-venv"
  elif ask_board "docker info >/dev/null 2>&1"; then
    ENGINE=docker
  else
    fail "docker on $HOST does not answer; on the board run: sudo systemctl start docker"
  fi
}

# fail_to_connect STATUS WORDS: 255 is ssh's own.
fail_to_connect() {
  case $1:$2 in
    255:*'Permission denied'*) fail "$HOST asks for a password or another key ($2); run: ssh-copy-id $HOST" ;;
    255:*'Host key verification failed'*) fail "$HOST has a host key that this machine does not know; run: ssh $HOST" ;;
    255:*) fail "$HOST is unreachable ($2); check its name, its power and the network" ;;
    *) fail "$HOST does not run commands ($2)" ;;
  esac
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

check_provider() {
  [ "$IMAGE_NAME" = device ] || [ "$ARCH" = arm64 ] || fail "--image-name $IMAGE_NAME is for arm64; $HOST is $ARCH"
  [ "$PROVIDER" != CPUExecutionProvider ] || return 0
  [ "$ENGINE" = docker ] || fail "--provider $PROVIDER needs docker on the board; without it, only the CPU is used"
  [ "$IMAGE_NAME" != device ] || fail "--provider $PROVIDER needs --image-name device-jetson; the image device has no GPU"
  ask_board "docker info --format '{{json .Runtimes}}' | grep -q nvidia" ||
    fail "docker on $HOST has no runtime nvidia; on the board run: sudo nvidia-ctk runtime configure --runtime=docker"
}

check_image() {
  if [ "$ENGINE" = python ]; then
    [ -z "$IMAGE" ] || fail "--image needs docker on the board"
  elif [ -z "$IMAGE" ]; then
    ARCH=$ARCH docker/images.sh --dry-run "$IMAGE_NAME" >/dev/null
  elif [ ! -f "$IMAGE" ]; then
    ask_board "docker manifest inspect $IMAGE >/dev/null" ||
      fail "--image $IMAGE is neither a file here nor an image that the board can pull"
  fi
}

# Reads STATION_PUBLIC, the file station.pub, and whether the board's key is ENROLLED; a revoked one is refused.
check_station() {
  local listed key known=''
  if ! STATION_PUBLIC=$(at_station "keys show $KEYS") || ! listed=$(at_station "keys list $KEYS"); then
    fail "the base station's keys cannot be read; see --keys and --station-command"
  fi
  key=$(ask_board "[ ! -e $STATE/keys/device.pub ] || cat $STATE/keys/device.pub" | cut -d' ' -f2)
  [ -n "$NAME" ] || NAME=$(ask_board hostname)
  [ -z "$key" ] || known=$(grep --fixed-strings -- "$key" <<<"$listed") || true
  ENROLLED=$known
  case $known in
    *' (revoked)') fail "the base station has revoked the key of $HOST; remove $STATE/keys/device and device.pub there for another" ;;
    '') ! grep --quiet "  $NAME$" <<<"$listed" ||
      fail "--name is '$NAME', which another device has at the base station; choose another, or revoke it" ;;
  esac
}

# What a running service has is kept in STATE/previous, its image as :previous, until the new one is healthy or rolled
# back. If that is there already, what the board has now is untested.
keep_previous() {
  local kept=$STATE/previous
  PREVIOUS=''
  if ask_board "[ -e $kept/${UNIT##*/} ]"; then
    step "the last run did not finish: keep what the board had before it"
  elif ask_board "[ -e $UNIT ] && systemctl is-active --quiet edgedraft-device"; then
    step "keep what the board has"
    tag_image latest previous "$UNIT"
    on_board "rm -rf $kept && mkdir -p $kept && cp $CONFIGURATION $kept && cp $UNIT $kept"
  else
    return 0
  fi
  PREVIOUS=yes
}

# tag_image TAG TAG UNIT: gives the image of a unit another tag; a unit without docker has none.
tag_image() {
  on_board "for name in \$(sed -n 's|.* \(localhost/.*\):latest serve\$|\1|p' $3); do docker tag \$name:$1 \$name:$2; done"
}

# replace NAME: puts STATE/NAME.new in the place of STATE/NAME, which is kept.
replace() {
  local kept=$STATE/previous/$1
  [ -z "$PREVIOUS" ] || on_board "[ -d $kept ] || [ ! -d $STATE/$1 ] || mv $STATE/$1 $kept"
  on_board "rm -rf $STATE/$1 && mv $STATE/$1.new $STATE/$1"
}

roll_back() {
  local kept=$STATE/previous name
  [ -n "$PREVIOUS" ] || fail "$1; there is nothing to roll back to; see: ssh $HOST journalctl --unit edgedraft-device"
  step "$1: roll back"
  tag_image previous latest "$kept/${UNIT##*/}"
  on_board "cp $kept/${UNIT##*/} $UNIT && cp $kept/${CONFIGURATION##*/} $CONFIGURATION"
  for name in bundle venv; do
    on_board "[ ! -d $kept/$name ] || { rm -rf $STATE/$name && mv $kept/$name $STATE/$name; }"
  done
  on_board "systemctl daemon-reload && systemctl restart edgedraft-device"
  forget_previous
  fail "$1; the board is back on what it had; see: ssh $HOST journalctl --unit edgedraft-device"
}

# The unit first: without it, nothing counts as kept.
forget_previous() {
  on_board "rm -f $STATE/previous/${UNIT##*/} && rm -rf $STATE/previous"
}

# The previous image stays.
prune() {
  step "remove what is no longer needed"
  forget_previous
  [ "$ENGINE" = python ] ||
    on_board "docker image prune --force --filter label=org.opencontainers.image.title=edgedraft-$IMAGE_NAME >/dev/null"
}

image() {
  echo "localhost/edgedraft-$IMAGE_NAME:$1"
}

send_image() {
  local image file=$IMAGE
  image=$(image latest)
  if [ -n "$IMAGE" ] && [ ! -f "$IMAGE" ]; then
    step "pull $IMAGE"
    on_board "docker pull --quiet $IMAGE >/dev/null && docker tag $IMAGE $image"
    return
  fi
  if [ -z "$file" ]; then
    file=build/images/$IMAGE_NAME-$ARCH.tar
    step "build $image for $ARCH"
    run mkdir -p "${file%/*}"
    run env ARCH="$ARCH" TAG=latest docker/images.sh "$IMAGE_NAME"
    if docker info >/dev/null 2>&1; then
      run docker save --output "$file" "$image"
    else
      run rm -f "$file"
      run buildah push "$image" "docker-archive:$file:$image"
    fi
  fi
  step "load $file"
  stream "$file" "loaded=\$(docker load --quiet) && name=\$(echo \"\$loaded\" | sed -n 's/^Loaded image: //p' | head -n 1) && [ -n \"\$name\" ] && docker tag \"\$name\" $image" ||
    fail "$HOST could not load an image with a name from $file; the service runs as before"
}

# Copies the packages of the device; pip on the board installs the dependencies of the device extra into STATE/venv.new.
# The command in it names its Python, which moves.
send_environment() {
  local new=$STATE/venv.new
  step "create an environment in $STATE/venv"
  on_board "id edgedraft >/dev/null 2>&1 || useradd --uid $USER_ID --no-create-home --shell /usr/sbin/nologin edgedraft"
  on_board "rm -rf $STATE/source $new && mkdir -p $STATE/source"
  pipe "tar --create --exclude=__pycache__ pyproject.toml constraints.txt README.md LICENSE protocol common device" \
    "tar --extract --no-same-owner --directory $STATE/source"
  on_board "if [ -x $STATE/venv/bin/python ]; then cp -a $STATE/venv $new; else python3 -m venv $new; fi"
  on_board "cd $STATE/source && $new/bin/python -m pip install --quiet --constraint constraints.txt '.[device]'"
  on_board "sed -i '1s|$new/|$STATE/venv/|' $new/bin/edgedraft-device && rm -rf $STATE/source"
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
  on_board "chmod -R a+rX $STATE/bundle.new"
  replace bundle
}

make_key() {
  if ask_board "[ -e $STATE/keys/device.pub ]"; then
    step "the board has a key already"
    return
  fi
  step "create the board's key"
  on_board "mkdir -p $STATE/keys && chown $USER_ID:$USER_ID $STATE/keys && chmod 700 $STATE/keys"
  if [ "$ENGINE" = docker ]; then
    on_board "docker run --rm --network none -v $STATE/keys:/keys $(image latest) keys new /keys/device"
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
  local key
  step "enroll the board's key at the base station and copy the base station's key to the board"
  if [ -n "$DRY_RUN" ]; then
    show "${STATION:-here}: $STATION_COMMAND keys enroll $KEYS $NAME KEY"
  elif [ -z "$ENROLLED" ]; then
    key=$(ask_board "cat $STATE/keys/device.pub" | cut -d' ' -f2)
    at_station "keys enroll $KEYS $(printf %q "$NAME") $(printf %q "$key")"
  fi
  send "$STATE/keys/station.pub" "$STATION_PUBLIC"
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
  [ "$ENGINE" = python ] || state='' bind=http://0.0.0.0:8080
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
After=network-online.target $([ "$ENGINE" = python ] || echo docker.service)
Wants=network-online.target

[Service]
Restart=always
RestartSec=5
TimeoutStopSec=10
LogRateLimitIntervalSec=60
LogRateLimitBurst=200
NoNewPrivileges=yes
ProtectSystem=strict
PrivateTmp=yes
$("service_of_$ENGINE")

[Install]
WantedBy=multi-user.target
UNIT
}

# The log of the container is limited to two files of 5 MB, for the sake of SD cards.
service_of_docker() {
  cat <<UNIT
ProtectHome=read-only
StateDirectory=edgedraft
ExecStartPre=-/usr/bin/env docker rm --force edgedraft-device
ExecStartPre=/usr/bin/env install --directory --owner=$USER_ID --group=$USER_ID --mode=700 $STATE/state
ExecStart=/usr/bin/env docker run --rm --name edgedraft-device --read-only --tmpfs /tmp --cap-drop ALL \\
  --security-opt no-new-privileges --publish 127.0.0.1:$PORT:8080 $(gpu)\\
  --log-driver json-file --log-opt max-size=5m --log-opt max-file=2 \\
  --volume $STATE/bundle:/bundle:ro --volume $STATE/keys:/keys:ro --volume $CONFIGURATION:$CONFIGURATION:ro \\
  --volume $STATE/state:/state --env XDG_STATE_HOME=/state $(image latest) serve
ExecStop=/usr/bin/env docker stop --time 5 edgedraft-device
UNIT
}

service_of_python() {
  cat <<UNIT
User=$USER_ID
Group=$USER_ID
Environment=XDG_STATE_HOME=$STATE/state
ExecStart=$STATE/venv/bin/edgedraft-device serve
StateDirectory=edgedraft/state
UMask=0077
$(sed -n '/^CapabilityBoundingSet/,/^SystemCallFilter/p' docker/systemd/edgedraft-basestation.service)
PrivateDevices=yes
UNIT
}

# The container's user is not root, so it needs the board's groups of the GPU's devices.
gpu() {
  [ "$PROVIDER" != CPUExecutionProvider ] || return 0
  printf -- '--runtime nvidia '
  ask_board "getent group video render || true" | cut -d: -f3 | sed 's/.*/--group-add &/' | tr '\n' ' '
}

# Without an answer of /healthz the service is at fault, without one of /readyz the link or the base station.
wait_until_ready() {
  step "wait until it is ready"
  SECONDS=0
  wait_for healthz || roll_back "not healthy after $READY_SECONDS s"
  prune
  wait_for readyz || fail "healthy, but $SERVER has not answered after $READY_SECONDS s; on the board run: $(doctor)"
  [ -z "$DRY_RUN" ] || return 0
  echo "ready: http://127.0.0.1:$PORT/v1 on the board; to reach it from here: ssh -N -L $PORT:127.0.0.1:$PORT $HOST"
  echo "API key: $STATE/keys/api on the board"
}

# wait_for PATH: fails unless the service answers there READY_SECONDS after the start of the wait.
wait_for() {
  local address=127.0.0.1:$PORT python=$STATE/venv/bin/python
  if [ "$ENGINE" = docker ]; then
    address=127.0.0.1:8080 python="docker exec edgedraft-device python3"
  fi
  local probe="$python -c \"from urllib.request import urlopen; urlopen('http://$address/$1', timeout=5)\""
  if [ -n "$DRY_RUN" ]; then
    on_board "$probe"
    return
  fi
  until ask_board "$probe" 2>/dev/null; do
    [ "$SECONDS" -lt "$READY_SECONDS" ] || return 1
    sleep 2
  done
}

doctor() {
  if [ "$ENGINE" = docker ]; then
    echo "sudo docker exec edgedraft-device edgedraft-device doctor"
  else
    echo "sudo $STATE/venv/bin/edgedraft-device doctor"
  fi
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

# at_station ARGUMENTS: runs edgedraft-basestation where the keys are.
at_station() {
  if [ -n "$STATION" ]; then
    # shellcheck disable=SC2029 # the command is for the base station's shell
    ssh "$STATION" "$STATION_COMMAND $1" </dev/null
  else
    bash -ec "$STATION_COMMAND $1" </dev/null
  fi
}

run() {
  show "here: $*" || "$@"
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
