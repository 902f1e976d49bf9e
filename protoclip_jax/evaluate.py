"""Measures a trained model: a table on the screen, and evaluation.json in its workdir.

EmojiText, which comes with the package (zero-shot, linear probe, retrieval, clusters, geometry):
  python -m protoclip_jax.evaluate --workdir=runs/quickstart

Your own pairs, from a .tsv with a picture and a caption a row (retrieval, geometry):
  python -m protoclip_jax.evaluate --workdir=runs/mine --source=pairs.tsv

Your own classes, one folder each (zero-shot; with --train-folder also a linear probe):
  python -m protoclip_jax.evaluate --workdir=runs/mine --folder=birds/test \\
      --train-folder=birds/train --names=birds/names.json --template="a photo of a {}."
  python -m protoclip_jax.evaluate --workdir=runs/mine --folder=imagenet/val \\
      --prompts=imagenet --by-position
"""

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from protoclip_jax import signals
from protoclip_jax.data import typed_values
from protoclip_jax.data.source_options import WHAT, add_source_options, chosen_source
from protoclip_jax.data.tfds_pairs import is_tfds
from protoclip_jax.idle_options import LISTS
from protoclip_jax.storage import objects
from protoclip_jax.storage.atomic import write_json
from protoclip_jax.storage.paths import AnyPath, check_writable, workdir_at
from protoclip_jax.storage.screen import cut_off, show_any_text

# The rest is imported late where it takes seconds: --help and a wrong option answer at once.

EMOJI_TEXT = "emoji_text"
RECORD = "evaluation.json"
Metrics = dict[str, float]

# Where options are of no effect, what is there where they act, and which; all others always act.
ACT_ALWAYS = ("workdir", "source", "folder", "batch")
ACT_WITH: tuple[tuple[str, Callable[[argparse.Namespace], bool], tuple[str, ...]], ...] = (
    (
        "without --folder=IMAGES",
        lambda options: options.folder is not None,
        ("train_folder", "names", "prompts", "template", "by_position"),
    ),
    (
        "without --source=LIST.tsv",
        lambda options: _pairs(options).lower().endswith(LISTS),
        ("image_column", "caption_column", "separator", "image_root"),
    ),
    (
        "without --source=tfds:NAME",
        lambda options: is_tfds(_pairs(options)),
        ("split", "image_feature", "text_feature"),
    ),
    ("without --source=PAIRS", lambda options: _pairs(options) != "", ("limit", "seed")),
    ("without --limit", lambda options: options.limit is not None, ("seed",)),
    (
        "without --names or --prompts",
        lambda options: options.names is not None or options.prompts is not None,
        ("by_position",),
    ),
    (
        "beside both --names and --template",
        lambda options: options.names is None or options.template is None,
        ("prompts",),
    ),
)


def build_parser() -> argparse.ArgumentParser:
    """All options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m protoclip_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--workdir",
        required=True,
        type=typed_values.place,
        help="folder of a training run, or gs://...",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--source",
        type=typed_values.place,
        default=EMOJI_TEXT,
        help=f"emoji_text (default), or {WHAT}",
    )
    what.add_argument(
        "--folder", type=typed_values.path, help="test pictures, one sub-folder a class"
    )
    add_source_options(parser)
    folder = parser.add_argument_group("with --folder")
    folder.add_argument(
        "--train-folder", type=typed_values.path, help="pictures to fit a linear probe on"
    )
    folder.add_argument(
        "--names",
        type=typed_values.path,
        help="class names: .json {folder: name}, or a list, one name a line, that holds every "
        "folder's name; default: the folder names",
    )
    folder.add_argument("--prompts", help="names and templates of a published set, e.g. cifar10")
    folder.add_argument(
        "--template",
        action="append",
        help="prompt; {} takes the class name; give it several times to average several",
    )
    folder.add_argument(
        "--by-position",
        action="store_true",
        help="the i-th name belongs to the i-th folder, in the order of numbers or letters; "
        "default: match by name",
    )
    parser.add_argument(
        "--batch",
        type=typed_values.above_zero,
        default=256,
        help="pictures at a time; default: 256",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0, or 2 for what cannot be evaluated.

    As a program it also ends with 75 after SIGTERM and with 130 after SIGINT.
    """
    show_any_text()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    parser = build_parser()
    options = parser.parse_args(arguments)
    # Over a namespace without defaults, so that a default that is given counts as given.
    empty = argparse.Namespace(**dict.fromkeys(vars(options)))
    given = vars(parser.parse_args(arguments, empty))
    try:
        refuse_idle(options, {name: value for name, value in given.items() if value is not None})
        options.workdir = workdir_at(options.workdir)
        if not options.workdir.is_dir():
            raise ValueError(f"{options.workdir} is not a folder: give the --workdir of a run")
        recorded(options.workdir)  # where it cannot be read, nothing is measured in vain
        check_writable(options.workdir)
        title, metrics, chance = measure(options)
        try:
            print_table(options, metrics, chance)
        finally:  # also where nobody reads the table any more
            path = record(options.workdir, title, metrics, chance)
        print(f"\nwrote {path}", flush=True)
    except BrokenPipeError:
        return cut_off()
    except (ValueError, OSError) as error:
        print(f"protoclip_jax: {error}", file=sys.stderr)
        return 2
    return 0


