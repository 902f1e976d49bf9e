"""Batches of an episode's pairs, as a function of (seed, episode, position) alone.

An episode's positions are its training order: step = position // batch. Extraction walks the same
order, so the same process meets the same positions in both passes. Nothing depends on the number
of processes, workers or threads, nor on where a pass begins: there is no iterator state to save.

With `size` positions and a batch of `batch`, training takes `size // batch` steps on every process
and leaves the tail out; extraction pads the last batch (`valid` says what is real) and covers each
position exactly once. Example: 13 rows, batch 4, two processes: both train 3 steps, both extract 4
batches, of which the last holds position 12 on the first process and nothing on the second.
"""

import dataclasses
import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
from absl import flags
from jaxtyping import Int, UInt8

from protoclip_jax.data.augmentation import Augmentation, augmentation_named, training_crop
from protoclip_jax.data.decoding import (
    BROKEN,
    MISSING,
    REASONS,
    UnreadableImage,
    evaluation_crop,
    load,
)
from protoclip_jax.data.sources import PairSource, where
from protoclip_jax.data.unreadable import UnreadableLog

PASSES = {"train": 0, "extract": 1}  # the numbers that enter the random keys

# Pairs tried for one position. Where half of a source is unreadable, one position in 4 billion
# finds no pair.
TRIES = 32

_SUBSTITUTE = 2  # keeps the substitutes' random numbers apart from those of the passes


@dataclasses.dataclass(frozen=True)
class Pass:
    """One walk over some episodes, as one process sees it; see `batches` for the fields."""

    source: PairSource
    tokenizer: Callable[[Sequence[str]], Int[np.ndarray, "n t"]]
    rows_of_episode: Callable[[int], Int[np.ndarray, " size"]]
    episodes: tuple[int, ...]
    size: int
    batch: int
    kind: str
    first: int
    seed: int
    image_size: int
    augmentation: Augmentation | None
    parity: bool
    process_index: int
    process_count: int

    @property
    def local_batch(self) -> int:
        """Rows of a batch that belong to this process."""
        return self.batch // self.process_count

    @property
    def steps(self) -> int:
        """Batches of an episode."""
        return self.size // self.batch if self.kind == "train" else -(-self.size // self.batch)

    def positions(self, index: int) -> tuple[int, Int[np.ndarray, " b"]]:
        """Episode and positions of the batch `index`; positions past the episode are padding."""
        episode, step = divmod(self.first + index, self.steps)
        start = step * self.batch + self.process_index * self.local_batch
        return self.episodes[episode], np.arange(start, start + self.local_batch)


