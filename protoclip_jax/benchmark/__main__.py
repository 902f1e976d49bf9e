"""Measures the speed of a part on this machine, beside a peer where one is installed.

  python -m protoclip_jax.benchmark kmeans
  python -m protoclip_jax.benchmark step --config=configs/quickstart.py

A table is printed, or with --json the numbers. Times are medians of repeats in which the
contenders take turns, so that a busy machine slows all of them. Nothing is asserted.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence

from protoclip_jax.benchmark import arguments as common
from protoclip_jax.storage.screen import show_any_text

# XLA's chatter would stand between the lines of the table; errors still show.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# A benchmark is a module of this package with `add_arguments(parser)` and `run(options)`, which
# returns a `report.Report`. Only the named one is imported: a wrong option answers at once.
BENCHMARKS = {
    "kmeans": "clustering an episode, against faiss",
    "step": "one training step of a recipe, against open_clip in torch",
    "episode": "an episode of ProtoCLIP, offline and online, against one of CLIP",
    "input": "reading, decoding and cropping pictures, against plain Pillow",
    "check": "this machine's accelerator: right, and as fast as it should be",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"protoclip_jax: {message} ({self.prog} --help)\n")


def build_parser(wanted: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the options of the benchmarks that `wanted` names."""
    parser = _Parser(
        prog="python -m protoclip_jax.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, summary in BENCHMARKS.items():
        one = names.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if name in wanted:
            _module(name).add_arguments(one)
            one.add_argument("--json", action="store_true", help="print the numbers as JSON")
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; what starts with --config. lies in `overrides`."""
    parser = build_parser(arguments)
    options, rest = parser.parse_known_args(arguments)
    options.overrides = common.overrides(rest) if hasattr(options, "config") else []
    unknown = [text for text in rest if text not in options.overrides]
    if unknown:
        parser.error(f"{options.benchmark} has no option {unknown[0]}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the report's exit code, or 2 for what cannot be measured."""
    show_any_text()
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        report = _module(options.benchmark).run(options)
    except (ValueError, OSError) as error:
        print(f"protoclip_jax: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report.numbers, indent=1) if options.json else report.text())
    return report.code


def _module(name: str):
    return importlib.import_module(f"protoclip_jax.benchmark.{name}")


if __name__ == "__main__":
    sys.exit(main())
