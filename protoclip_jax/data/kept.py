"""Pictures that are decoded once: kept in host memory between the two passes of an episode."""

import dataclasses
import io
import threading
from typing import NamedTuple

from PIL import Image

from protoclip_jax.data.decoding import shrunk

FORMS = ("none", "pixels", "jpeg")

_QUALITY = 95
_OVERHEAD = 400  # bytes of the Python objects around a picture and its caption


@dataclasses.dataclass(frozen=True)
class Keep:
    """In what form pictures are kept, and how many.

    Attributes:
      form: "pixels" (uint8), "jpeg" (re-encoded: less memory, and another decoding), or "none":
        both passes read the source.
      side: shorter side of a kept picture; smaller ones stay as they are.
      budget: bytes; what finds no room is read twice.
    """

    form: str = "none"
    side: int = 256
    budget: int = 0


class Pair(NamedTuple):
    """A readable pair: its picture in the form in which it is kept, caption and row."""

    picture: Image.Image | bytes
    caption: str
    row: int


class KeptPairs:
    """Pairs by (episode, position) under a budget; safe for threads.

    Crops are made from the kept form whether or not there was room for it, so no number of a run
    depends on the budget or on the number of workers.
    """

    def __init__(self, keep: Keep):
        self._keep = keep
        self._lock = threading.Lock()
        self._pairs: dict[tuple[int, int], Pair] = {}
        self.bytes = 0

    def form(self, image: Image.Image) -> Image.Image | bytes:
        """A decoded picture as it is kept."""
        if self._keep.form == "none":
            return image
        image = shrunk(image, self._keep.side)
        if self._keep.form == "pixels":
            return image
        file = io.BytesIO()
        image.save(file, "JPEG", quality=_QUALITY)
        return file.getvalue()

    def room(self) -> bool:
        """Whether another picture may be kept."""
        return self._keep.form != "none" and self.bytes < self._keep.budget

    def put(self, episode: int, position: int, pair: Pair) -> bool:
        """Keeps a pair where there is room; returns whether there was."""
        size = size_of(pair)
        with self._lock:
            if (episode, position) in self._pairs:
                return True
            if self._keep.form == "none" or self.bytes + size > self._keep.budget:
                return False
            self._pairs[episode, position] = pair
            self.bytes += size
            return True

    def get(self, episode: int, position: int) -> Pair | None:
        """A kept pair, which stays."""
        return self._pairs.get((episode, position))

    def take(self, episode: int, position: int) -> Pair | None:
        """A kept pair, whose room becomes free."""
        with self._lock:
            pair = self._pairs.pop((episode, position), None)
            if pair is not None:
                self.bytes -= size_of(pair)
            return pair

    def forget_before(self, episode: int) -> None:
        """Drops what earlier episodes left behind: positions past their last whole batch."""
        with self._lock:
            for key in [key for key in self._pairs if key[0] < episode]:
                self.bytes -= size_of(self._pairs.pop(key))


def opened(picture: Image.Image | bytes) -> Image.Image:
    """A kept picture, decoded."""
    if isinstance(picture, bytes):
        picture = Image.open(io.BytesIO(picture))
        picture.load()
    return picture


def size_of(pair: Pair) -> int:
    """Bytes that a kept pair takes."""
    picture = pair.picture
    if isinstance(picture, bytes):
        return len(picture) + _OVERHEAD
    return picture.width * picture.height * len(picture.getbands()) + _OVERHEAD