class BatchReader:
    """Makes whole batches by number: the random-access source that grain reads.

    Pickles without its threads; each worker process has its own.
    """

    def __init__(self, walk: Pass, threads: int):
        self._walk, self._threads = walk, threads
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._rows: dict[int, Int[np.ndarray, " size"]] = {}
        self._pool = ThreadPoolExecutor(self._threads) if self._threads > 1 else None

    def __getstate__(self):
        return self._walk, self._threads

    def __setstate__(self, state):
        self._walk, self._threads = state
        self._start()

    def __repr__(self) -> str:
        return f"BatchReader({self._walk.source.name}, {self._walk.kind})"

    def __len__(self) -> int:
        return max(0, len(self._walk.episodes) * self._walk.steps - self._walk.first)

    def close(self) -> None:
        """Ends the decoding threads."""
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def __getitem__(self, index: int) -> dict:
        walk = self._walk
        episode, positions = walk.positions(int(index))
        valid = positions < walk.size
        size = walk.image_size
        images = np.zeros((len(positions), size, size, 3), np.uint8)
        rows = np.full(len(positions), -1, np.int64)
        captions = [""] * len(positions)
        faults: list[tuple[int, int]] = []

        def fill(at: int) -> None:
            pair = self._pair(episode, int(positions[at]), faults)
            images[at], captions[at], rows[at] = pair

        run = self._pool.map if self._pool else map
        # Consumed so that an error in a thread is raised here.
        for _ in run(fill, np.flatnonzero(valid).tolist()):
            pass
        return {
            "image": images,
            "tokens": walk.tokenizer(captions),
            "position": positions,
            "episode": episode,
            "valid": valid,
            "row": rows,
            "unreadable": np.array(faults, np.int64).reshape(-1, 2),
        }

    def _pair(
        self, episode: int, position: int, faults: list[tuple[int, int]]
    ) -> tuple[UInt8[np.ndarray, "s s 3"], str, int]:
        """Picture, caption and row at a position: the first readable pair of its candidates."""
        walk = self._walk
        row = int(self._rows_of(episode)[position])
        substitutes = None
        for _ in range(TRIES):
            try:
                data, caption = walk.source.read(row)
                return self._picture(data, episode, position), caption, row
            except UnreadableImage as error:
                faults.append((row, REASONS.index(error.reason)))
                last = f"{where(walk.source, row)} ({error})"
            if substitutes is None:
                substitutes = np.random.default_rng([walk.seed, episode, _SUBSTITUTE, position])
            row = int(substitutes.integers(len(walk.source)))
        raise ValueError(
            f"{walk.source.name}: {TRIES} pairs in a row cannot be read, the last is {last}: "
            "check that the pictures are still there"
        )

    def _picture(self, data: bytes, episode: int, position: int) -> UInt8[np.ndarray, "s s 3"]:
        walk = self._walk
        image = load(data, parity=walk.parity)
        try:
            if walk.augmentation is None:
                return evaluation_crop(image, walk.image_size)
            rng = np.random.default_rng([walk.seed, episode, PASSES[walk.kind], position])
            how = walk.augmentation
            return training_crop(image, rng, walk.image_size, how.scale, how.ratio, how.flip)
        except Exception as error:  # resizing rare modes fails in rare ways
            raise UnreadableImage(BROKEN, f"{type(error).__name__}: {error}") from error

    def _rows_of(self, episode: int) -> Int[np.ndarray, " size"]:
        with self._lock:  # one permutation is enough, and two episodes overlap at their border
            if episode not in self._rows:
                latest = list(self._rows.items())[-1:]
                self._rows = dict([*latest, (episode, self._walk.rows_of_episode(episode))])
            return self._rows[episode]


class Batches(Iterator[dict]):
    """The iterator that `batches` returns. Close it, or use it in a `with`, when leaving early.

    Attributes:
      unreadable: what was skipped so far.
    """

    def __init__(self, reader: BatchReader, workers: int, unreadable: UnreadableLog):
        self._left = len(reader)
        self._running = _Running(reader, workers if self._left else 0)
        self.unreadable = unreadable
        # Also at the interpreter's end, where workers that are still alive would complain.
        self._end = weakref.finalize(self, self._running.close)

    def __len__(self) -> int:
        """Batches still to come."""
        return self._left

    def __next__(self) -> dict:
        if not self._left:
            self.close()
            raise StopIteration
        # Workers send arrays in shared memory, which must not outlive them.
        batch = {key: _own(value) for key, value in next(self._running.iterator).items()}
        self._left -= 1
        self.unreadable.add(batch.pop("unreadable"))
        return batch

    def close(self) -> None:
        """Ends threads and worker processes; no batch follows."""
        self._left = 0
        self._end()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _Running:
    """What has to be ended: grain's iterator and the reader's threads."""

    def __init__(self, reader: BatchReader, workers: int):
        self._reader, self._workers = reader, workers
        self.iterator = iter(_dataset(reader, workers))

    def close(self) -> None:
        self.iterator.close()
        self.iterator = None  # grain's own finaliser fails at the interpreter's end
        self._reader.close()
        if self._workers:
            gc.collect()  # a cycle in grain's iterator holds the last batch's shared memory


def _own(value: np.ndarray | int) -> np.ndarray | int:
    shared = isinstance(value, np.ndarray) and type(value) is not np.ndarray
    return np.array(value) if shared else value


