"""Images as callers hold them: one or many paths, bytes, PIL images and arrays."""

import os
from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from protoclip_jax.data import decoding
from protoclip_jax.data.decoding import BROKEN, UnreadableImage
from protoclip_jax.data.files import read_picture
from protoclip_jax.storage.home import at_home

WANTED = "a path, the bytes of a file, a PIL image, or a uint8 array (h, w, 3)"


def as_many(images: Any) -> Iterable:
    """What was given as a sequence: a single image is a sequence of one.

    Raises:
      ValueError: neither an image nor a sequence of some, or an array of another form than uint8
        (h, w, 3) or (n, h, w, 3).
    """
    if isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)):
        return [images]
    if hasattr(images, "__array__"):
        array = np.asarray(images)
        if array.dtype.kind in "OU" and array.ndim == 1:  # of paths or of PIL images
            return list(array)
        if array.ndim not in (3, 4):
            raise ValueError(_form(array, "the array") + ", or several: uint8 (n, h, w, 3)")
        _check_form(array, "the array")
        return [array] if array.ndim == 3 else array
    # A set has no order, and a file is a sequence of its lines.
    if (
        not isinstance(images, Iterable)
        or isinstance(images, (Mapping, Set))
        or hasattr(images, "read")
    ):
        raise ValueError(
            f"images are given as {WANTED}, or as a sequence of those, not as {_kind(images)}"
        )
    return images


def square_pixels(image: Any, size: int, number: int) -> UInt8[np.ndarray, "size size 3"]:
    """The middle square of one image, upright and in RGB, as evaluations cut it.

    Args:
      image: in one of the forms `WANTED`.
      size: side of the square.
      number: of the image in its call, for messages.

    Raises:
      ValueError: another type, or an array of another form.
      UnreadableImage: a file or a PIL image that is none; names it.
    """
    what = f"image {number}"
    if isinstance(image, (str, os.PathLike)):
        what = f"{what}, {os.fspath(image)!r}"
    try:
        image = _upright(image, what)
        if isinstance(image, np.ndarray):
            if image.shape[:2] == (size, size):
                return image
            image = Image.fromarray(np.ascontiguousarray(image))
        return decoding.evaluation_crop(image, size)
    except UnreadableImage as error:
        detail = f"{what} ({error.detail})" if error.detail else what
        raise UnreadableImage(error.reason, detail) from error


def _upright(image: Any, what: str) -> Image.Image | UInt8[np.ndarray, "h w 3"]:
    if isinstance(image, (str, os.PathLike)):
        image = read_picture(at_home(os.fsdecode(image)))
    if isinstance(image, (bytes, bytearray, memoryview)):
        return decoding.decode(bytes(image))
    if isinstance(image, Image.Image):
        return _from_pil(image, what)
    if hasattr(image, "__array__"):
        array = np.asarray(image)
        if array.ndim != 3:
            raise ValueError(_form(array, what))
        _check_form(array, what)
        return array
    raise ValueError(f"{what} is {_kind(image)}: wanted {WANTED}")


def _from_pil(image: Image.Image, what: str) -> Image.Image:
    # Those of files have the range of their format.
    if image.mode in ("I", "F") and image.format is None:
        raise ValueError(
            f"{what} is a PIL image of mode {image.mode}, whose range nobody knows: give "
            "Image.fromarray(x) of uint8 values from 0 to 255"
        )
    if not min(image.size):
        raise UnreadableImage(BROKEN, f"a PIL image of {image.width} x {image.height} pixels")
    try:
        return decoding.plain(image).convert("RGB")
    except UnreadableImage:
        raise
    except Exception as error:  # a file that is read only now, or a mode without a way to RGB
        raise UnreadableImage(BROKEN, f"{type(error).__name__}: {error}") from error


def _check_form(array: np.ndarray, what: str) -> None:
    if array.dtype != np.uint8 or array.shape[-1] != 3 or not min(array.shape[-3:]):
        raise ValueError(_form(array, what))


def _form(array: np.ndarray, what: str) -> str:
    """The error for an array, with the way out where that can be told."""
    hint = ""
    if array.dtype != np.uint8 and array.dtype.kind == "f":
        hint = "; of values from 0 to 1 they are np.uint8(np.round(255 * x))"
    elif array.ndim > 2 and array.shape[-1] != 3 and array.shape[-3] == 3:
        hint = "; channels go last: np.moveaxis(x, -3, -1)"
    elif array.ndim == 2 or (array.ndim > 2 and array.shape[-1] in (1, 2, 4)):
        hint = "; grey and transparent ones are given as PIL images: Image.fromarray(x)"
    return (
        f"{what} is {array.dtype} {array.shape}: wanted uint8 (h, w, 3) with values from 0 to "
        f"255{hint}"
    )


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
