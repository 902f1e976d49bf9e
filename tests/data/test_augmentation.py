"""Crops on the host and colours on the device: right values, and the same for the same key."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image
from scipy import ndimage

from protoclip_jax.data import augmentation as module
from protoclip_jax.data.augmentation import (
    AUGMENTATIONS,
    Colour,
    augmentation_named,
    colour,
    sample_keys,
    training_crop,
    unit,
)

LIGHT = AUGMENTATIONS["light"].colour


def coordinates(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    red = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    green = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(np.stack([red, green, 0 * red], -1).astype(np.uint8))


def pictures(count: int, size: int = 24, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).random((count, size, size, 3), np.float32))


colours = jax.jit(colour, static_argnums=2)


# Crops.


def test_names():
    assert augmentation_named("none") is None
    assert augmentation_named("clip").scale == (0.9, 1.0)
    assert augmentation_named("clip").colour is None
    assert not augmentation_named("clip").flip
    assert augmentation_named("light").scale == (0.5, 1.0)
    with pytest.raises(ValueError, match=r"'heavy' is unknown: use one of none, clip, light"):
        augmentation_named("heavy")


def test_the_whole_picture_is_a_plain_resize():
    image = coordinates(90, 90)
    crop = training_crop(image, np.random.default_rng(0), 32, (1.0, 1.0), (1.0, 1.0))
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(crop, expected, atol=1)  # two roundings of one filter


@pytest.mark.parametrize("name", ["clip", "light"])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (256, 256)])
def test_area_and_ratio_stay_in_range(name, shape):
    settings = augmentation_named(name)
    image = coordinates(*shape)
    areas, flips, lefts = [], 0, []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        crop = training_crop(image, rng, 64, settings.scale, settings.ratio, settings.flip)
        pixels = crop.astype(float) / 255
        # From the middle's slope: the edges of a bicubic resize bend.
        across = (pixels[32, 48, 0] - pixels[32, 16, 0]) * 2
        down = (pixels[48, 32, 1] - pixels[16, 32, 1]) * 2
        flips += across < 0
        areas.append(abs(across) * down)
        lefts.append(pixels[32, 32, 0])
        ratio = abs(across) * shape[0] / (down * shape[1])
        assert 0.72 < ratio < 1.38
    low, high = settings.scale
    # A picture that is longer than the longest ratio cannot be covered.
    high = min(high, 4 / 3 * min(shape) / max(shape))
    low = min(low, high)
    assert low - 0.03 < min(areas) < low + 0.05
    assert high - 0.1 < max(areas) < high + 0.03
    assert low == high or np.std(lefts) > 0.005
    assert (110 < flips < 190) if settings.flip else flips == 0


def test_flips_mirror_the_same_crop():
    image = coordinates(80, 60)
    seen = set()
    for seed in range(10):
        plain = training_crop(image, np.random.default_rng(seed), 32)
        either = training_crop(image, np.random.default_rng(seed), 32, flip=True)
        mirrored = not np.array_equal(either, plain)
        np.testing.assert_array_equal(either[:, ::-1] if mirrored else either, plain)
        seen.add(mirrored)
    assert seen == {False, True}


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (3, 2), (1000, 10)])
def test_strips_and_dots_have_a_crop(shape):
    for seed in range(20):
        crop = training_crop(coordinates(*shape), np.random.default_rng(seed), 32, (0.5, 1.0))
        assert crop.shape == (32, 32, 3)


def test_a_crop_draws_the_same_numbers_from_any_picture():
    left = []
    for shape in [(50, 50), (1, 500)]:
        rng = np.random.default_rng(0)
        training_crop(coordinates(*shape), rng, 16, flip=True)
        left.append(rng.random())
    assert left[0] == left[1]


@pytest.mark.parametrize("mode", ["L", "CMYK", "1", "P"])
def test_crops_are_rgb_last(mode):
    image = coordinates(60, 50).convert(mode)
    assert training_crop(image, np.random.default_rng(0), 16).shape == (16, 16, 3)


# Colours, one piece at a time against plain float64 or the standard library.


@pytest.mark.accelerator
def test_hue_equals_colorsys():
    image = pictures(1, 12)[0].at[0, :4].set(0.5).at[1, :4].set(0.0).at[2, :4].set(1.0)
    for turn in (-0.5, -0.2, 0.0, 0.07, 0.5):

        def turned(pixel, turn=turn):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            return colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)

        expected = np.apply_along_axis(turned, -1, np.asarray(image, np.float64))
        actual = module._turn_hue(image, jnp.float32(turn))
        np.testing.assert_allclose(actual, expected, atol=2e-6)


@pytest.mark.accelerator
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_scipy(sigma):
    image = pictures(1, 24)[0]
    expected = np.asarray(image, np.float64)
    for axis in (0, 1):
        expected = ndimage.gaussian_filter1d(expected, sigma, axis, mode="mirror", radius=10)
    actual = jax.jit(module._blur, static_argnums=2)(image, jnp.float32(sigma), 10)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_blur_of_pictures_smaller_than_its_kernel():
    image = pictures(1, 4)[0]
    out = np.asarray(module._blur(image, jnp.float32(2.0), 10))
    expected = ndimage.gaussian_filter(np.asarray(image), 2.0, mode="mirror", radius=3, axes=(0, 1))
    np.testing.assert_allclose(out, expected, atol=2e-6)


def reference_jitter(image, key, settings: Colour):
    """Brightness, contrast and saturation in float64, from the same random numbers."""
    keys = jax.random.split(key, 8)

    def factor(index, strength):
        low, high = max(0.0, 1 - strength), 1 + strength
        return float(jax.random.uniform(keys[index], (), jnp.float32, low, high))

    def grey(x):
        return (x @ np.array([0.299, 0.587, 0.114]))[..., None]

    x = np.asarray(image, np.float64)
    x = np.clip(x * factor(0, settings.brightness), 0, 1)
    share = factor(1, settings.contrast)
    x = np.clip(share * x + (1 - share) * grey(x).mean(), 0, 1)
    share = factor(2, settings.saturation)
    return np.clip(share * x + (1 - share) * grey(x), 0, 1)


@pytest.mark.accelerator
def test_jitter_equals_a_plain_reference():
    settings = Colour(jitter=1.0, brightness=0.8, contrast=0.8, saturation=0.8)
    images = pictures(16)
    keys = sample_keys(0, 0, 0, jnp.arange(16))
    actual = colours(images, keys, settings)
    for image, key, out in zip(images, keys, actual, strict=True):
        np.testing.assert_allclose(out, reference_jitter(image, key, settings), atol=3e-6)


def test_grey_is_luma():
    images = pictures(4)
    out = np.asarray(colours(images, sample_keys(0, 0, 0, jnp.arange(4)), Colour(grey=1.0)))
    luma = np.asarray(images, np.float64) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(out, np.repeat(luma[..., None], 3, -1), atol=1e-6)


def test_nothing_changes_without_probability():
    images = pictures(8)
    settings = Colour(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
    out = colours(images, sample_keys(0, 0, 0, jnp.arange(8)), settings)
    np.testing.assert_array_equal(out, images)


def test_shares_of_the_light_set():
    """Jitter, grey and blur each meet one picture in five, independently."""
    count = 1500
    images = pictures(count, 6)
    keys = sample_keys(1, 2, 0, jnp.arange(count))
    out = np.asarray(colours(images, keys, LIGHT))
    same = np.all(out == np.asarray(images), axis=(1, 2, 3)).mean()
    grey = np.all(np.abs(out - out[..., :1]) < 1e-6, axis=(1, 2, 3)).mean()
    assert abs(same - 0.8**3) < 0.05
    assert abs(grey - 0.2) < 0.04
    assert out.min() >= 0
    assert out.max() <= 1
    assert np.isfinite(out).all()


# Keys.


def test_every_ingredient_of_the_key_matters():
    def data(*ingredients, positions=(3, 4)):
        return jax.random.key_data(sample_keys(*ingredients, jnp.array(positions))).tolist()

    base = data(0, 1, 0)
    assert base == data(0, 1, 0)
    assert base[0] != base[1]
    assert base[1] == data(0, 1, 0, positions=(4, 9))[0]
    for other in (data(1, 1, 0), data(0, 2, 0), data(0, 1, 1)):
        assert other[0] != base[0]
        assert other[1] != base[1]


def test_colours_do_not_depend_on_the_batch():
    images = pictures(12)
    apply = jax.jit(lambda x, p: colour(x, sample_keys(5, 1, 0, p), LIGHT))
    whole = apply(images, jnp.arange(12))
    parts = [apply(images[i : i + 3], jnp.arange(i, i + 3)) for i in range(0, 12, 3)]
    np.testing.assert_allclose(whole, np.concatenate(parts), atol=1e-6)


def test_colours_are_the_same_on_eight_devices():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    by_row = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    images, positions = pictures(16), jnp.arange(16)
    apply = jax.jit(lambda x, p: colour(x, sample_keys(5, 1, 0, p), LIGHT))
    alone = apply(images, positions)
    spread = apply(jax.device_put(images, by_row), jax.device_put(positions, by_row))
    # A dozen float32 operations on numbers up to 1, compiled for another number of rows: a
    # thousandth of an 8-bit level.
    np.testing.assert_allclose(spread, alone, atol=4e-6)
    assert spread.sharding.is_equivalent_to(by_row, 4)


def test_hue_does_not_hang_on_how_a_compiler_rounds():
    """Compiled as a step with parts of a batch, which computes a channel and the largest of them
    in two places; without optimisation those round otherwise."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    parts = NamedSharding(mesh, PartitionSpec(None, "data"))
    images = np.random.default_rng(0).integers(0, 255, (16, 32, 32, 3), np.uint8)
    positions = np.arange(16, dtype=np.int32)

    def apply(images, positions):
        return colour(unit(images), sample_keys(7, 0, 0, positions), LIGHT)

    def by_parts(images, positions):
        cut = [x.reshape(2, 8, *x.shape[1:]) for x in (images, positions)]
        cut = jax.lax.with_sharding_constraint(cut, parts)
        return jax.lax.map(lambda part: apply(*part), cut).reshape(images.shape)

    by_row = NamedSharding(mesh, PartitionSpec("data"))
    spread = jax.device_put((images, positions), by_row)
    lowered = jax.jit(by_parts).lower(*spread)
    plain = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
    np.testing.assert_allclose(plain(*spread), jax.jit(apply)(images, positions), atol=1e-5)


def test_unit_scales_bytes_only():
    images = np.array([[[[0, 51, 255]]]], np.uint8)
    np.testing.assert_allclose(unit(images)[0, 0, 0], [0, 0.2, 1], atol=1e-7)
    floats = np.array([[[[0.0, 0.2, 1.0]]]], np.float32)
    np.testing.assert_array_equal(unit(floats), floats)
