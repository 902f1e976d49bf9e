"""What somebody meant who named an option or a flag that there is not."""

import difflib
from collections.abc import Collection, Iterable

# Words that people bring from elsewhere, and ours for the same.
MEANINGS = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "decay": "weight_decay",
    "bs": "batch",
    "batchsize": "batch",
    "minibatch": "batch",
    "epoch": "count",
    "epochs": "count",
    "episodes": "count",
    "cluster": "prototypes",
    "clusters": "prototypes",
    "centroids": "prototypes",
    "k": "prototypes",
    "prototype": "prototypes",
    "temp": "temperature",
    "tau": "temperature",
    "eps": "epsilon",
    "clipping": "clip_norm",
    "accum": "accumulate",
    "accumulation": "accumulate",
    "dim": "width",
    "dims": "width",
    "dimension": "width",
    "hid": "hidden",
    "precision": "dtype",
    "type": "dtype",
    "arch": "name",
    "architecture": "name",
    "backbone": "name",
    "preset": "name",
    "pretrained": "weights",
    "init": "weights",
    "remat": "rematerialise",
    "rematerialize": "rematerialise",
    "checkpointing": "rematerialise",
    "path": "train",
    "list": "train",
    "source": "train",
    "dataset": "train",
    "sep": "separator",
    "delimiter": "separator",
    "delim": "separator",
    "img": "image",
    "root": "image_root",
    "subset": "limit",
    "cache": "keep",
    "augment": "augmentation",
    "aug": "augmentation",
    "processes": "workers",
    "freq": "every",
    "frequency": "every",
    "interval": "every",
    "wandb": "wandb_project",
    "tb": "tensorboard",
    "shard": "fsdp",
    "shards": "fsdp",
    "pbt": "back_translation",
    "iters": "iterations",
    "niter": "iterations",
    "nredo": "redos",
    "redo": "redos",
}
SECTIONS = {
    "optim": "optimizer",
    "opt": "optimizer",
    "train": "optimizer",
    "training": "optimizer",
    "dataset": "data",
    "eval": "evaluation",
    "ckpt": "checkpoint",
    "loss": "objective",
    "kmeans": "episode",
    "proto": "episode",
}
# Words that tell nothing of which option is meant.
_EMPTY = {"n", "num", "number", "of", "the", "size", "value", "max", "total", "grad", "gradient"}
# Typed, or made of two hyphens by a word processor.
DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"

_SURE, _LIKELY = 0.8, 0.6
_MOST = 3


def nearest(path: str, options: Iterable[str]) -> list[str]:
    """The options that a wrong name comes nearest to, the likeliest first; up to three.

    Those of the section that was named go first, then the same name in another section.

    Args:
      path: as it was given, such as "optimizer.lr".
      options: all there are, as dotted paths.
    """
    options = list(options)
    sections = {option.rpartition(".")[0] for option in options} - {""}
    section, name = _split(path.strip(".").lower().replace("-", "_"), sections)
    own = [option for option in options if option.rpartition(".")[0] == section]
    best, inside = _best(name, own) if section else (0.0, [])
    same = [option for option in options if _leaf(option) in (name, "_".join(_words(name)))]
    if best >= _SURE:
        return list(dict.fromkeys([*inside, *same]))[:_MOST]
    if same:
        return same[:_MOST]
    if best >= _LIKELY:
        return inside[:_MOST]
    best, anywhere = _best(name, options)
    return anywhere[:_MOST] if best >= _LIKELY else []


def _split(path: str, sections: Collection[str]) -> tuple[str | None, str]:
    """The section that a path names, in whatever spelling, and the rest."""
    before, dot, name = path.rpartition(".")
    if dot:
        return _section(before, sections, 0.6), name
    first, underscore, rest = path.partition("_")
    section = _section(first, sections, 0.75) if underscore else None
    return (section, rest) if section else (None, path)


def _section(text: str, sections: Collection[str], cutoff: float) -> str | None:
    near = difflib.get_close_matches(SECTIONS.get(text, text), sections, n=1, cutoff=cutoff)
    return near[0] if near else None


def _best(name: str, options: Collection[str]) -> tuple[float, list[str]]:
    """The highest likeness, and all options that have it."""
    scores = {option: _likeness(name, _leaf(option)) for option in options}
    best = max(scores.values(), default=0.0)
    return best, [option for option, score in scores.items() if score == best]


def _likeness(name: str, leaf: str) -> float:
    """Of two names, in letters or in words, from 0 to 1."""
    mine, theirs = set(_words(name)), set(leaf.split("_"))
    shared = len(mine & theirs)
    in_words = 2 * shared / (len(mine) + len(theirs)) if shared else 0.0
    if mine and mine <= theirs:
        in_words = max(in_words, _SURE)
    return max(in_words, difflib.SequenceMatcher(None, name, leaf).ratio())


def _words(name: str) -> list[str]:
    """The words of a name in our vocabulary, without those that tell nothing."""
    words = [word for word in name.split("_") if word not in _EMPTY]
    translated = "_".join(MEANINGS.get(word, word) for word in words)
    return list(dict.fromkeys(translated.split("_"))) if translated else []


def _leaf(option: str) -> str:
    return option.rpartition(".")[2]


def no_such_option(path: str, options: Iterable[str]) -> str:
    """The message for an option that there is not."""
    return f"there is no option config.{path}{_did_you_mean(nearest(path, options))}"


def _did_you_mean(found: list[str]) -> str:
    if not found:
        return ""
    *others, last = [f"config.{option}" for option in found]
    return f": did you mean {', '.join(others)}{' or ' * bool(others)}{last}?"


def no_such_word(word: str, options: Collection[str], flags: Collection[str]) -> str:
    """The message for a word of a command line that is no option, with what was meant.

    Args:
      word: as it was typed: with a long dash, or one dash, or none; with or without `config.`.
      options: all options of a recipe, as dotted paths.
      flags: all flags of the command.
    """
    name, equals, value = word.lstrip(DASHES).partition("=")
    path = name.removeprefix("config.")
    value = equals + value
    if path in options:
        return f"{word} is no option: write --config.{path}{value or '=VALUE'}"
    if name in flags:
        return f"{word} is no option: write --{name}{value}"
    near_flags = difflib.get_close_matches(name, flags, n=1, cutoff=0.75)
    if near_flags and "." not in name:
        return f"{word} is no option: did you mean --{near_flags[0]}{value}?"
    found = nearest(path, options) if equals or "." in name or word != name else []
    if found:
        return f"{word} is no option: did you mean --config.{found[0]}{value or '=VALUE'}?"
    return f"{word} is no option: options are --NAME=VALUE and --config.SECTION.NAME=VALUE"
