"""Makes the batches of a walk by number: reads, decodes, crops, tokenizes.

Everything in a batch is a function of (seed, episode, position) alone: not of the number of
processes, workers or threads, nor of what is kept in memory or where a run begins.
"""

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from protoclip_jax.data.augmentation import Augmentation, training_crop
from protoclip_jax.data.decoding import BROKEN, REASONS, UnreadableImage, evaluation_crop, load
from protoclip_jax.data.image_warnings import caught
from protoclip_jax.data.kept import Keep, KeptPairs, Pair, opened
from protoclip_jax.data.seen_files import SourceError
from protoclip_jax.data.sources import PairSource, read_pair, where
from protoclip_jax.data.unreadable import odd_code
from protoclip_jax.data.walk import PASSES, Walk

# Pairs tried for one position. Where half of a source is unreadable, one position in 4 billion
# finds no pair.
TRIES = 32

_SUBSTITUTE = 2  # keeps the substitutes' random numbers apart from those of the passes

Fault = tuple[int, int]  # row, number of the reason; below 0: of what is odd (`odd_code`)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How pairs become rows of a batch.

    Attributes:
      source: the pairs.
      tokenizer: captions to rows of ids.
      rows_of_episode: pair ids of an episode by position; a pure function. Workers get a pickled
        copy, so it must not hold on to devices.
      size: positions of an episode.
      seed: of augmentation and substitutes.
      image_size: side of the square pictures.
      augmentation: of each pass; only its crop and flip happen here. None: the evaluation crop.
      parity: decode as the reference does.
      keep: pictures kept between the passes; the budget is that of one reader.
    """

    source: PairSource
    tokenizer: Callable[[Sequence[str]], Int[np.ndarray, "n t"]]
    rows_of_episode: Callable[[int], Int[np.ndarray, " size"]]
    size: int
    seed: int
    image_size: int
    augmentation: Mapping[str, Augmentation | None]
    parity: bool
    keep: Keep


class BatchReader:
    """The random-access source that grain reads.

    Pickles without its threads and kept pictures; each worker process has its own.
    """

    def __init__(self, walk: Walk, reading: Reading, threads: int):
        self._walk, self._reading, self._threads = walk, reading, threads
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._rows: dict[int, Int[np.ndarray, " size"]] = {}
        self._kept = KeptPairs(self._reading.keep)
        self._pool = ThreadPoolExecutor(self._threads) if self._threads > 1 else None

    def __getstate__(self):
        return self._walk, self._reading, self._threads

    def __setstate__(self, state):
        self._walk, self._reading, self._threads = state
        self._start()

    def __repr__(self) -> str:
        return f"BatchReader({self._reading.source.name})"

    def __len__(self) -> int:
        return len(self._walk)

    def close(self) -> None:
        """Ends the decoding threads."""
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def __getitem__(self, index: int) -> dict:
        """The batch of a number; an empty dict where the number stands for nothing."""
        place = self._walk.locate(int(index))
        if place is None:
            return {}
        section, step = place
        if section.kind == "extract":
            self._kept.forget_before(section.episode)
        positions = self._walk.positions(step)
        valid = positions < section.positions
        size = self._reading.image_size
        images = np.zeros((len(positions), size, size, 3), np.uint8)
        rows = np.full(len(positions), -1, np.int64)
        captions = [""] * len(positions)
        faults: list[Fault] = []
        ahead = self._ahead(int(index)) if section.kind == "train" else []

        def fill(at: int) -> int:
            place = section.episode, int(positions[at])
            if valid[at]:
                pair, images[at], roomless = self._made(section.kind, *place, faults)
                captions[at], rows[at] = pair.caption, pair.row
            else:
                roomless = 0
            for episode, upcoming in ahead:
                if upcoming[at] >= 0 and self._kept.room():
                    self._prepare(episode, int(upcoming[at]), faults)
            return roomless

        run = self._pool.map if self._pool else map
        # Consumed so that an error in a thread is raised here.
        roomless = sum(run(fill, range(len(positions))))
        return {
            "image": images,
            "tokens": self._reading.tokenizer(captions),
            "position": positions,
            "episode": section.episode,
            "kind": PASSES[section.kind],
            "valid": valid,
            "row": rows,
            "unreadable": np.array(faults, np.int64).reshape(-1, 2),
            "roomless": roomless,
        }

    def _ahead(self, index: int) -> list[tuple[int, Int[np.ndarray, " b"]]]:
        """Episode and positions (-1: none) to decode beside a training batch, for later."""
        upcoming = self._walk.ahead(index)
        if upcoming is None or not self._kept.room():
            return []
        section, steps = upcoming
        places = (self._walk.positions(step) for step in steps)
        return [(section.episode, np.where(p < section.positions, p, -1)) for p in places]

    def _made(
        self, kind: str, episode: int, position: int, faults: list[Fault]
    ) -> tuple[Pair, UInt8[np.ndarray, "s s 3"], int]:
        """Pair and crop of a position, and 1 if its picture ought to be kept but found no room."""
        # Extraction comes first, so training is the last to need the picture.
        find = self._kept.take if kind == "train" else self._kept.get
        pair = find(episode, position)
        if pair is not None:
            return pair, self._crop(opened(pair.picture), kind, episode, position), 0
        pair, pixels = self._first_readable(episode, position, faults, kind)
        wanted = kind == "extract" and self._reading.keep.form != "none"
        kept = self._kept.put(episode, position, pair) if wanted else True
        return pair, pixels, int(not kept)

    def _prepare(self, episode: int, position: int, faults: list[Fault]) -> None:
        """Decodes a picture that extraction will ask for."""
        if self._kept.get(episode, position) is None:
            pair, _ = self._first_readable(episode, position, faults)
            self._kept.put(episode, position, pair)

    def _first_readable(
        self, episode: int, position: int, faults: list[Fault], kind: str | None = None
    ) -> tuple[Pair, UInt8[np.ndarray, "s s 3"] | None]:
        """The first readable pair of a position's candidates, and the crop of a pass if wanted.

        Raises:
          SourceError: none of them is readable, or the source has changed.
        """
        reading = self._reading
        row = int(self._rows_of(episode)[position])
        substitutes = None
        for _ in range(TRIES):
            try:
                data, caption = read_pair(reading.source, row)
                with caught() as odd:
                    made = self._decoded(data, caption, row, kind, episode, position)
                faults.extend((row, odd_code(what)) for what in odd)
                return made
            except UnreadableImage as error:
                faults.append((row, REASONS.index(error.reason)))
                last = f"{where(reading.source, row)} ({error})"
            if substitutes is None:
                substitutes = np.random.default_rng([reading.seed, episode, _SUBSTITUTE, position])
            row = int(substitutes.integers(len(reading.source)))
        raise SourceError(
            f"{reading.source.name}: {TRIES} pairs in a row cannot be read, the last is {last}: "
            "check that the pictures are still there"
        )

    def _decoded(
        self, data: bytes, caption: str, row: int, kind: str | None, episode: int, position: int
    ) -> tuple[Pair, UInt8[np.ndarray, "s s 3"] | None]:
        image = load(data, parity=self._reading.parity)
        try:
            pair = Pair(self._kept.form(image), caption, row)
            if kind is None:
                return pair, None
            return pair, self._crop(opened(pair.picture), kind, episode, position)
        except Exception as error:  # resizing rare modes fails in rare ways
            raise UnreadableImage(BROKEN, f"{type(error).__name__}: {error}") from error

    def _crop(
        self, image: Image.Image, kind: str, episode: int, position: int
    ) -> UInt8[np.ndarray, "s s 3"]:
        reading, how = self._reading, self._reading.augmentation[kind]
        if how is None:
            return evaluation_crop(image, reading.image_size, exact=reading.parity)
        rng = np.random.default_rng([reading.seed, episode, PASSES[kind], position])
        return training_crop(image, rng, reading.image_size, how.scale, how.ratio, how.flip)

    def _rows_of(self, episode: int) -> Int[np.ndarray, " size"]:
        with self._lock:  # one permutation is enough, and two episodes are in work at a time
            if episode not in self._rows:
                latest = list(self._rows.items())[-1:]
                rows = self._reading.rows_of_episode(episode)
                self._rows = dict([*latest, (episode, rows)])
            return self._rows[episode]
