"""The form in which a picture is stored: JPEG or WebP, upright, at most so large."""

import io

from PIL import Image

from protoclip_jax.data.decoding import BROKEN, FORMATS, UnreadableImage, load, shrunk

_ORIENTATION = 0x0112  # EXIF tag


def stored(data: bytes, side: int, encoding: str, quality: int) -> bytes:
    """A picture's file in the wanted form.

    A file that has it already stays byte for byte; every other is encoded anew.

    Args:
      data: the original file; it is decoded whole in any case.
      side: the shorter side of larger pictures; 0 leaves them as they are.
      encoding: "jpeg" or "webp".
      quality: of an encoding.

    Raises:
      UnreadableImage: the picture cannot be decoded, or not be encoded.
    """
    image = load(data)
    if _fits(data, side, encoding):
        return data
    try:
        image = (shrunk(image, side) if side else image).convert("RGB")
        file = io.BytesIO()
        image.save(file, encoding.upper(), quality=quality)
    except Exception as error:  # an encoder's limits: 65535 pixels a side for JPEG, 16383 for WebP
        raise UnreadableImage(BROKEN, f"{type(error).__name__}: {error}") from error
    return file.getvalue()


def _fits(data: bytes, side: int, encoding: str) -> bool:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return (
            image.format == encoding.upper()
            and image.mode in ("RGB", "L")
            and (not side or min(image.size) <= side)
            and not getattr(image, "is_animated", False)
            and image.getexif().get(_ORIENTATION, 1) == 1
        )
