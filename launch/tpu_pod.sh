#!/usr/bin/env bash
# Trains on a TPU slice:  NAME=clip ZONE=us-central2-b TYPE=v4-32 bash launch/tpu_pod.sh \
#     --config=configs/cc3m.py --workdir=/mnt/runs/cc3m --config.data.train=/mnt/data/cc3m
# Creates the slice or reuses it, copies this checkout, installs, starts the same command on every
# worker, follows the log of worker 0, and after a preemption makes the slice anew and goes on.
# Needs: gcloud, logged in, with a project and TPU quota. A slice costs money until it is deleted:
#     gcloud compute tpus tpu-vm delete NAME --zone=ZONE
# The workdir must be one folder for all workers: Filestore, or a bucket mounted with gcsfuse, which
#   SETUP='sudo mount ...'        can do on every worker
#   VERSION=tpu-ubuntu2204-base   software of the slice
#   SPOT=1                        cheaper, may be preempted
#   RESTARTS=20                   how often at most
#   DRY_RUN=1                     prints the commands instead
# The install line of a worker is: pip install -r requirements.txt "jax[tpu]"
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
: "${NAME:?name of the slice}" "${ZONE:?zone}" "${TYPE:?accelerator type, for example v4-32}"
spot=() && [ -n "${SPOT:-}" ] && spot=(--spot)

run() { if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@" && echo; else "$@"; fi; }
tpu() { run gcloud compute tpus tpu-vm "$@" --zone="$ZONE"; }

slice() {
  state=$(gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" --format='value(state)' \
    2>/dev/null || true)
  if [ "$state" != READY ]; then
    if [ -n "$state" ]; then tpu delete "$NAME" --quiet; fi
    tpu create "$NAME" --accelerator-type="$TYPE" --version="${VERSION:-tpu-ubuntu2204-base}" \
      "${spot[@]}" || return 1
  fi
  tar --exclude=.git --exclude='.venv*' --exclude=runs -czf /tmp/protoclip_jax.tar.gz .
  tpu scp /tmp/protoclip_jax.tar.gz "$NAME:protoclip_jax.tar.gz" --worker=all
  tpu ssh "$NAME" --worker=all --command='mkdir -p protoclip_jax &&
    tar -xzf protoclip_jax.tar.gz -C protoclip_jax && bash protoclip_jax/launch/worker.sh install'
  if [ -n "${SETUP:-}" ]; then tpu ssh "$NAME" --worker=all --command="$SETUP"; fi
}

train=$(printf '%q ' bash protoclip_jax/launch/worker.sh train --distributed "$@")
for ((attempt = 0; attempt <= ${RESTARTS:-20}; attempt++)); do
  slice || { sleep 60; continue; }
  tpu ssh "$NAME" --worker=all --command="$train"
  code=$?
  # 0: done. 1, 2: starting again would not help. Else (75, or a lost connection): preempted.
  if [ "$code" -le 2 ]; then exit "$code"; fi
  sleep 10
done
echo "gave up after ${RESTARTS:-20} restarts" >&2
exit 1
