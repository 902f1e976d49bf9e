#!/usr/bin/env bash
# Trains on a TPU slice:  NAME=clip ZONE=us-central2-b TYPE=v4-32 bash launch/tpu_pod.sh \
#     --config=configs/cc3m.py --workdir=/mnt/runs/cc3m --config.data.train=/mnt/data/cc3m
# Creates the slice or reuses it, copies what git tracks of this checkout, installs, starts the same
# command on every worker, follows the log of worker 0, and after a preemption makes the slice anew
# and goes on. The run does not need the connection: it goes on when that is lost, or after Ctrl-C
# here, and this script follows it again, as does the same command when it is started a second time.
# Needs: gcloud, logged in, with a project and TPU quota. A slice costs money until it is deleted:
#     gcloud compute tpus tpu-vm delete NAME --zone=ZONE
# The workdir must be one folder for all workers: Filestore, or a bucket mounted with gcsfuse, which
#   SETUP='sudo mount ...'        can do on every worker, before the install
#   VERSION=tpu-ubuntu2204-base   software of the slice (default: by TYPE)
#   PYTHON=python3.11             a worker's Python, 3.11 or later (default: python3)
#   SPOT=1                        cheaper, may be preempted
#   RESTARTS=20                   how often at most all start again (exit codes: README)
#   STOP=1                        the run saves and leaves with 75; nothing is started again
#   TRIES=60                      minutes to try what fails (no capacity, no connection)
#   GRACE=300                     seconds that the others have to leave after the first
#   DRY_RUN=1                     prints the commands instead
# The install line of a worker is: pip install -r requirements.txt "jax[tpu]"
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
# shellcheck source=launch/exit_codes.sh
. launch/exit_codes.sh
say() { echo "tpu_pod.sh: $*" >&2; }
refuse() {
  say "$@"
  exit 2
}
for needed in NAME ZONE TYPE; do
  [ -n "${!needed:-}" ] || refuse "$needed=... is missing: NAME, ZONE and TYPE say which slice"
done
case $TYPE in
  v6e-*) version=v2-alpha-tpuv6e ;;
  v5p-*) version=v2-alpha-tpuv5 ;;
  v5litepod-*) version=v2-alpha-tpuv5-lite ;;
  *) version=tpu-ubuntu2204-base ;;
esac
[ -n "${DRY_RUN:-}" ] || command -v gcloud >/dev/null || refuse "gcloud is missing"
temp=$(mktemp -d) || exit 1
answers=$temp/answers archive=$temp/protoclip_jax.tar.gz
trap 'rm -rf "$temp"' EXIT
leave() {
  say "if the run had started, it goes on by itself: the same command follows it, STOP=1 stops it"
  exit "$1"
}
trap 'leave 130' INT
trap 'leave 143' TERM

