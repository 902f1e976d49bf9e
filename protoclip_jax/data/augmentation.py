"""What training changes in a picture: the crop on the host, the colours on the device.

Everything is a function of (seed, episode, pass, position): the same picture comes out whatever
the number of hosts, workers and devices, and after a resume.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8
from PIL import Image

from protoclip_jax.data.resizing import resized

# CLIP's channel statistics.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

_CROP_TRIES = 10
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's grey


@dataclasses.dataclass(frozen=True)
class Colour:
    """Strengths and probabilities of the colour work, which is done in this order.

    Jitter: brightness, contrast and saturation by a factor from [max(0, 1 - x), 1 + x], hue by a
    shift from [-x, x] turns. Blur: Gaussian, sigma in pixels from the range.
    """

    jitter: float = 0.0  # probabilities
    grey: float = 0.0
    blur: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_radius: int = 10  # a kernel of 21 pixels


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """A random crop of a share of the area (`scale`) and side ratio, a flip, and colours."""

    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    colour: Colour | None = None


# By the name recipes use. `clip` is CLIP's; `light` has the constants of the reference's
# "protoclip-light-augmentation". None: the evaluation crop.
AUGMENTATIONS: dict[str, Augmentation | None] = {
    "none": None,
    "clip": Augmentation(scale=(0.9, 1.0)),
    "light": Augmentation(
        scale=(0.5, 1.0),
        flip=True,
        colour=Colour(
            jitter=0.2, grey=0.2, blur=0.2, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2
        ),
    ),
}


def augmentation_named(name: str) -> Augmentation | None:
    """The augmentation a recipe names.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in AUGMENTATIONS:
        known = ", ".join(AUGMENTATIONS)
        raise ValueError(f"augmentation {name!r} is unknown: use one of {known}")
    return AUGMENTATIONS[name]


def training_crop(
    image: Image.Image,
    rng: np.random.Generator,
    size: int,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = False,
) -> UInt8[np.ndarray, "size size 3"]:
    """A random part of the picture as a square, flipped half of the time if `flip`.

    The part has an area of `scale` times the picture's and a width of `ratio` times its height
    (log-uniform). Bicubic with antialiasing, in the picture's own mode, RGB last. It draws the
    same count of numbers whatever the picture.
    """
    shares = rng.uniform(*scale, _CROP_TRIES)
    ratios = np.exp(rng.uniform(*np.log(ratio), _CROP_TRIES))
    places = rng.random((_CROP_TRIES, 2))
    mirrored = flip and rng.random() < 0.5
    width, height = image.size
    widths = np.rint(np.sqrt(width * height * shares * ratios)).astype(int)
    heights = np.rint(np.sqrt(width * height * shares / ratios)).astype(int)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    if fits.any():
        first = int(np.argmax(fits))
        crop_width, crop_height = int(widths[first]), int(heights[first])
        left = int(places[first, 0] * (width - crop_width + 1))
        top = int(places[first, 1] * (height - crop_height + 1))
    else:  # a long strip: its middle, as near to the wanted ratio as it goes
        crop_width = max(1, min(width, round(height * ratio[1])))
        crop_height = max(1, min(height, round(width / ratio[0])))
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
    part = image.crop((left, top, left + crop_width, top + crop_height))
    square = resized(part, size, size).convert("RGB")
    if mirrored:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(square)


