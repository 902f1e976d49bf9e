"""Bicubic resizing with antialiasing, by SIMD instructions where their library has a wheel."""

import threading

from PIL import Image

try:
    import cykooz_resizer as simd
except ImportError:  # no wheel for this machine, as for Linux on Arm
    simd = None

_MODES = ("RGB", "L", "CMYK")
_OF_THREAD = threading.local()


def resized(image: Image.Image, width: int, height: int) -> Image.Image:
    """What Pillow's bicubic gives, to two levels of 255, in an eighth of the time.

    Rows first, then columns, as Pillow does where it does not find the other order cheaper.
    For pictures to train on. Where numbers are compared with those of others, evaluation resizes
    by Pillow itself: see `evaluation_crop`.
    """
    if simd is not None and not hasattr(_OF_THREAD, "resizer"):
        catmull_rom = simd.ResizeAlg.convolution(simd.FilterType.catmull_rom)  # Pillow's bicubic
        _OF_THREAD.resizer = simd.Resizer()
        _OF_THREAD.options = simd.ResizeOptions(catmull_rom)
    # In two calls: a pass may overshoot and is clipped, so that the order counts.
    for size in ((width, image.height), (width, height)):
        if simd is None or image.mode not in _MODES:
            image = image.resize(size, Image.Resampling.BICUBIC)
        else:
            result = Image.new(image.mode, size)
            _OF_THREAD.resizer.resize_pil(image, result, _OF_THREAD.options)
            image = result
    return image
