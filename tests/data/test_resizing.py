"""The fast resize beside Pillow's."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from protoclip_jax.data import resizing
from protoclip_jax.data.resizing import resized


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise over a slope: sharp edges and clipping everywhere."""
    noise = np.random.default_rng([width, height]).normal(0, 80, (height, width, 3))
    slope = np.linspace(0, 255, width)[None, :, None]
    return Image.fromarray(np.clip(noise + slope, 0, 255).astype(np.uint8)).convert(mode)


def pillow(image: Image.Image, width: int, height: int) -> np.ndarray:
    """Rows first: left to itself, Pillow chooses the order by the sizes."""
    for size in ((width, image.height), (width, height)):
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image)


SHAPES = [(480, 360, 299, 224), (500, 375, 224, 224), (37, 61, 224, 224), (1, 900, 64, 64)]
SHAPES += [(20, 40, 32, 32), (40, 20, 32, 32)]  # wider and lower, narrower and higher
SHAPES += [(3000, 2200, 349, 256)]  # more than one of Pillow's memory blocks


@pytest.mark.skipif(resizing.simd is None, reason="no wheel for this machine")
def test_the_library_is_in_use(monkeypatch):
    monkeypatch.setattr(Image.Image, "resize", None)
    assert resized(picture(30, 20), 8, 8).size == (8, 8)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(("width", "height", "to_width", "to_height"), SHAPES)
def test_pixels_are_pillows_to_two_levels(mode, width, height, to_width, to_height):
    image = picture(width, height, mode)
    result = resized(image, to_width, to_height)
    assert (result.mode, result.size) == (mode, (to_width, to_height))
    expected = pillow(image, to_width, to_height)
    difference = np.abs(np.asarray(result).astype(int) - expected)
    # Each of the two passes rounds to eight bits.
    assert difference.max() <= 2
    assert difference.mean() < 0.25


@pytest.mark.parametrize("mode", ["RGBA", "F", "LA"])
def test_other_modes_are_pillows_own(mode):
    image = picture(50, 40).convert("L" if mode == "F" else "RGB").convert(mode)
    np.testing.assert_array_equal(resized(image, 20, 30), pillow(image, 20, 30))


def test_without_the_library_it_is_pillow(monkeypatch):
    monkeypatch.setattr(resizing, "simd", None)
    image = picture(50, 40)
    for size in ((20, 30), (64, 20)):
        np.testing.assert_array_equal(resized(image, *size), pillow(image, *size))


def test_threads_do_not_disturb_each_other():
    images = [picture(200 + at, 150) for at in range(64)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda image: np.asarray(resized(image, 64, 48)), images))
    for image, result in zip(images, together, strict=True):
        np.testing.assert_array_equal(result, resized(image, 64, 48))
