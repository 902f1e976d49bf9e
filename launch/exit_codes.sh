#!/usr/bin/env bash
# What the exit codes of the trainer mean to whoever starts it: local.sh, slurm.sbatch, tpu_pod.sh and
# worker.sh read this file; gke.yaml says the same in its podFailurePolicy.
# Needs: bash 3.2 or later.

# Whether the same command should be started again after this exit code: it saved and left on a
# signal (75), another process of the run was lost (76), or a signal ended it (128 + its number).
# Not after 130: somebody interrupted it. What no table knows is not mended by another start.
again() {
  [ "$1" -eq 75 ] || [ "$1" -eq 76 ] || { [ "$1" -gt 128 ] && [ "$1" -le 192 ] && [ "$1" -ne 130 ]; }
}

# Of the exit codes of a run's processes, the one that decides for all: the first that must not be
# started again, else the death that the others tell of, else 76, 75, 0.
decisive() {
  local code worst=0
  for code in "$@"; do
    if [ "$code" -ne 0 ] && ! again "$code"; then
      echo "$code"
      return
    fi
    [ "$code" -le "$worst" ] || worst=$code
  done
  echo "$worst"
}

# An exit code in words.
told() {
  if [ "$1" -gt 128 ] && [ "$1" -le 192 ] && [ "$1" -ne 130 ]; then
    echo "was ended by signal $(($1 - 128))"
  else
    echo "left with exit code $1"
  fi
}

# Waits for a child until its end, and returns its exit code. A signal that the script handles ends
# `wait` early, so every handler says so: heard=1.
await() {
  local code next
  heard=
  wait "$1"
  code=$?
  while [ -n "$heard" ]; do
    heard=
    wait "$1"
    next=$?
    # 127: it had ended already, and the first answer was its own.
    [ "$next" -eq 127 ] || code=$next
  done
  return "$code"
}
