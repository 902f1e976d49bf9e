#!/usr/bin/env bash
# What runs on each worker of a TPU slice or of a cluster job; tpu_pod.sh, slurm.sbatch and gke.yaml
# call it:
#   worker.sh install                  makes .venv with JAX for the accelerator
#   worker.sh train [arguments]        trains; SIGTERM saves and leaves with 75
#   worker.sh record FOLDER COMMAND    runs a command; its exit code is in FOLDER/exit-N, N = SLURM_PROCID
# and for tpu_pod.sh, where a run goes on without a connection:
#   worker.sh start RUN [arguments]    trains in the background; a run is started once, however often
#                                      this is called, and never beside another one
#   worker.sh status [RUN]             "protoclip_jax-run RUN STATE", of the last run if none is named;
#                                      STATE: none, running, an exit code, and "stopped" if so asked
#   worker.sh follow RUN FROM SECONDS  its log from byte FROM on, until it ends or for so long
#   worker.sh stop                     SIGTERM to the last run: it saves and leaves
#   worker.sh end RUN                  ends what is left of it
#   ACCELERATOR=tpu|cuda12|cpu         default: tpu
#   VENV=.venv                         the environment's folder
#   RUNS=~/protoclip_jax.runs          logs and exit codes of runs
# Needs: Python 3.11 or later with venv (PYTHON=python3.11 names it); for `start` setsid and flock.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
# shellcheck source=launch/exit_codes.sh
. launch/exit_codes.sh
venv=${VENV:-.venv} runs=${RUNS:-${HOME:-.}/protoclip_jax.runs}
refuse() {
  echo "worker.sh: $*" >&2
  exit 2
}
need_venv() {
  [ -x "$venv/bin/python" ] ||
    refuse "$venv/bin/python is missing: bash launch/worker.sh install makes it; VENV=... names another"
}

install() {
  local accelerator=${ACCELERATOR:-tpu} python=${PYTHON:-python3} packages=(-r requirements.txt)
  if [ ! -x "$venv/bin/python" ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      refuse "$python is no Python 3.11 or later: PYTHON=... names one"
    "$python" -m venv "$venv" || return 1
  fi
  [ "$accelerator" = cpu ] || packages+=("jax[$accelerator]")
  "$venv/bin/python" -m pip install --quiet "${packages[@]}" && echo "worker.sh: installed"
}

# The command is a child, so that its end is seen, whatever ends it. Slurm signals this script and
# not what it started, so signals are handed on; a second SIGTERM changes nothing in the trainer.
record() {
  local folder=$1 child='' told='' code
  shift
  trap 'heard=1 told=TERM; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM
  trap 'heard=1 told=INT; [ -z "$child" ] || kill -INT "$child" 2>/dev/null' INT
  "$@" &
  child=$!
  [ -z "$told" ] || kill "-$told" "$child" 2>/dev/null
  await "$child"
  code=$?
  [ "$code" -eq 0 ] || echo "worker.sh: the process on $(hostname) $(told "$code")" >&2
  write_code "$folder" "$code"
  return "$code"
}

# Whole or not at all: a reader on another host must not see half of it.
write_code() {
  local file="$1/exit-${SLURM_PROCID:-0}"
  echo "$2" >"$file.part" && mv "$file.part" "$file"
}

last_run() { cat "$runs/last" 2>/dev/null; }

# The lock is held by the recorder and the trainer themselves: it ends with them, also in a crash of
# the machine, and no process number is mistaken for that of another process. Shared: two that ask at
# the same time do not take each other for the run.
held() { ! flock --nonblock --shared "$runs/$1/lock" true; }

state_of() {
  local folder="$runs/$1"
  if [ -z "$1" ] || [ ! -d "$folder" ]; then
    echo none
  elif [ -f "$folder/exit-0" ]; then
    cat "$folder/exit-0"
  elif held "$1"; then
    echo running
  elif [ -f "$folder/exit-0" ]; then # it ended between the two looks
    cat "$folder/exit-0"
  else
    echo 137 # it went without a word: the machine was restarted
  fi
}

status() {
  local run=${1:-} stopped=''
  [ -n "$run" ] || run=$(last_run)
  [ ! -f "$runs/$run/stopped" ] || stopped=' stopped'
  echo "protoclip_jax-run ${run:--} $(state_of "$run")$stopped"
}

# To be called only while the lock is held: else the number may be another group's by now.
signal_group() {
  local leader
  leader=$(cat "$runs/$2/leader" 2>/dev/null) && kill "-$1" -- "-$leader" 2>/dev/null
}

end_run() {
  local before
  before=$(state_of "$1")
  if [ "$before" = running ]; then
    signal_group KILL "$1"
    write_code "$runs/$1" 137
  fi
}

start() {
  local run=$1 last
  shift
  need_venv
  mkdir -p "$runs"
  exec 8>"$runs/lock"
  flock 8 # two starts at the same time: one after the other
  last=$(last_run)
  if [ "$(state_of "$last")" = running ] && [ "$last" != "$run" ]; then
    status "$last"
    return
  fi
  if [ ! -d "$runs/$run" ]; then
    # Workers that outlived the last run would keep its memory.
    if [ -d "$runs/$last" ] && [ -n "$last" ] && held "$last"; then signal_group KILL "$last"; fi
    mkdir "$runs/$run"
    echo "$run" >"$runs/last"
    exec 9>"$runs/$run/lock"
    flock 9
    # A session of its own: it outlives the connection, and nothing of a terminal reaches it.
    setsid nohup bash launch/worker.sh record "$runs/$run" "$venv/bin/python" \
      -m protoclip_jax.main "$@" </dev/null >"$runs/$run/log" 2>&1 8>&- &
    echo $! >"$runs/$run/leader"
    exec 9>&-
    # Until its session is its own, what ends this connection would end the run with it.
    for _ in {1..100}; do
      if kill -0 -- "-$!" 2>/dev/null || ! kill -0 "$!" 2>/dev/null; then break; fi
      sleep 0.02
    done
  fi
  status "$run"
}

follow() {
  local folder="$runs/$1"
  # The head says where it begins: whoever repeats this after a lost connection knows what is new.
  echo "protoclip_jax-log $2"
  timeout "$3" tail -c "+$(($2 + 1))" -f -s 0.2 --pid="$(cat "$folder/leader")" "$folder/log"
  return 0
}

stop() {
  local run
  run=$(last_run)
  if [ "$(state_of "$run")" = running ]; then
    touch "$runs/$run/stopped"
    kill -TERM "$(cat "$runs/$run/leader")"
  fi
  status "$run"
}

action=${1:-}
[ $# -eq 0 ] || shift
case $action in
  install) install ;;
  train)
    need_venv
    # exec: signals reach the trainer itself.
    exec "$venv/bin/python" -m protoclip_jax.main "$@"
    ;;
  record | start | status | follow | stop) "$action" "$@" ;;
  end) end_run "$@" ;;
  *)
    sed -n '2,21p' "$0" >&2
    exit 2
    ;;
esac