def sample_keys(
    seed: int, episode: int | Int[Array, ""], pass_: int, positions_b: Int[Array, " b"]
) -> Key[Array, " b"]:
    """One random key a sample, from (seed, episode, pass, position) alone."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), episode), pass_)
    return jax.vmap(lambda position: jax.random.fold_in(key, position))(positions_b)


def colour(
    images_bhwc: Float[Array, "b h w 3"], keys_b: Key[Array, " b"], settings: Colour
) -> Float[Array, "b h w 3"]:
    """Colour jitter, grey and blur, each sample with its own random numbers.

    Jitter works in the fixed order brightness, contrast, saturation, hue (torchvision shuffles
    the order): under `vmap` every order would be computed for every sample.

    Args:
      images_bhwc: values in [0, 1].
      keys_b: from `sample_keys`.
      settings: strengths; fixed under jit.

    Returns:
      Values in [0, 1], of the same type.
    """
    return jax.vmap(lambda image, key: _colour_one(image, key, settings))(images_bhwc, keys_b)


def normalise(
    images_bhwc: UInt8[Array | np.ndarray, "b h w 3"] | Float[Array | np.ndarray, "b h w 3"],
    mean: tuple[float, float, float] = MEAN,
    std: tuple[float, float, float] = STD,
) -> Float[Array, "b h w 3"]:
    """`(x - mean) / std` by channel, of bytes (first divided by 255) or of values in [0, 1]."""
    images = unit(images_bhwc)
    return (images - jnp.asarray(mean, images.dtype)) / jnp.asarray(std, images.dtype)


def unit(
    images_bhwc: UInt8[Array | np.ndarray, "b h w 3"] | Float[Array | np.ndarray, "b h w 3"],
) -> Float[Array, "b h w 3"]:
    """Bytes as float32 in [0, 1]; floats as they are."""
    images = jnp.asarray(images_bhwc)
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def _colour_one(image: Float[Array, "h w 3"], key: Key[Array, ""], settings: Colour):
    keys = jax.random.split(key, 8)

    def chance(index: int, probability: float) -> Bool[Array, ""]:
        return jax.random.uniform(keys[index]) < probability

    def factor(index: int, strength: float) -> Float[Array, ""]:
        low, high = max(0.0, 1 - strength), 1 + strength
        return jax.random.uniform(keys[index], (), image.dtype, low, high)

    jittered = jnp.clip(image * factor(0, settings.brightness), 0, 1)
    jittered = _blend(jittered, _grey(jittered).mean(), factor(1, settings.contrast))
    jittered = _blend(jittered, _grey(jittered), factor(2, settings.saturation))
    turn = jax.random.uniform(keys[3], (), image.dtype, -settings.hue, settings.hue)
    jittered = _turn_hue(jittered, turn)
    image = jnp.where(chance(4, settings.jitter), jittered, image)
    image = jnp.where(chance(5, settings.grey), _grey(image), image)
    sigma = jax.random.uniform(keys[6], (), image.dtype, *settings.blur_sigma)
    blurred = _blur(image, sigma, settings.blur_radius)
    return jnp.where(chance(7, settings.blur), blurred, image)


def _grey(image: Float[Array, "h w 3"]) -> Float[Array, "h w 1"]:
    return (image * jnp.asarray(_LUMA, image.dtype)).sum(-1, keepdims=True)


def _blend(image, other, share):
    """`share` of the image, the rest of `other`; a share above 1 moves away from `other`."""
    return jnp.clip(share * image + (1 - share) * other, 0, 1)


def _turn_hue(image: Float[Array, "h w 3"], turn: Float[Array, ""]) -> Float[Array, "h w 3"]:
    """Adds `turn` (1 = full circle) to the hue in HSV; value and saturation stay."""
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    high, low = image.max(-1), image.min(-1)
    spread = high - low
    safe = jnp.where(spread == 0, 1, spread)
    # Channels are compared with each other, never with `high`: a compiler may compute them twice,
    # and where it rounds the two otherwise, equality would find no channel to be the largest.
    sixth = jnp.where(
        (red >= green) & (red >= blue),
        (green - blue) / safe,
        jnp.where(green >= blue, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixth = sixth + 6 * turn
    # Each channel falls from `high` by `spread` as its own distance on the circle grows.
    offsets = jnp.asarray((5.0, 3.0, 1.0), image.dtype)
    place = (offsets + sixth[..., None]) % 6
    fall = jnp.clip(jnp.minimum(place, 4 - place), 0, 1)
    return high[..., None] - spread[..., None] * fall


def _blur(image: Float[Array, "h w 3"], sigma: Float[Array, ""], radius: int):
    """Gaussian blur, the picture mirrored at its edges, as one matrix product an axis.

    For accelerators that costs less than sliding windows, and it compiles faster everywhere.
    """
    rows, columns = (_blur_matrix(size, sigma, radius) for size in image.shape[:2])
    return jnp.einsum("ih,jw,hwc->ijc", rows, columns, image, precision="highest")


def _blur_matrix(size: int, sigma: Float[Array, ""], radius: int) -> Float[Array, "size size"]:
    """Weight of each input pixel in each output pixel along one axis."""
    radius = min(radius, size - 1)
    here = jnp.arange(size)[:, None]
    there = jnp.arange(size)[None, :]

    def weight(distance):
        bell = jnp.exp(-0.5 * (distance.astype(sigma.dtype) / sigma) ** 2)
        return jnp.where(jnp.abs(distance) <= radius, bell, 0)

    # A pixel counts where it is and where the two edges mirror it; the edge itself only once.
    last = size - 1
    matrix = weight(there - here)
    matrix += jnp.where(there > 0, weight(-there - here), 0)
    matrix += jnp.where(there < last, weight(2 * last - there - here), 0)
    return matrix / matrix.sum(1, keepdims=True)