run() { if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@" && echo; else "$@"; fi; }
tpu() { run gcloud compute tpus tpu-vm "$@" --zone="$ZONE"; }
nap() { sleep "${PAUSE:-$1}"; }
# Arguments as the shell of a worker reads them. An empty list is one of no words, not of one.
quoted() { [ $# -eq 0 ] || printf ' %q' "$@"; }

# Runs a command on all workers; what each printed is a file in $answers. gcloud runs a command again
# when the connection broke while it ran, so that every command here may be repeated.
everywhere() {
  rm -rf "$answers" && mkdir "$answers"
  tpu ssh "$NAME" --worker=all --command="$1" --output-directory="$answers"
}
worker() { echo "VENV=../protoclip_jax.venv bash protoclip_jax/launch/worker.sh$(quoted "$@")"; }
# "RUN STATE" of each worker that has answered.
states() { cat "$answers"/* 2>/dev/null | sed -n 's/^protoclip_jax-run //p'; }

# The archive is made once: what starts again is the same code, whatever is edited meanwhile.
pack() {
  local file list=$temp/list
  if [ "$(git rev-parse --show-toplevel 2>/dev/null)" = "$(pwd -P)" ]; then
    git ls-files --others --exclude-standard configs protoclip_jax launch >"$temp/untracked"
    while IFS= read -r file; do
      case " $* " in
        *"$file"*) refuse "$file is not copied, since git does not track it: git add $file" ;;
      esac
      say "not copied, since git does not track it: $file"
    done <"$temp/untracked"
    git ls-files -z
  else
    say "no git checkout: only configs, launch, protoclip_jax and requirements.txt are copied"
    find configs launch protoclip_jax requirements.txt -name __pycache__ -prune -o -type f -print0
  fi >"$temp/all" || return 1
  while IFS= read -r -d '' file; do
    # Tracked, but deleted here.
    if [ -e "$file" ] || [ -L "$file" ]; then printf '%s\0' "$file"; fi
  done <"$temp/all" >"$list"
  COPYFILE_DISABLE=1 tar --null -czf "$archive" -T "$list"
}

# State of the slice, or nothing where there is none; fails where that cannot be asked.
slice_state() {
  gcloud compute tpus tpu-vm list --zone="$ZONE" --format='value(name,state)' >"$temp/slices" ||
    return 1
  local node state
  while read -r node state; do
    [ "${node##*/}" != "$NAME" ] || echo "$state"
  done <"$temp/slices"
}

create() {
  set -- "$NAME" --accelerator-type="$TYPE" --version="${VERSION:-$version}"
  [ -z "${SPOT:-}" ] || set -- "$@" --spot
  tpu create "$@"
}

# Waits until the slice is there; makes it, or makes it anew after a preemption.
ready() {
  local try state
  for ((try = 0; try <= ${TRIES:-60}; try++)); do
    [ "$try" -eq 0 ] || nap 60
    state=$(slice_state) || continue
    case $state in
      READY) return ;;
      '') ! create || return 0 ;;
      PREEMPTED | TERMINATED)
        say "$NAME is $state: making it anew"
        tpu delete "$NAME" --quiet && create && return
        ;;
      STOPPED) refuse "$NAME is stopped: gcloud compute tpus tpu-vm start $NAME --zone=$ZONE" ;;
      *) say "$NAME is $state: waiting" ;;
    esac
  done
  say "gave up: there is no slice"
  exit 1
}

# A folder of its own for each version of the code, beside one environment: nothing changes under a
# trainer that runs.
install() {
  local file code unpack
  code=protoclip_jax-$(cksum <"$archive" | cut -d ' ' -f 1)
  unpack="[ -d $code ] || { mkdir $code.\$\$ && tar -xzf $code.tar.gz -C $code.\$\$ &&\
 { mv -T $code.\$\$ $code || [ -d $code ]; }; }"
  rm -rf "$answers"
  tpu scp "$archive" "$NAME:$code.tar.gz" --worker=all &&
    { [ -z "${SETUP:-}" ] || everywhere "$SETUP"; } &&
    everywhere "{ $unpack; } && ln -sfnT $code protoclip_jax &&\
 ${PYTHON:+PYTHON=$PYTHON }$(worker install)" &&
    return
  for file in "$answers"/*; do
    if [ -f "$file" ] && ! grep -q '^worker.sh: installed' "$file"; then
      say "worker $(basename "$file" .log) said at last:"
      tail -n 5 "$file" >&2
    fi
  done
  return 1
}

other_command() { refuse "$NAME runs another command; STOP=1 makes that save and leave"; }

# Starts $run on all workers. Worker 0 is first: where two scripts start at the same time, it runs the
# run of one of them, and both go on with that one.
start() {
  tpu ssh "$NAME" --worker=0 --command="$(worker start "$run" --distributed "$@")" >"$temp/first" ||
    return 1
  run_of_first=$(sed -n 's/^protoclip_jax-run \([^ ]*\) .*/\1/p' "$temp/first" | tail -n 1)
  [ -n "$run_of_first" ] || return 1
  run=$run_of_first
  [ "${run%%-*}" = "$digest" ] || other_command
  everywhere "$(worker start "$run" --distributed "$@")"
}

