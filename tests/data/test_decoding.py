"""Pictures of every kind: right pixels, or an error with the right reason."""

import contextlib
import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from golden_files import GOLDEN, golden, golden_json
from PIL import Image

from protoclip_jax.data import decoding
from protoclip_jax.data.augmentation import normalise, training_crop
from protoclip_jax.data.decoding import UnreadableImage, decode, evaluation_crop, load, plain
from protoclip_jax.data.files import read_picture
from protoclip_jax.data.pair_list import PairList

CASES = Path(__file__).parents[1] / "cases"
PICTURES = sorted(name for name in golden_json("preprocess") if not name.startswith("_"))
SIZES = (64, 224)


def as_before(name: str) -> bool:
    """Whether the golden picture is one that the default treats as the reference does."""
    content = (GOLDEN / "images" / name).read_bytes()
    upright = Image.open(io.BytesIO(content)).getexif().get(0x0112, 1) == 1
    return upright and golden_json("preprocess")[name]["mode"] in ("RGB", "L", "CMYK")


def golden_crop(name: str, size: int) -> np.ndarray:
    return golden("preprocess")[f"{name}/crop_u8_{size}"]


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def smooth(width: int = 160, height: int = 120, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def reason(data: bytes, **options) -> str:
    with pytest.raises(UnreadableImage) as error:
        decode(data, **options)
    return error.value.reason


def case_rows(case: str):
    """Row of the list -> decoded picture or error, and the facts of the case."""
    pairs = PairList(str(CASES / case / "pairs.tsv"))
    results = []
    for row in range(len(pairs)):
        try:
            results.append(decode(pairs.read(row)[0]))
        except UnreadableImage as error:
            results.append(error)
    return results, json.loads((CASES / case / "case.json").read_text())


def assert_bad_rows(case: str, reasons: list[str]) -> None:
    results, facts = case_rows(case)
    bad = {row: error.reason for row, error in enumerate(results) if not hasattr(error, "size")}
    assert bad == dict(zip(facts["bad_rows"], reasons, strict=True))


def odd_pictures(case: str) -> list[Image.Image]:
    results, facts = case_rows(case)
    for picture in results:
        assert picture.mode == "RGB"
        for crop in (evaluation_crop(picture, 32), training_crop(picture, rng(), 32)):
            assert crop.shape == (32, 32, 3)
            assert crop.dtype == np.uint8
    return [results[row] for row in facts["odd_rows"]]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# The golden evaluation transform.


@pytest.mark.core
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [name for name in PICTURES if as_before(name)])
def test_evaluation_crop_equals_torchvision(name, size):
    data = read_picture(str(GOLDEN / "images" / name))
    np.testing.assert_array_equal(evaluation_crop(load(data), size), golden_crop(name, size))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [name for name in PICTURES if as_before(name)])
def test_the_fast_crop_is_within_the_golden_tolerance(name, size):
    data = read_picture(str(GOLDEN / "images" / name))
    crop = evaluation_crop(load(data), size, exact=False)
    difference = np.abs(crop.astype(int) - golden_crop(name, size))
    assert difference.mean() <= 1
    assert difference.max() <= 4


@pytest.mark.core
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PICTURES)
def test_parity_equals_torchvision_for_all(name, size):
    data = read_picture(str(GOLDEN / "images" / name))
    crop = evaluation_crop(load(data, parity=True), size)
    np.testing.assert_array_equal(crop, golden_crop(name, size))


def converted_first(name: str) -> bool:
    """Whether the default turns the picture into RGB and does nothing else to it."""
    image = Image.open(GOLDEN / "images" / name)
    clear = "transparency" in image.info
    return image.mode in ("P", "1", "CMYK") and not clear


@pytest.mark.core
@pytest.mark.parametrize("name", [name for name in PICTURES if converted_first(name)])
def test_colours_before_the_crop_equal_convert_first(name):
    data = read_picture(str(GOLDEN / "images" / name))
    expected = golden("preprocess")[f"{name}/crop_u8_convert_first_64"]
    np.testing.assert_array_equal(evaluation_crop(decode(data), 64), expected)


