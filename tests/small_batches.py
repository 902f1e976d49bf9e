"""Batches of small images, for tests of sources and of what reads them."""

import numpy as np

from protoclip_jax.data.augmentation import augmentation_named
from protoclip_jax.data.kept import Keep
from protoclip_jax.data.pipeline import Batches
from protoclip_jax.data.reader import Reading
from protoclip_jax.data.tokenizer import Tokenizer
from protoclip_jax.data.walk import Section, Walk

SIZE = 24


class Shuffled:
    """Rows of an episode: as many as wanted of a source's, in an order of its own."""

    def __init__(self, pairs: int, size: int):
        self.pairs, self.size = pairs, size

    def __call__(self, episode: int) -> np.ndarray:
        rng = np.random.default_rng([episode, 99])
        return rng.permutation(np.arange(self.size) % self.pairs)


def open_batches(source, **options):
    """An iterator with small settings: passes of one kind over some episodes, or `sections`."""
    size = options.setdefault("size", len(source))
    settings = {
        "kind": "train",
        "episodes": [0, 1],
        "batch": 4,
        "start": (0, 0),
        "augmentation": "none",
        "rows_of_episode": Shuffled(len(source), size),
        "keep": Keep(),
        "workers": 0,
        "threads": 2,
        "seed": 7,
        "image_size": SIZE,
        "share": (0, 1),
        "unreadable": None,
        "sections": None,
    } | options
    get = settings.__getitem__
    positions = size if get("kind") == "extract" else size // get("batch") * get("batch")
    first, step = get("start")
    sections = get("sections") or [
        Section(get("kind"), episode, positions, step if number == 0 else 0)
        for number, episode in enumerate(get("episodes")[first:])
    ]
    how = augmentation_named(get("augmentation"))
    # Dealt like cards: the rows of a process need not be neighbours.
    process, processes = get("share")
    rows = np.arange(process, get("batch"), processes)
    return Batches(
        Walk(sections, get("batch"), workers=get("workers"), rows=rows),
        Reading(
            source=source,
            tokenizer=Tokenizer(16),
            rows_of_episode=get("rows_of_episode"),
            size=size,
            seed=get("seed"),
            image_size=get("image_size"),
            augmentation={"train": how, "extract": how},
            parity=False,
            keep=get("keep"),
        ),
        workers=get("workers"),
        threads=get("threads"),
        unreadable=get("unreadable"),
    )
