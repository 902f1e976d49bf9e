"""The options of commands that read pairs: the same names, help and meaning in each."""

import argparse
import sys

from protoclip_jax.data import typed_values
from protoclip_jax.data.sources import PairSource, needless_limit, open_source

WHAT = (
    "a pair list (.tsv), a folder of `prepare convert` or of .tar shards, tfds:NAME, "
    "emoji_text/train: as data.train"
)

_NAMES = (
    "image_column",
    "caption_column",
    "separator",
    "image_root",
    "split",
    "image_feature",
    "text_feature",
    "limit",
    "seed",
)


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """All options of `open_source`."""
    group = parser.add_argument_group("which pairs, as in the recipe's data section")
    group.add_argument("--image-column", default="filepath", help="default: filepath")
    group.add_argument("--caption-column", default="title", help="default: title")
    group.add_argument(
        "--separator",
        type=typed_values.separator,
        default="\t",
        help="one character; default: a tab",
    )
    group.add_argument(
        "--image-root",
        type=typed_values.place,
        help="folder of relative paths; default: the list's own",
    )
    group.add_argument("--split", default="train", help="of a TFDS set; default: train")
    group.add_argument("--image-feature", default="image", help="of a TFDS set; default: image")
    group.add_argument("--text-feature", default="caption", help="of a TFDS set; default: caption")
    group.add_argument(
        "--limit", type=typed_values.above_zero, help="only a random subset of so many pairs"
    )
    group.add_argument(
        "--seed", type=typed_values.not_negative, default=0, help="of that subset; default: 0"
    )


def chosen_source(options: argparse.Namespace) -> PairSource:
    """Opens `options.source` with the options; tells of a limit that limits nothing.

    Raises:
      ValueError: no such kind of source, or one that cannot be used.
      FileNotFoundError: no such file.
    """
    source = open_source(options.source, **{name: getattr(options, name) for name in _NAMES})
    if line := needless_limit(len(source), options.limit):
        print(f"protoclip_jax: --limit={options.limit}: {line}", file=sys.stderr)
    return source
