"""In which form the images of an episode are kept between its two passes, and how many fit.

Between extraction and training an episode's images may stay in host memory: as pixels, or encoded
again as JPEG where pixels do not fit. What finds no room is decoded twice.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from protoclip_jax.data.decoding import UnreadableImage, load
from protoclip_jax.data.kept import Keep, KeptPairs, Pair, size_of
from protoclip_jax.data.sources import PairSource, read_pair

AUTO = "auto"
_SAMPLE = 32  # images whose size is measured
_FORMS = ("pixels", "jpeg")  # by preference: pixels cost no decoding


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """What of an episode one process keeps.

    Attributes:
        form: "pixels", "jpeg" or "none".
        images: Images of an episode that this process reads.
        needed: Bytes of all of them in this form, estimated.
        budget: Bytes that may be used.
    """

    form: str
    images: int
    needed: int
    budget: int

    @property
    def share(self) -> float:
        """Of the images, how many fit."""
        return min(1.0, self.budget / self.needed) if self.needed else 1.0

    def lines(self) -> list[str]:
        """What a person should know before the first episode; nothing without a cache."""
        if self.form == "none" or not self.images:
            return []
        needed, given = f"{self.needed / 1e9:.3g} GB", f"data.keep_gigabytes={self.budget / 1e9:g}"
        lines = [
            f"image cache: {self.form}, about {needed} of {given} for an episode's "
            f"{self.images:,} images"
        ]
        if self.share < 1:
            lines = [
                f"warning: the image cache holds about {self.share:.0%} of an episode's "
                f"{self.images:,} images: as {self.form} they need {needed}, {given}. The rest is "
                "decoded twice: raise data.keep_gigabytes where the host has the memory"
            ]
        free = free_memory()
        if free is not None and min(self.needed, self.budget) > free:
            lines.append(
                f"warning: the image cache may take {min(self.needed, self.budget) / 1e9:.3g} GB, "
                f"and {free / 1e9:.3g} GB of host memory are free: lower data.keep_gigabytes"
            )
        return lines


def plan(wanted: str, images: int, bytes_each: dict[str, float], budget: int) -> CachePlan:
    """Chooses the form.

    Args:
        wanted: A form, or "auto": pixels where an episode's images fit, else JPEG.
        images: Images of an episode that a process reads.
        bytes_each: Bytes of one image by form, as `measured` gives them.
        budget: Bytes that may be used.
    """
    if wanted == AUTO:
        fits = (form for form in _FORMS if images * bytes_each[form] <= budget)
        wanted = next(fits, min(_FORMS, key=bytes_each.__getitem__))
    if wanted == "none":
        return CachePlan("none", images, 0, budget)
    return CachePlan(wanted, images, int(images * bytes_each[wanted]), budget)


def measured(source: PairSource, side: int, *, parity: bool = False) -> dict[str, float]:
    """Mean bytes of a kept image by form, from a few images spread over the source.

    Args:
        source: The pairs.
        side: Shorter side of a kept image.
        parity: Decode as the reference does.
    """
    rows = np.unique(np.linspace(0, len(source) - 1, _SAMPLE).astype(np.int64)).tolist()
    caches = {form: KeptPairs(Keep(form, side)) for form in _FORMS}

    def sizes(row: int) -> list[int] | None:
        try:
            data, caption = read_pair(source, row)
            image = load(data, parity=parity)
            return [size_of(Pair(cache.form(image), caption, row)) for cache in caches.values()]
        except UnreadableImage:
            return None

    with ThreadPoolExecutor(8) as pool:
        found = [one for one in pool.map(sizes, rows) if one is not None]
    # Where none of the sample can be read, a square image of three channels stands for all.
    means = np.mean(found, axis=0) if found else [3.0 * side * side, 0.3 * side * side]
    return dict(zip(_FORMS, map(float, means), strict=True))


def free_memory() -> int | None:
    """Bytes of host memory that are free for this process, its container's limit included."""
    found = []
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(1024 * int(fields["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        return None
    root = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            found.append(int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):  # another version of cgroups, or no limit ("max")
            continue
    return max(0, min(found))