@pytest.mark.core
@pytest.mark.parametrize("name", PICTURES)
def test_normalise_equals_the_reference(name):
    crop = golden_crop(name, 64)
    expected = golden("preprocess")[f"{name}/normalised_chw_64"]
    actual = np.asarray(normalise(crop[None]))[0].transpose(2, 0, 1)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
    as_floats = np.asarray(normalise(crop[None].astype(np.float32) / 255))[0]
    np.testing.assert_allclose(as_floats.transpose(2, 0, 1), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in PICTURES if not as_before(name)])
def test_the_others_differ_from_the_reference_on_purpose(name):
    data = read_picture(str(GOLDEN / "images" / name))
    assert np.any(evaluation_crop(load(data), 64) != golden_crop(name, 64))


# The cases.


def test_truncated_pictures_are_errors():
    assert_bad_rows("IMG-01", [decoding.TRUNCATED, decoding.TRUNCATED])


def test_other_files_are_errors():
    assert_bad_rows("IMG-03", [decoding.NOT_AN_IMAGE, decoding.NOT_AN_IMAGE])


def test_animations_show_their_first_frame():
    (picture,) = odd_pictures("IMG-05")
    with Image.open(CASES / "IMG-05" / "images" / "moving.gif") as movie:
        assert movie.n_frames > 1
        movie.seek(0)
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(movie.convert("RGB")))


