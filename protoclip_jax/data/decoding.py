"""Pictures from bytes: upright, in plain colours, cropped square; or an error that says why not."""

import io

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from protoclip_jax.data.image_warnings import caught
from protoclip_jax.data.resizing import resized

# Recognised by content. Formats that start other programs (EPS) or have no signature of their own
# (TGA would take a text file) are left out.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")

MAX_PIXELS = 89_478_485  # where Pillow begins to warn: a quarter of a gigabyte as RGB

# A long strip that would be resized to more than this is cropped and resized in one go.
_MAX_RESIZED = 2**24

MISSING = "missing file"
NOT_A_FILE = "not a regular file"
NO_ACCESS = "cannot be opened"
EMPTY = "empty file"
TOO_LARGE = "file too large"
NOT_AN_IMAGE = "not an image"
TRUNCATED = "truncated image"
TOO_MANY_PIXELS = "too many pixels"
BROKEN = "broken image"
NO_CAPTION = "no caption"  # of a pair that is used only whole

# The position of a reason in this tuple is how worker processes report it.
REASONS = (
    MISSING,
    NOT_A_FILE,
    NO_ACCESS,
    EMPTY,
    TOO_LARGE,
    NOT_AN_IMAGE,
    TRUNCATED,
    TOO_MANY_PIXELS,
    BROKEN,
    NO_CAPTION,
)

_ORIENTATION = 0x0112  # EXIF tag
_EXIF = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # where it is noted
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(ValueError):
    """A picture that cannot be used.

    Attributes:
      reason: one of `REASONS`, to count by.
      detail: what was found, for people; may be empty.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in `data` as RGB: its first frame, upright, alpha on white.

    Args:
      data: a whole file in one of `FORMATS`.
      max_pixels: width times height above which nothing is allocated.

    Raises:
      UnreadableImage: whatever is wrong with it.
    """
    return load(data, max_pixels=max_pixels).convert("RGB")


def load(data: bytes, *, max_pixels: int = MAX_PIXELS, parity: bool = False) -> Image.Image:
    """Like `decode`, but leaves grey and CMYK as they are: the crops convert after resizing.

    That order gives the reference's pixels for RGB, L and CMYK, and grey resizes at a third of
    the cost. With `parity` every mode stays as it is and the orientation is ignored, as the
    reference does (see DESIGN, "differ on purpose").

    Raises:
      UnreadableImage: whatever is wrong with it.
    """
    try:
        with caught():  # warnings, for whoever collects them
            image = _open(data, max_pixels)
            return image if parity else plain(image)
    except UnreadableImage:
        raise
    except Exception as error:  # decoders raise anything: struct.error, MemoryError, KeyError...
        raise UnreadableImage(BROKEN, f"{type(error).__name__}: {error}") from error


def plain(image: Image.Image) -> Image.Image:
    """An opened picture of any mode, upright and in RGB, L or CMYK.

    Transparent parts, also those of palettes and colour keys, show white. 16-bit grey is scaled to
    8 bits; so are integers (taken as 16-bit) and floats (taken as 0 to 1, or 0 to 255 if any is
    above 1).
    """
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    if turn is not None:  # the first flip is 0
        image = image.transpose(turn)
        # Pillow keeps the note: a second look would turn the picture again.
        image.info = {name: value for name, value in image.info.items() if name not in _EXIF}
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        return _deep_grey(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _on_white(image)
    return image if image.mode in ("RGB", "L", "CMYK") else image.convert("RGB")


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """A picture with its shorter side at `side` pixels; a smaller one as it is."""
    shorter = min(image.size)
    if shorter <= side:
        return image
    width, height = (max(side, round(length * side / shorter)) for length in image.size)
    return resized(image, width, height)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """The first frame, decoded in its own mode."""
    if not data:
        raise UnreadableImage(EMPTY)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage(NOT_AN_IMAGE, f"starts with {data[:16]!r}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(TOO_MANY_PIXELS, str(error)) from error
    width, height = image.size
    if width * height > max_pixels:
        raise UnreadableImage(TOO_MANY_PIXELS, f"{width}x{height}, the limit is {max_pixels}")
    if not _whole(image.format, data):
        raise UnreadableImage(TRUNCATED, f"a {image.format} without its end")
    try:
        image.load()
    except OSError as error:
        reason = TRUNCATED if "truncated" in str(error) else BROKEN
        raise UnreadableImage(reason, str(error)) from error
    return image


def _whole(form: str | None, data: bytes) -> bool:
    """Whether the end of the file is there, as far as its format tells.

    Decoders find a file that is too short, but some take one whose end was lost and padded with
    zeros (an interrupted download into a reserved file), and leave half of the picture grey.
    """
    if form in ("JPEG", "MPO"):
        return _jpeg_ends(data)
    if form == "PNG":
        return b"IEND\xae\x42\x60\x82" in data
    if form in ("WEBP", "AVIF"):
        return not data.endswith(bytes(64))
    return True


def _jpeg_ends(data: bytes) -> bool:
    """Whether an end marker follows the first scan.

    Compressed data never contains that marker; a thumbnail in the header or a film after the end
    may, so the header's segments are walked over.
    """
    at = 2
    while data[at : at + 1] == b"\xff":
        marker = data[at + 1 : at + 2]
        if marker == b"\xda":
            return data.find(b"\xff\xd9", at) >= 0
        # A repeated 0xff is padding; a segment's length counts itself.
        at += 1 if marker == b"\xff" else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return True  # no plain header: libjpeg's opinion counts


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata does not spoil the picture
        return 1


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    clear = _key_mask(values, image.info.get("transparency"))
    if image.mode == "F":
        if not np.isfinite(values).all():
            raise UnreadableImage(BROKEN, "float pixels that are not finite")
        grey = values * (255.0 if values.max() <= 1 else 1.0)
        grey = np.clip(np.rint(grey), 0, 255)
    else:
        # 65535 / 257 = 255; half of that rounds.
        grey = (np.clip(values, 0, 65535).astype(np.int64) + 128) // 257
    return Image.fromarray(np.where(clear, 255, grey).astype(np.uint8), "L")


def _key_mask(values: np.ndarray, key: object) -> Bool[np.ndarray, "h w"]:
    """Where a grey picture has its transparent value (PNG's tRNS)."""
    return values == key if isinstance(key, int) else np.zeros(values.shape, bool)


def evaluation_crop(
    image: Image.Image, size: int, *, exact: bool = True
) -> UInt8[np.ndarray, "size size 3"]:
    """The middle square of the picture resized so that its shorter side is `size`, as RGB.

    Bicubic with antialiasing, in the picture's own mode; sizes and offsets round as torchvision's
    Resize and CenterCrop do (golden file `preprocess`: equal; without `exact`, to one level).
    """
    short, long = sorted(image.size)
    long = max(size, int(size * long / short))
    sides = (size, long) if image.width <= image.height else (long, size)
    # Python's round, to even: what torchvision's centre crop uses.
    left, top = (round((side - size) / 2) for side in sides)
    if size * long > _MAX_RESIZED:
        scale = (image.width / sides[0], image.height / sides[1])
        box = (left * scale[0], top * scale[1], (left + size) * scale[0], (top + size) * scale[1])
        square = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    else:
        if image.size != sides:
            if exact:
                image = image.resize(sides, Image.Resampling.BICUBIC)
            else:
                image = resized(image, *sides)
        square = image.crop((left, top, left + size, top + size))
    return np.asarray(square.convert("RGB"))
