#!/usr/bin/env bash
# Runs N processes of one training run on this machine:  bash launch/local.sh N [trainer arguments]
#   bash launch/local.sh 2 --config=configs/quickstart.py --workdir=runs/two
# For trying out several processes, or one process a GPU; one process drives all GPUs as well.
# Needs: .venv (bash launch/quickstart.sh makes it; PYTHON=... names another Python).
#   ONE_GPU_EACH=1   process i sees GPU i only
#   PORT=29400       where process 0 listens
# Ends with the first exit code that is not 0. Ctrl-C or SIGTERM reaches all: they save and leave
# with 75; the same command goes on.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
count=${1:?how many processes? See the head of this file}
shift
python=${PYTHON:-.venv/bin/python} port=${PORT:-29400} pids=()
for ((i = 0; i < count; i++)); do
  if [ -n "${ONE_GPU_EACH:-}" ]; then export CUDA_VISIBLE_DEVICES=$i; fi
  "$python" -m protoclip_jax.main --coordinator="127.0.0.1:$port" --num_processes="$count" \
    --process_id="$i" "$@" &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
code=0
for pid in "${pids[@]}"; do
  wait "$pid"
  status=$?
  # A signal ends `wait` early: wait for the process itself.
  if [ "$status" -gt 128 ] && kill -0 "$pid" 2>/dev/null; then wait "$pid"; status=$?; fi
  [ "$code" -ne 0 ] || code=$status
done
exit "$code"