def batches(
    source: PairSource,
    tokenizer: Callable[[Sequence[str]], Int[np.ndarray, "n t"]],
    rows_of_episode: Callable[[int], Int[np.ndarray, " size"]],
    *,
    episodes: Sequence[int],
    size: int,
    batch: int,
    kind: str = "train",
    start: tuple[int, int] = (0, 0),
    seed: int = 0,
    image_size: int,
    augmentation: str = "none",
    parity: bool = False,
    workers: int = 0,
    threads: int = 8,
    process_index: int = 0,
    process_count: int = 1,
    unreadable: UnreadableLog | None = None,
) -> Batches:
    """One pass over some episodes, in order, as this process sees it.

    Each process reads its own contiguous slice of every global batch. A pair that cannot be read
    is replaced by another whole pair, the first readable one of a sequence drawn from (seed,
    episode, position): the same in both passes and on any number of workers.

    Args:
      source: the pairs.
      tokenizer: captions to rows of ids.
      rows_of_episode: pair ids of an episode by position; a pure function. Workers get a pickled
        copy, so it must not hold on to devices.
      episodes: which episodes, in order.
      size: positions of an episode.
      batch: rows of a global batch.
      kind: "train" (the tail past the last whole batch is left out) or "extract" (the last batch
        is padded).
      start: where to begin: index into `episodes`, and step.
      seed: of augmentation and substitutes.
      image_size: side of the square pictures.
      augmentation: a name in `AUGMENTATIONS`; only its crop and flip happen here. "none": the
        evaluation crop.
      parity: decode as the reference does.
      workers: worker processes; 0 = decode in threads of this process.
      threads: decoding threads where there are no workers.
      process_index: which process this is.
      process_count: of how many.
      unreadable: where to count skipped pairs; none = a new log.

    Returns:
      An iterator of dicts: image uint8 (b, s, s, 3), tokens int32 (b, t), position int64 (b,),
      episode int, valid bool (b,), row int64 (b,) (the pair really used; -1 for padding), with
      b = batch / process_count.

    Raises:
      ValueError: settings that cannot work together.
    """
    if kind not in PASSES:
        raise ValueError(f"kind {kind!r} is unknown: use one of {', '.join(PASSES)}")
    if batch % process_count:
        raise ValueError(f"a batch of {batch} does not divide over {process_count} processes")
    walk = Pass(
        source,
        tokenizer,
        rows_of_episode,
        tuple(int(episode) for episode in episodes),
        size,
        batch,
        kind,
        0,
        seed,
        image_size,
        augmentation_named(augmentation),
        parity,
        process_index,
        process_count,
    )
    if not walk.steps:
        raise ValueError(f"an episode of {size} positions is smaller than one batch of {batch}")
    walk = dataclasses.replace(walk, first=start[0] * walk.steps + start[1])
    reader = BatchReader(walk, 1 if workers else threads)
    log = UnreadableLog(source) if unreadable is None else unreadable
    return Batches(reader, workers, log)


def _dataset(reader: BatchReader, workers: int) -> grain.IterDataset:
    batches_by_number = grain.MapDataset.source(reader)
    if not workers:
        # Two batches at a time, so that the decoding threads have work across the border.
        return batches_by_number.to_iter_dataset(grain.ReadOptions(2, 2))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers look at them, and this may be a library
    return batches_by_number.to_iter_dataset(grain.ReadOptions(0, 0)).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    )


def check_start(
    source: PairSource, sample: int = 64, limit: float = 0.5, *, parity: bool = False
) -> float:
    """Reads a few pictures spread over the source, before anything expensive starts.

    Returns:
      The share that cannot be read.

    Raises:
      ValueError: it is larger than `limit`, or nothing can be read; with examples.
    """
    rows = np.unique(np.linspace(0, len(source) - 1, sample).astype(np.int64)).tolist()
    with ThreadPoolExecutor(8) as pool:
        errors = list(pool.map(functools.partial(_fault, source, parity), rows))
    bad = [(row, error) for row, error in zip(rows, errors, strict=True) if error]
    if not bad:
        return 0.0
    if all(error is not None and error.reason == MISSING for error in errors):
        raise ValueError(
            f"none of the {len(rows)} pictures tried exists, the first is "
            f"{where(source, rows[0])}: set image_root to the folder where relative paths start"
        )
    share = len(bad) / len(rows)
    if share > limit or len(bad) == len(rows):
        examples = "; ".join(f"{where(source, row)} ({error})" for row, error in bad[:3])
        raise ValueError(
            f"{len(bad)} of {len(rows)} pictures tried cannot be read, more than the allowed "
            f"share of {limit:g} (max_unreadable): {examples}"
        )
    return share


def _fault(source: PairSource, parity: bool, row: int) -> UnreadableImage | None:
    try:
        load(source.read(row)[0], parity=parity)
    except UnreadableImage as error:
        return error
    return None