def refuse_idle(options: argparse.Namespace, given: Collection[str]) -> None:
    """Refuses options that cannot act on what is measured.

    Args:
      options: all of them.
      given: names of those that the command line has.

    Raises:
      ValueError: names the option, and what it needs.
    """
    for where, there, names in ACT_WITH:
        idle = [f"--{name.replace('_', '-')}" for name in names if name in given]
        if idle and not there(options):
            raise ValueError(f"{', '.join(idle)}: of no effect {where}")


def _pairs(options: argparse.Namespace) -> str:
    """The pairs of one's own that are measured; empty for a folder, and for EmojiText."""
    own = options.folder is None and options.source != EMOJI_TEXT
    return options.source if own else ""


def measure(options: argparse.Namespace) -> tuple[str, Metrics, Metrics]:
    """What was evaluated, its metrics, and the chance levels."""
    if options.folder is not None:
        return _measure_folder(options)
    if options.source == EMOJI_TEXT:
        from protoclip_jax.data.emoji_text import EmojiText
        from protoclip_jax.evaluation import suite

        encoder = _load(options.workdir)
        sources = [EmojiText(split) for split in ("train", "test", "val")]
        settings = suite.SuiteSettings(batch=options.batch)
        metrics = suite.evaluate(encoder, *sources, settings)
        return EMOJI_TEXT, metrics, suite.chance(*sources, settings)
    from protoclip_jax.evaluation.pairs import evaluate_pairs

    source = chosen_source(options)
    metrics, chance = evaluate_pairs(_load(options.workdir), source, batch=options.batch)
    return options.source, metrics, chance


def _measure_folder(options: argparse.Namespace) -> tuple[str, Metrics, Metrics]:
    from protoclip_jax.evaluation.folders import evaluate_folder, folder_chance, open_folder
    from protoclip_jax.evaluation.prompts import prompt_set

    names, templates = options.names, options.template or ["{}"]
    if options.prompts is not None:
        published = prompt_set(options.prompts)
        names = published.names if names is None else names
        templates = options.template or published.templates
    roots = [options.folder] + ([options.train_folder] if options.train_folder else [])
    test, *train = (
        open_folder(root, names, also=roots, by_position=options.by_position) for root in roots
    )
    train = train[0] if train else None
    metrics = evaluate_folder(
        _load(options.workdir), test, templates, train=train, batch=options.batch
    )
    return str(options.folder), metrics, folder_chance(test, train)


def _load(workdir: AnyPath):
    from protoclip_jax import load

    return load(workdir)


def print_table(options: argparse.Namespace, metrics: Metrics, chance: Metrics) -> None:
    """Prints the metrics beside chance and, for EmojiText, the run's untrained model."""
    from protoclip_jax.evaluation.table import comparison_table

    columns = {"trained": metrics}
    if options.folder is None and options.source == EMOJI_TEXT:
        untrained = untrained_metrics(options.workdir)
        columns = ({"untrained": untrained} if untrained else {}) | columns
    print(comparison_table(columns, chance))


def untrained_metrics(workdir: AnyPath) -> Metrics:
    """The evaluation of the run at step 0, from its metrics.jsonl; empty if there was none."""
    from protoclip_jax.training.logging import read_metrics

    for line in read_metrics(workdir):
        if "zero_shot/top1" in line:
            values = {name: value for name, value in line.items() if isinstance(value, float)}
            return values if line.get("step") == 0 else {}
    return {}


def record(workdir: AnyPath, title: str, metrics: Metrics, chance: Metrics) -> AnyPath:
    """Adds an evaluation to the workdir's evaluation.json, in place of an older one of its name.

    The file is {what: {"metrics": {...}, "chance": {...}}}; values that are not finite are null.
    """
    path, known = workdir / RECORD, recorded(workdir)
    known[title] = {"metrics": _finite(metrics), "chance": _finite(chance)}
    write_json(path, known)
    return path


def recorded(workdir: AnyPath) -> dict[str, Any]:
    """The evaluations that the workdir's evaluation.json holds; none where there is no such file.

    Raises:
      ValueError: the file is damaged.
    """
    path = workdir / RECORD
    try:
        known = json.loads(objects.read_text(path))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(_damaged(path, " ".join(str(error).split())[:100])) from None
    if not isinstance(known, dict):
        raise ValueError(_damaged(path, f"it holds a {type(known).__name__}"))
    return known


def _damaged(path: AnyPath, what: str) -> str:
    return f"{path} is damaged ({what}): mend it or move it away, and a new one is written"


def _finite(values: Metrics) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


if __name__ == "__main__":
    sys.exit(signals.program(main))