def test_cmyk_is_not_inverted():
    (picture,) = odd_pictures("IMG-07")
    with Image.open(CASES / "IMG-07" / "images" / "cmyk.jpg") as original:
        expected = np.asarray(original.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(picture), expected)
    corners = np.asarray(picture)[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.min(axis=1).max() > 240  # one of them is white


def test_deep_grey_is_scaled():
    (picture,) = odd_pictures("IMG-09")
    ramp = np.asarray(picture)[0, :, 0].astype(int)
    assert len(np.unique(np.asarray(picture))) >= 60
    assert np.all(np.diff(ramp) >= 0)
    assert ramp[-1] > ramp[0] + 200


def test_clear_pixels_show_white():
    (picture,) = odd_pictures("IMG-11")
    with Image.open(CASES / "IMG-11" / "images" / "logo.png") as original:
        rgba = np.asarray(original).astype(float)
    alpha = rgba[..., 3:] / 255
    assert (alpha == 0).any()
    assert ((alpha > 0) & (alpha < 1)).any()
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(np.asarray(picture) - expected).max() <= 1


def test_pictures_are_upright():
    results, facts = case_rows("IMG-13")
    (row,) = facts["odd_rows"]
    assert results[row].size == tuple(facts["upright_size"])
    assert np.asarray(results[row])[:4, :4].min() > 230


def test_a_single_pixel_becomes_a_flat_picture():
    (picture,) = odd_pictures("IMG-15")
    assert picture.size == (1, 1)
    for crop in (evaluation_crop(picture, 64), training_crop(picture, rng(), 64)):
        assert np.all(crop == np.asarray(picture)[0, 0])


def peak_memory() -> int:
    """Peak resident bytes of this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def test_a_decompression_bomb_allocates_nothing():
    before = peak_memory()
    assert_bad_rows("IMG-17", [decoding.TOO_MANY_PIXELS])
    assert peak_memory() - before < 100 * 2**20


def test_the_pixel_limit_is_ours_below_pillows():
    data = encoded(smooth(100, 50), "PNG")
    assert decode(data, max_pixels=5000).size == (100, 50)
    assert reason(data, max_pixels=4999) == decoding.TOO_MANY_PIXELS


def test_grey_and_bilevel_have_three_equal_channels():
    grey, bilevel = (np.asarray(picture) for picture in odd_pictures("IMG-19"))
    for pixels in (grey, bilevel):
        assert np.all(pixels == pixels[..., :1])
    assert set(np.unique(bilevel)) == {0, 255}


# The kinds behind the cases.

FORMATS = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("GIF", {}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("AVIF", {}),
    ("JPEG2000", {}),
    ("PPM", {}),
]


@pytest.mark.parametrize(("form", "options"), FORMATS)
def test_no_format_gives_half_a_picture(form, options):
    data = encoded(smooth(), form, **options)
    whole = np.asarray(decode(data))
    for share in (0.02, 0.2, 0.4, 0.6, 0.8, 0.95):
        with pytest.raises(UnreadableImage):
            decode(data[: int(share * len(data))])
    for missing in (1, 2, 3):
        with contextlib.suppress(UnreadableImage):
            assert np.array_equal(np.asarray(decode(data[:-missing])), whole)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "AVIF", "JPEG2000"])
def test_a_download_padded_with_zeros_is_an_error(form):
    data = encoded(smooth(), form)
    for share in (0.2, 0.5, 0.8):
        kept = int(share * len(data))
        for zeros in (len(data) - kept, 100_000):
            with pytest.raises(UnreadableImage):
                decode(data[:kept] + bytes(zeros))


def test_a_thumbnails_end_is_not_the_pictures():
    thumbnail = encoded(smooth(32, 32), "JPEG")
    exif = b"Exif\0\0" + thumbnail
    data = encoded(smooth(), "JPEG", exif=exif)
    assert data.count(b"\xff\xd9") == 2
    assert decode(data).size == (160, 120)
    cut = data[: int(0.8 * len(data))]
    assert reason(cut + bytes(100_000)) == decoding.TRUNCATED


def test_a_film_after_the_end_does_not_matter():
    data = encoded(smooth(), "JPEG")
    film = b"\xff\xda" + rng().bytes(1000)
    np.testing.assert_array_equal(np.asarray(decode(data + film)), np.asarray(decode(data)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_is_upright(form, orientation):
    upright = Image.new("RGB", (48, 32), "black")
    upright.paste("white", (0, 0, 12, 12))
    upright.paste("red", (36, 0, 48, 12))
    # What a camera stores: the turn that undoes the one the tag asks for.
    undo = {6: 8, 8: 6}.get(orientation, orientation)
    turn = decoding._UPRIGHT.get(undo)
    stored = upright.transpose(turn) if turn is not None else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if form in ("JPEG", "WEBP") else {}
    shown = decode(encoded(stored, form, exif=exif, **options))
    assert shown.size == (48, 32)
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(upright)).mean() < 8
    ignored = load(encoded(stored, "PNG", exif=exif), parity=True)
    assert ignored.size == stored.size


def test_damaged_metadata_does_not_spoil_a_picture():
    data = encoded(smooth(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert decode(data).size == (160, 120)


def clear_corner(mode: str) -> tuple[Image.Image, dict]:
    """A black picture whose left half is transparent in the way of the mode."""
    alpha = np.full((20, 20), 255, np.uint8)
    alpha[:, :10] = 0
    if mode in ("RGBA", "LA"):
        image = Image.new(mode[:-1], (20, 20), 0)
        image.putalpha(Image.fromarray(alpha))
        return image, {}
    values = np.full((20, 20), 1, np.uint8)
    values[:, :10] = 7
    if mode == "P":
        image = Image.fromarray(values, "P")
        image.putpalette([0] * 768)
        return image, {"transparency": 7}
    if mode == "RGB":
        return Image.fromarray(np.stack([values] * 3, -1)), {"transparency": (7, 7, 7)}
    if mode == "L":
        return Image.fromarray(values), {"transparency": 7}
    if mode == "1":
        return Image.fromarray(values == 7).convert("1"), {"transparency": 255}
    deep = np.where(values == 7, 700, 0).astype(np.uint16)
    return Image.fromarray(deep), {"transparency": 700}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "1", "I;16"])
def test_every_transparency_shows_white(mode):
    image, options = clear_corner(mode)
    pixels = np.asarray(decode(encoded(image, "PNG", **options)))
    assert np.all(pixels[:, :10] == 255)
    assert pixels[:, 10:].max() <= 1


def test_palette_with_shades_of_alpha():
    image = Image.fromarray(np.arange(4, dtype=np.uint8).repeat(16).reshape(8, 8), "P")
    image.putpalette([0] * 768)
    data = encoded(image, "PNG", transparency=bytes([0, 85, 170, 255]))
    shades = np.asarray(decode(data))[::2, 0, 0]
    np.testing.assert_array_equal(shades, [255, 170, 85, 0])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16), [0, 0, 1, 1, 128, 255]),
        (np.array([[-5, 0, 32896, 65535, 70000]], np.int32), [0, 0, 128, 255, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 0.5, 1.6, 300.0]], np.float32), [0, 0, 2, 255]),
    ],
)
def test_deep_grey_values(values, expected):
    pixels = np.asarray(decode(encoded(Image.fromarray(values), "TIFF")))
    np.testing.assert_array_equal(pixels[0, :, 0], expected)


def test_floats_that_are_not_numbers_are_errors():
    data = encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF")
    assert reason(data) == decoding.BROKEN


def test_any_exception_of_a_decoder_is_one_error(monkeypatch):
    data = encoded(smooth(), "PNG")

    def fails(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(decoding, "plain", fails)
    with pytest.raises(UnreadableImage, match="MemoryError: no room"):
        decode(data)


def test_programs_are_not_started():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert reason(postscript) == decoding.NOT_AN_IMAGE


def test_random_bytes_are_only_ever_errors():
    """Fuzz: damaged files either decode or are unreadable; nothing else is raised."""
    generator = rng()
    originals = [encoded(smooth(40, 30), form, **options) for form, options in FORMATS]
    for turn in range(300):
        data = bytearray(originals[turn % len(originals)])
        for at in generator.integers(0, len(data), generator.integers(1, 30)):
            data[at] = generator.integers(0, 256)
        with contextlib.suppress(UnreadableImage):
            assert decode(bytes(data)).mode == "RGB"


def test_errors_pickle():
    error = pickle.loads(pickle.dumps(UnreadableImage(decoding.BROKEN, "why")))
    assert (error.reason, error.detail, str(error)) == (
        decoding.BROKEN,
        "why",
        "broken image: why",
    )


# Files.


def test_files_that_are_none(tmp_path):
    (tmp_path / "empty.jpg").touch()
    os.mkfifo(tmp_path / "pipe.jpg")
    expected = {
        "gone.jpg": decoding.MISSING,
        "empty.jpg/below.jpg": decoding.MISSING,
        "zero\0byte": decoding.MISSING,
        "empty.jpg": decoding.EMPTY,
        "pipe.jpg": decoding.NOT_A_FILE,
        "": decoding.NOT_A_FILE,
        "x" * 5000: decoding.NO_ACCESS,
    }
    for name, reason in expected.items():
        with pytest.raises(UnreadableImage) as error:
            read_picture(os.path.join(tmp_path, name))
        assert error.value.reason == reason, name


def test_huge_files_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("protoclip_jax.data.files.MAX_BYTES", 100)
    (tmp_path / "a.jpg").write_bytes(bytes(101))
    with pytest.raises(UnreadableImage, match="101 bytes"):
        read_picture(str(tmp_path / "a.jpg"))


# Crops.


@pytest.mark.parametrize("width", range(1, 40, 3))
@pytest.mark.parametrize("height", [1, 7, 33, 34, 200])
def test_evaluation_crop_of_any_shape(width, height):
    crop = evaluation_crop(smooth(width, height), 33)
    assert crop.shape == (33, 33, 3)


def test_a_long_strip_is_not_blown_up(monkeypatch):
    """The direct way for strips gives the same picture."""
    image = smooth(7, 400)
    slow = evaluation_crop(image, 64).astype(int)
    monkeypatch.setattr(decoding, "_MAX_RESIZED", 0)
    assert np.abs(evaluation_crop(image, 64).astype(int) - slow).max() <= 2
    assert evaluation_crop(Image.new("RGB", (1, 60_000), "red"), 224).shape == (224, 224, 3)


def test_plain_takes_pictures_that_users_open():
    image, _ = clear_corner("RGBA")
    assert plain(image).mode == "RGB"
    assert np.asarray(plain(image))[0, 0].tolist() == [255, 255, 255]
    assert plain(Image.new("L", (2, 2))).mode == "L"
