#!/usr/bin/env bash
# Trains ProtoCLIP on the embedded EmojiText in under 5 minutes on 2 CPU cores.
# Needs: Python 3.11 or later with venv. Makes .venv, installs requirements.txt, trains.
# Arguments go to the trainer:  bash launch/quickstart.sh --config.episode.count=4
# PYTHON=python3.12 chooses the Python; WORKDIR=runs/x another folder.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ ! -x .venv/bin/python ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or later is needed; PYTHON=python3.12 bash $0 chooses another" >&2
    exit 1
  }
  "$python" -m venv .venv
fi
# Installs only when requirements.txt has changed since the last time.
if ! cmp -s requirements.txt .venv/installed-requirements.txt; then
  .venv/bin/python -m pip install --quiet --upgrade pip
  .venv/bin/python -m pip install --quiet -r requirements.txt
  cp requirements.txt .venv/installed-requirements.txt
fi
exec .venv/bin/python -m protoclip_jax.main --config=configs/quickstart.py \
  --workdir="${WORKDIR:-runs/quickstart}" "$@"
