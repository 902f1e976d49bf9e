"""What a run reads, worked out again in plain Python, NumPy and Pillow, apart from the product.

Shared with the product are random streams alone, since they have no other definition: NumPy's by
(seed, episode, purpose, position) and JAX's of the colours; and the file of the vocabulary.
"""

import colorsys
import csv
import gzip
import html
import json
import re
from functools import cache, partial
from importlib import resources
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from scipy import ndimage

EXTRACT, TRAIN = 1, 0  # the numbers of the two passes in the random streams
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
LUMA = np.array([0.299, 0.587, 0.114])


def read_list(path: Path) -> tuple[list[Path], list[str]]:
    """Images and captions of a .tsv whose columns have the default names."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file, delimiter="\t"))
    return [path.parent / line["filepath"] for line in lines], [line["title"] for line in lines]


def episode_rows(count: int, size: int, episode: int, seed: int) -> np.ndarray:
    """Rows of an episode: a slice of all permutations, one an epoch, laid end to end."""
    epochs = range((episode + 1) * size // count + 1)
    streams = (np.random.SeedSequence([seed, 0, epoch]) for epoch in epochs)
    orders = [
        np.random.RandomState(np.random.MT19937(stream)).permutation(count) for stream in streams
    ]
    return np.concatenate(orders)[episode * size : (episode + 1) * size]


# Captions.


@cache
def _vocabulary() -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    file = resources.files("protoclip_jax.data") / "assets" / "clip_tokenizer.json.gz"
    model = json.loads(gzip.decompress(file.read_bytes()))["model"]
    return model["vocab"], {tuple(pair): rank for rank, pair in enumerate(model["merges"])}


def tokens(caption: str, length: int = 77) -> list[int]:
    """Byte pairs of an ASCII caption, always the most frequent pair first."""
    vocabulary, ranks = _vocabulary()
    text, ids = html.unescape(html.unescape(caption)).lower(), []
    for word in re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+", text):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            at = pairs.index(best)
            parts[at : at + 2] = ["".join(best)]
        ids += [vocabulary[part] for part in parts]
    ids = [vocabulary["<start_of_text>"], *ids[: length - 2], vocabulary["<end_of_text>"]]
    return ids + [0] * (length - len(ids))


# Images on the host.


def resized(image: Image.Image, width: int, height: int) -> Image.Image:
    """Rows first, then columns: each pass is clipped, and Pillow chooses the order by the sizes."""
    image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def kept(image: Image.Image, side: int) -> Image.Image:
    """As it is kept between the passes: the shorter side at most `side`."""
    scale = side / min(image.size)
    if scale >= 1:
        return image
    return resized(image, *(max(side, round(n * scale)) for n in image.size))


def light_crop(
    image: Image.Image, size: int, seed: int, episode: int, purpose: int, position: int
) -> np.ndarray:
    """A random half to all of the area, ratio 3:4 to 4:3, flipped half of the time."""
    rng = np.random.default_rng([seed, episode, purpose, position])
    shares = rng.uniform(0.5, 1.0, 10)
    ratios = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 10))
    places = rng.random((10, 2))
    flipped = rng.random() < 0.5
    width, height = image.size
    for share, ratio, (x, y) in zip(shares, ratios, places, strict=True):
        w, h = (round((width * height * share * r) ** 0.5) for r in (ratio, 1 / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            break
    else:
        raise AssertionError("images of these tests have a crop that fits")
    image = resized(image.crop((left, top, left + w, top + h)), size, size)
    return np.asarray(image)[:, ::-1] if flipped else np.asarray(image)


def middle(image: Image.Image, size: int) -> np.ndarray:
    """The middle square of the image whose shorter side is made `size`."""
    short = min(image.size)
    sides = [size if n == short else int(size * n / short) for n in image.size]
    left, top = (round((n - size) / 2) for n in sides)
    image = image.resize(sides, Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + size, top + size)).convert("RGB"))


# Images on the device.


@partial(jax.jit, static_argnums=(0, 2))
def _even(seed: int, episode, purpose: int, positions) -> jax.Array:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), episode), purpose)

    def of(position):
        keys = jax.random.split(jax.random.fold_in(key, position), 8)
        return jax.vmap(lambda one: jax.random.uniform(one, (), np.float32))(keys)

    return jax.vmap(of)(positions)


def light_colours(
    images: np.ndarray, seed: int, episode: int, purpose: int, positions: np.ndarray
) -> np.ndarray:
    """Bytes to [0, 1] in float64: jitter, grey and blur, one image in five each."""
    numbers = np.float64(_even(seed, np.int32(episode), purpose, positions.astype(np.int32)))
    return np.stack(
        [_light(image / 255, draws) for image, draws in zip(images, numbers, strict=True)]
    )


def _light(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    bright, contrast, saturation = 0.2 + 1.6 * draws[:3]  # 1 - 0.8 to 1 + 0.8
    if draws[4] < 0.2:
        image = np.clip(bright * image, 0, 1)
        mean = (image @ LUMA).mean()
        image = np.clip(contrast * image + (1 - contrast) * mean, 0, 1)
        grey = (image @ LUMA)[..., None]
        image = np.clip(saturation * image + (1 - saturation) * grey, 0, 1)
        image = np.apply_along_axis(_turned, 2, image, -0.2 + 0.4 * draws[3])
    if draws[5] < 0.2:
        image = np.repeat((image @ LUMA)[..., None], 3, axis=2)
    if draws[7] < 0.2:
        sigma = 0.1 + 1.9 * draws[6]
        radius = min(10, image.shape[0] - 1)
        for axis in (0, 1):
            image = ndimage.gaussian_filter1d(image, sigma, axis, mode="mirror", radius=radius)
    return image


def _turned(pixel: np.ndarray, turn: float) -> tuple[float, float, float]:
    hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
    return colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)


def normalised(images: np.ndarray) -> np.ndarray:
    """Values in [0, 1] by CLIP's channel statistics."""
    return (images - np.array(MEAN)) / np.array(STD)
