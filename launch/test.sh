#!/usr/bin/env bash
# Runs the tests:  bash launch/test.sh [--slow] [--python python3.12] [--core] [pytest arguments]
#   --slow          also those that take long
#   --core          only the quickstart, golden and checkpoint tests, the long ones included
#   --python NAME   another Python, in an environment of its own (.venv-NAME) with the newest
#                   supported versions
# Needs: Python 3.11 or later with venv, 2 cores, 8 GB.
set -euo pipefail
cd "$(dirname "$0")/.."
python=python3 venv=.venv arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --python) python=$2 venv=.venv-$(basename "$2") && shift ;;
    --core) arguments+=(--slow -m core) ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
# pyenv's shim refuses a version that is installed but not chosen.
if ! "$python" --version >/dev/null 2>&1 && command -v pyenv >/dev/null; then
  PYENV_VERSION=$(pyenv versions --bare | grep "^${python#python}\." | tail -n 1)
  export PYENV_VERSION
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
if ! cat requirements.txt pyproject.toml | cmp -s - "$venv/installed-tests.txt"; then
  "$venv/bin/python" -m pip install --quiet --upgrade pip
  "$venv/bin/python" -m pip install --quiet -r requirements.txt --group test
  cat requirements.txt pyproject.toml > "$venv/installed-tests.txt"
fi
# Two processes: most of the time goes to the compiler, which uses little more than one core.
exec "$venv/bin/python" -m pytest -n 2 --dist worksteal "${arguments[@]}"
