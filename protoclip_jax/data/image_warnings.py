"""What Pillow warns of in pictures that can be used all the same: caught, to be told in our words.

Pillow warns in its own lines, one for every picture, in every thread and worker process. Here they
become kinds that can be counted; warnings of anything else are shown as before.
"""

import contextlib
import re
import threading
import warnings
from collections.abc import Iterator

NOTES = "damaged notes of the camera (EXIF)"
PALETTE = "transparency noted in an old way"
SERIES = "a damaged series of pictures, of which the first is taken"
PIXELS = "very many pixels"
ODD = "something odd"

# The position of a kind in this tuple is how worker processes report it.
KINDS = (NOTES, PALETTE, SERIES, PIXELS, ODD)

_WORDS = (
    (PALETTE, re.compile("transparency", re.IGNORECASE)),
    (SERIES, re.compile("MPO|APNG")),
    (PIXELS, re.compile("decompression bomb", re.IGNORECASE)),
    (NOTES, re.compile("exif|metadata|tag|truncated file read|ifd", re.IGNORECASE)),
)
_FILTER = ("always", None, UserWarning, re.compile(r"PIL\."), 0)  # as `warnings` keeps them

_local = threading.local()
_lock = threading.Lock()
_shown_before = warnings.showwarning
_shown: set[tuple] = set()  # of Pillow's warnings for others, each of which is shown once


@contextlib.contextmanager
def caught() -> Iterator[set[str]]:
    """Collects the kinds of warnings that this thread meets; within another, that one's."""
    _install()
    outer = getattr(_local, "kinds", None)
    _local.kinds = set() if outer is None else outer
    try:
        yield _local.kinds
    finally:
        _local.kinds = outer


def _install() -> None:
    """Takes its place among the handlers; other libraries set them back now and then."""
    if warnings.showwarning is _show and _FILTER in warnings.filters:
        return
    global _shown_before
    with _lock:
        if warnings.showwarning is not _show:
            _shown_before, warnings.showwarning = warnings.showwarning, _show
        if _FILTER not in warnings.filters:
            # Else a second picture with the same words would not be counted.
            warnings.filterwarnings("always", category=UserWarning, module=r"PIL\.")


def _show(message, category, filename, lineno, file=None, line=None) -> None:
    kinds = getattr(_local, "kinds", None)
    if kinds is not None and issubclass(category, (UserWarning, RuntimeWarning)):
        kinds.add(kind_of(str(message)))
        return
    if "PIL" in filename:
        same = (str(message), category, filename, lineno)
        if same in _shown:
            return
        _shown.add(same)
    _shown_before(message, category, filename, lineno, file, line)


def kind_of(message: str) -> str:
    """The kind of one of Pillow's warnings."""
    return next((kind for kind, words in _WORDS if words.search(message)), ODD)
