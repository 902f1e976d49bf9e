#!/usr/bin/env bash
# Runs N processes of one training run on this machine:  bash launch/local.sh N [trainer arguments]
#   bash launch/local.sh 2 --config=configs/quickstart.py --workdir=runs/two
# For trying out several processes, or one process a GPU; one process drives all GPUs as well.
# Needs: .venv (bash launch/quickstart.sh makes it; PYTHON=... names another Python).
#   ONE_GPU_EACH=1   process i sees GPU i only
#   PORT=29400       where process 0 listens; not given: the first free one from 29400 on
#   RESTARTS=3       how often at most all start again (exit codes 75 and 76, death by a signal)
#   GRACE=120        seconds that the others have to leave after the first has failed
# Relative paths are relative to the checkout. Ctrl-C or SIGTERM reaches all: they save and leave with
# 75; the same command goes on. A second Ctrl-C ends them at once (130).
# Exit codes: README. The one of the process that decides for all.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
# shellcheck source=launch/exit_codes.sh
. launch/exit_codes.sh
say() { echo "local.sh: $*" >&2; }
refuse() {
  say "$@"
  exit 2
}

count=${1:-}
case $count in
  '' | *[!0-9]* | 0*) refuse "how many processes? bash launch/local.sh N [trainer arguments]" ;;
esac
shift
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null ||
  refuse "$python is missing: bash launch/quickstart.sh makes .venv; PYTHON=... names another Python"

in_use() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
port() {
  local candidate=${PORT:-29400}
  while in_use "$candidate"; do
    [ -z "${PORT:-}" ] && [ "$candidate" -lt 29500 ] ||
      refuse "port $candidate is in use: another run? PORT=... names a free one"
    candidate=$((candidate + 1))
  done
  port=$candidate
}

pids=() codes=() asked='' started=''
# Each signal reaches each process once; later ones of the terminal as well: the second ends them.
hand_on() {
  asked=1
  [ -z "$started" ] || kill "-$1" "${pids[@]}" 2>/dev/null
}
trap 'hand_on TERM' TERM HUP
trap 'hand_on INT' INT

start() {
  local i
  pids=() codes=() started=''
  port
  # A group of its own for each: the terminal's Ctrl-C comes to this script alone, and a process
  # that has to be ended takes its workers along.
  set -m
  for ((i = 0; i < count; i++)); do
    if [ -n "${ONE_GPU_EACH:-}" ]; then export CUDA_VISIBLE_DEVICES=$i; fi
    "$python" -m protoclip_jax.main --coordinator="127.0.0.1:$port" --num_processes="$count" \
      --process_id="$i" "$@" </dev/null &
    pids+=($!)
  done
  set +m
  [ -z "$asked" ] || kill -TERM "${pids[@]}" 2>/dev/null
  started=1
}

finish() {
  local i left=$count deadline=''
  while [ "$left" -gt 0 ]; do
    for i in "${!pids[@]}"; do
      if [ -n "${codes[i]:-}" ] || kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
      wait "${pids[i]}" 2>/dev/null
      codes[i]=$?
      left=$((left - 1))
      if [ "${codes[i]}" -ne 0 ]; then
        say "process $i $(told "${codes[i]}")"
        [ -n "$deadline" ] || deadline=$((SECONDS + ${GRACE:-120}))
      fi
      # Workers of a killed process would keep the memory that the next start needs.
      kill -KILL -- "-${pids[i]}" 2>/dev/null
    done
    if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then
      for i in "${!pids[@]}"; do
        [ -z "${codes[i]:-}" ] || continue
        say "process $i is still there ${GRACE:-120} s after another failed: ending it"
        kill -KILL -- "-${pids[i]}" 2>/dev/null
      done
      deadline=$((SECONDS + 5))
    fi
    [ "$left" -eq 0 ] || sleep 0.1
  done
}

for ((restart = 0; ; restart++)); do
  start "$@"
  finish
  code=$(decisive "${codes[@]}")
  if ! again "$code" || [ -n "$asked" ]; then exit "$code"; fi
  if [ "$restart" -ge "${RESTARTS:-3}" ]; then
    say "gave up after $restart restarts"
    exit "$code"
  fi
  say "all start again, from the last checkpoint ($((restart + 1)) of at most ${RESTARTS:-3} times)"
done