# Prints what is new in the log of worker 0. A connection that was lost begins again at some byte.
show() {
  local line LC_ALL=C
  while IFS= read -r line; do
    case $line in 'protoclip_jax-log '*)
      at=${line#* }
      continue
      ;;
    esac
    at=$((at + ${#line} + 1))
    if [ "$at" -gt "$seen" ]; then
      printf '%s\n' "$line"
      seen=$at
      echo "$seen" >"$temp/seen"
    fi
  done
}

# Follows $run until it has ended on all workers; `code` decides. Fails where nobody can be asked.
follow() {
  local try=0 deadline='' state
  echo 0 >"$temp/seen"
  while :; do
    seen=$(cat "$temp/seen") at=0
    tpu ssh "$NAME" --worker=0 --ssh-flag=-oServerAliveInterval=30 \
      --command="$(worker follow "$run" "$seen" "${FOLLOW:-600}")" 2>>"$temp/errors" | show
    if ! everywhere "$(worker status "$run")" >>"$temp/errors" 2>&1 || [ -z "$(states)" ]; then
      if state=$(slice_state) && [ "$state" != READY ]; then
        say "$NAME is ${state:-gone}"
        code=137 stopped=''
        return
      fi
      tail -n 1 "$temp/errors" >&2
      try=$((try + 1))
      [ "$try" -le "${TRIES:-60}" ] || return 1
      say "not all workers can be asked; the run goes on by itself: asking again in a minute"
      nap 60
      continue
    fi
    : >"$temp/errors"
    try=0 codes=() running='' failed='' stopped=''
    while read -r _ state word; do
      case $state in
        running) running=1 ;;
        none) codes+=(137) failed=1 ;; # a worker that was made anew
        *)
          codes+=("$state")
          [ "$state" -eq 0 ] || failed=1
          [ -z "$word" ] || stopped=1
          ;;
      esac
    done < <(states)
    if [ -z "$running" ]; then
      code=$(decisive "${codes[@]}")
      return
    fi
    if [ -n "$failed" ]; then
      [ -n "$deadline" ] || deadline=$((SECONDS + ${GRACE:-300}))
      if [ "$SECONDS" -ge "$deadline" ]; then
        say "some workers still run ${GRACE:-300} s after another failed: ending them"
        everywhere "$(worker end "$run")" >>"$temp/errors" 2>&1
      fi
    fi
    nap 5
  done
}

if [ -n "${STOP:-}" ]; then
  [ "$(slice_state)" = READY ] || refuse "$NAME is not there: nothing to stop"
  everywhere "$(worker stop)" || refuse "not all workers could be told"
  states
  exit 0
fi

digest=$(quoted "$@" | cksum | cut -d ' ' -f 1)
pack "$@" || refuse "packing the checkout failed"
if [ -n "${DRY_RUN:-}" ]; then
  create
  install
  everywhere "$(worker start "$digest-1" --distributed "$@")"
  exit 0
fi

restart=0 installs=0
while :; do
  ready
  run=''
  # A slice that was just made has no worker.sh yet.
  if ! everywhere "if [ -f protoclip_jax/launch/worker.sh ]; then $(worker status); fi" \
    >"$temp/errors" 2>&1; then
    tail -n 1 "$temp/errors" >&2
    installs=$((installs + 1))
    [ "$installs" -le "${TRIES:-60}" ] || refuse "gave up: the workers cannot be reached"
    nap 60
    continue
  fi
  run=$(states | sed -n 's/^\([^ ]*\) running.*/\1/p' | head -n 1)
  if [ -n "$run" ]; then
    [ "${run%%-*}" = "$digest" ] || other_command
    say "the run is on: following it"
    start "$@" # where the first start did not come to all workers
  else
    run=$digest-$(date +%s)-$restart
    if ! { install && start "$@"; }; then
      installs=$((installs + 1))
      [ "$installs" -lt 3 ] || refuse "gave up: it could not be installed and started on all workers"
      nap 60
      continue
    fi
  fi
  installs=0
  if ! follow; then
    say "gave up asking; the run goes on by itself: the same command follows it again"
    exit 76
  fi
  [ "$code" -eq 0 ] || say "the run $(told "$code")"
  if ! again "$code" || [ -n "$stopped" ]; then exit "$code"; fi
  if [ "$restart" -ge "${RESTARTS:-20}" ]; then
    say "gave up after $restart restarts"
    exit "$code"
  fi
  restart=$((restart + 1))
  say "all start again, from the last checkpoint ($restart of at most ${RESTARTS:-20} times)"
done
