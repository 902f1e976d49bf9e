#!/usr/bin/env bash
# What runs on each worker of a TPU slice or of a cluster job (tpu_pod.sh and gke.yaml call it):
#   worker.sh install               makes .venv with JAX for the accelerator
#   worker.sh train [arguments]     trains; SIGTERM saves and leaves with 75
#   ACCELERATOR=tpu|cuda12|cpu      default: tpu
#   VENV=.venv                      the environment's folder
# Needs: Python 3.11 or later with venv (PYTHON=python3.11 names it).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
case "${1:-}" in
  install)
    accelerator=${ACCELERATOR:-tpu}
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    packages=(-r requirements.txt)
    [ "$accelerator" = cpu ] || packages+=("jax[$accelerator]")
    "$venv/bin/python" -m pip install --quiet "${packages[@]}"
    ;;
  train)
    shift
    # exec: signals reach the trainer itself.
    exec "$venv/bin/python" -m protoclip_jax.main "$@"
    ;;
  *)
    sed -n '2,7p' "$0" >&2
    exit 2
    ;;
esac
