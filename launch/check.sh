#!/usr/bin/env bash
# Checks this machine's accelerator:  bash launch/check.sh [--small] [--minutes 6] [--parts a,b]
# What it does: devices and versions; the tests marked `accelerator`; the quickstart's three phases in
#   float32 and bfloat16 against a CPU's recorded numbers; k-means, training steps of RN50, ViT-B-32
#   and ViT-B-16 at the largest batch that fits, and an episode with 20,000 prototypes; goals of an
#   H100 beside the numbers, with a profile where one is missed. Prints JSON in a line and a table;
#   the JSON also lies in OUT/check.json.
# Takes: at most 6 minutes on one GPU (--minutes). Without an accelerator, or with --small, the same
#   at small sizes: a minute or more, most of it for the compiler.
# Needs: Python 3.11 or later with requirements.txt and pytest installed, and JAX for the
#   accelerator. A part whose package is missing says so, and the others run.
# Exit code: 0; 1 a part failed or was ended by its time (not where a goal is missed); 2 wrong use.
#   PYTHON=...   the Python; else .venv, else python3
#   OUT=folder   for check.json; default runs/check
#   WHEELS=...   folder of wheels (default .wheels): what of them is not installed goes into a
#                temporary folder for this check, without a network
# For a machine without a network, elsewhere beforehand:  bash launch/check.sh --collect
#   downloads what is seldom installed beside JAX (about 20 MB) to WHEELS, for Python 3.12 on Linux
#   x86_64 (FOR_PYTHON=3.11 for another). Copy that folder with the code.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-} wheels=${WHEELS:-.wheels}
if [ -z "$python" ]; then
  python=python3
  [ ! -x .venv/bin/python ] || python=.venv/bin/python
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "Python 3.11 or later is needed; PYTHON=python3.12 bash $0 chooses another" >&2
  exit 2
}

if [ "${1:-}" = --collect ]; then
  # What is not in requirements.txt is needed by what is, or by the tests (beartype).
  names=(array-record beartype clu cykooz-resizer dm-tree docstring-parser etils ftfy
    googleapis-common-protos grain immutabledict importlib-resources ml_collections portpicker
    simple-parsing tensorboardX tensorflow-datasets tensorflow-metadata termcolor tokenizers toml
    wcwidth)
  platforms=()
  for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
  done
  mkdir -p "$wheels"
  # Bounds of versions are those of requirements.txt; constraints know no extras.
  sed 's/\[.*\]//' requirements.txt > "$wheels/constraints.txt"
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
    --python-version "${FOR_PYTHON:-3.12}" "${platforms[@]}" -c "$wheels/constraints.txt" \
    -d "$wheels" "${names[@]}"
  # There is no wheel of it to download; it is all Python.
  "$python" -m pip wheel --quiet --no-deps -w "$wheels" promise
  rm "$wheels/constraints.txt"
  du -sh "$wheels"
  exit
fi

packages='' check=("$python" -m protoclip_jax.benchmark check)
if [ -d "$wheels" ]; then
  # Of each package one file, and none where it is installed already.
  missing=$("$python" - "$wheels" << 'END'
import sys
from importlib import metadata
from pathlib import Path

found = {path.name.split("-")[0]: path for path in sorted(Path(sys.argv[1]).glob("*.whl"))}
for name, path in found.items():
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        print(path)
END
  )
  if [ -n "$missing" ]; then
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    xargs -d '\n' "$python" -m pip install --quiet --no-index --no-deps --no-compile \
      --no-cache-dir --disable-pip-version-check --target "$packages" <<< "$missing" || {
      echo "the packages in $wheels do not fit $("$python" --version): see --collect" >&2
      exit 2
    }
    export PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH}
  fi
fi
check+=(--out "${OUT:-runs/check}/check.json" "$@")
[ -n "$packages" ] || exec "${check[@]}"
# Not exec: the folder goes when it has ended, also by a signal.
"${check[@]}" &
pid=$!
trap 'kill -TERM "$pid" 2>/dev/null' INT TERM
code=0
wait "$pid" || code=$?
while kill -0 "$pid" 2>/dev/null; do  # a signal ends `wait` early
  code=0
  wait "$pid" || code=$?
done
exit "$code"
