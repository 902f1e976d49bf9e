"""Images and texts as callers give them: one feature for one image, one clear line for the rest."""

import io
from pathlib import Path

import jax
import numpy as np
import plain_input
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image
from tiny_run import MODELS

from protoclip_jax.data.decoding import UnreadableImage, decode, plain
from protoclip_jax.encoder import SIZES, Encoder
from protoclip_jax.models import clip

start = jax.jit(clip.initialise, static_argnums=0)
SIDE = MODELS["test-vit"].vision.image_size


@pytest.fixture(scope="module")
def encoder():
    config = MODELS["test-vit"]
    graphdef, params, stats = start(config, 0)
    # At its start a text tower hears little of the words: a feature has to depend on them.
    params["text"]["token_embedding"] = params["text"]["token_embedding"] * 50
    params["text"]["positional_embedding"] = params["text"]["positional_embedding"] * 50
    return Encoder(config, graphdef, params, stats)


def pixels(width: int = 50, height: int = 36) -> np.ndarray:
    small = np.random.default_rng(0).integers(0, 255, (3, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height)))


def png(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def test_one_image_is_one_row_however_it_is_given(encoder, tmp_path):
    # Case API-03, at another size than the model's and at its own.
    for array in (pixels(), pixels(SIDE, SIDE)):
        path = tmp_path / "one.png"
        path.write_bytes(png(Image.fromarray(array)))
        expected = encoder.encode_image([array])
        assert expected.shape == (1, 16)
        given = {
            "array": array,
            "array of n": array[None],
            "jax": jax.numpy.asarray(array),
            "fortran": np.asfortranarray(array),
            "PIL": Image.fromarray(array),
            "lazy PIL": Image.open(path),
            "str": str(path),
            "Path": path,
            "bytes": path.read_bytes(),
            "bytearray": bytearray(path.read_bytes()),
            "memoryview": memoryview(path.read_bytes()),
            "list of paths": [path],
            "tuple of bytes": (path.read_bytes(),),
            "array of names": np.array([str(path)]),
            "generator": (image for image in [path]),
        }
        for name, value in given.items():
            np.testing.assert_array_equal(encoder.encode_image(value), expected, err_msg=name)


def test_features_are_the_towers_of_what_was_given(encoder):
    """Beside the towers alone, which the golden files prove."""
    graphdef, *_ = start(encoder.config, 0)
    images, texts = [pixels(), pixels(33, 60)[:, ::-1]], ["a red kite", "two &amp; a  half dogs"]
    square = np.stack([plain_input.middle(Image.fromarray(image), SIDE) for image in images])
    tokens = np.array([plain_input.tokens(text) for text in texts], np.int32)
    towers = jax.jit(lambda *inputs: clip.apply(graphdef, *inputs, train=False)[0])
    normal = np.float32(plain_input.normalised(square / 255))
    expected = towers(encoder.params, encoder.batch_stats, normal, tokens)
    image, text = encoder.encode_image(images), encoder.encode_text(texts)
    # Another resizer may differ by a level here and there.
    np.testing.assert_allclose(image, expected.image, atol=5e-3)
    np.testing.assert_allclose(text, expected.text, atol=1e-5)
    for found in (image, text):
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        assert np.abs(found[0] - found[1]).max() > 0.05


def test_home_folder_in_a_path(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "one.png").write_bytes(png(Image.fromarray(pixels())))
    np.testing.assert_array_equal(encoder.encode_image("~/one.png"), encoder.encode_image(pixels()))
    with pytest.raises(ValueError, match="there is no home folder ~nobody-of-that-name"):
        encoder.encode_image("~nobody-of-that-name/one.png")


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV", "I;16"])
def test_mode_of_a_pil_image_makes_no_difference(encoder, mode, tmp_path):
    """The feature is that of its own RGB pixels, not of an alpha or palette that is cut off."""
    image = Image.fromarray(pixels())
    if mode == "I;16":
        grey = np.asarray(image.convert("L"))
        image = Image.fromarray(grey.astype(np.uint16) * 257)
        assert image.mode == mode
    elif mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(pixels()[:, ::-1, 0]))
        image = image.convert(mode)
    else:
        image = image.convert(mode)
    seen = np.asarray(plain(image).convert("RGB"))
    found = encoder.encode_image(image)
    np.testing.assert_array_equal(found, encoder.encode_image(seen))
    if mode in ("L", "1", "P", "LA", "RGBA", "I;16"):
        np.testing.assert_array_equal(found, encoder.encode_image(png(image)))


@pytest.mark.parametrize(
    "array",
    [
        pixels()[..., 0].astype(np.int32),
        pixels()[..., 0].astype(np.float32),
        pixels()[..., 0].astype(np.float32) / 127.5 - 1,
        np.zeros((9, 9), np.int32),
    ],
    ids=["I", "F", "F from -1 to 1", "black"],
)
def test_pil_images_of_an_unknown_range_are_refused(encoder, array):
    image = Image.fromarray(array)
    with pytest.raises(ValueError, match=rf"^image 1 is a PIL image of mode {image.mode}, whose"):
        encoder.encode_image([pixels(), image])


@pytest.mark.parametrize(("form", "mode"), [("PPM", "I"), ("TIFF", "F")])
def test_deep_files_are_the_same_opened_or_not(encoder, form, mode, tmp_path):
    grey, path = pixels()[..., 0], tmp_path / "deep"
    array = grey.astype(np.uint16) * 257 if mode == "I" else grey.astype(np.float32)
    Image.fromarray(array).save(path, form)
    with Image.open(path) as image:
        assert image.mode == mode
        np.testing.assert_array_equal(encoder.encode_image(image), encoder.encode_image(path))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_a_pil_image_is_that_of_its_file(encoder, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = png(Image.fromarray(pixels()), exif=exif)
    upright = decode(data)
    expected = encoder.encode_image(data)
    np.testing.assert_array_equal(encoder.encode_image(Image.open(io.BytesIO(data))), expected)
    np.testing.assert_array_equal(encoder.encode_image(np.asarray(upright)), expected)
    # What was turned upright is not turned again.
    np.testing.assert_array_equal(encoder.encode_image(upright), expected)
    np.testing.assert_array_equal(encoder.encode_image(upright.copy()), expected)
    if orientation > 1:
        assert np.abs(encoder.encode_image(pixels()) - expected).max() > 1e-3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (pixels().astype(np.float32), r"float32 \(36, 50, 3\): wanted uint8 .*255 \* x"),
        (pixels()[None] / 255, r"float64 \(1, 36, 50, 3\)"),
        (pixels().astype(np.int64), r"int64 \(36, 50, 3\)"),
        (pixels().astype(np.uint16), r"uint16 \(36, 50, 3\)"),
        (pixels() > 9, r"bool \(36, 50, 3\)"),
        (pixels()[None].transpose(0, 3, 1, 2), "channels go last"),
        (pixels().transpose(2, 0, 1), "channels go last"),
        (pixels()[..., 0], r"\(36, 50\): wanted .*PIL"),
        (np.zeros((36, 50, 4), np.uint8), r"\(36, 50, 4\): wanted .*PIL"),
        (np.zeros((36, 50, 1), np.uint8), r"\(36, 50, 1\)"),
        (np.zeros((2, 36, 50), np.uint8), r"\(2, 36, 50\)"),
        (np.zeros((1, 1, 36, 50, 3), np.uint8), r"\(1, 1, 36, 50, 3\)"),
        (np.zeros((0, 50, 3), np.uint8), r"\(0, 50, 3\)"),
        (np.zeros((2, 36, 0, 3), np.uint8), r"\(2, 36, 0, 3\)"),
        (np.uint8(3), r"uint8 \(\)"),
        ([pixels(), pixels().astype(np.float32)], "image 1 is float32"),
        ([pixels()[..., 0]], r"image 0 is uint8 \(36, 50\)"),
        ([pixels()[None]], r"image 0 is uint8 \(1, 36, 50, 3\)"),
        ([pixels().tolist()], "image 0 is a list: wanted a path"),
        ([7], "image 0 is a int"),
        ([None], "image 0 is None"),
        (None, "not as None"),
        (7, "not as a int"),
        ({"a": pixels()}, "not as a dict"),
        ({"a.png"}, "not as a set"),
        (io.BytesIO(b"x"), "not as a BytesIO"),
    ],
)
def test_anything_else_is_refused_in_one_line(encoder, value, message):
    with pytest.raises(ValueError, match=message) as caught:
        encoder.encode_image(value)
    assert "\n" not in str(caught.value)


def test_unreadable_images_are_named(encoder, tmp_path):
    (tmp_path / "page.png").write_bytes(b"<html>")
    whole = png(Image.fromarray(pixels()))
    (tmp_path / "cut.png").write_bytes(whole[:60])
    for value, reason in (
        ([pixels(), tmp_path / "none.png"], "missing file: image 1, .*none.png"),
        (tmp_path, "not a regular file: image 0, "),
        (tmp_path / "page.png", "not an image: image 0, .*page.png"),
        ([b""], "empty file: image 0"),
        (Image.open(tmp_path / "cut.png"), "image: image 0"),
        (Image.new("RGB", (0, 5)), "0 x 5 pixels"),
    ):
        with pytest.raises(UnreadableImage, match=reason):
            encoder.encode_image(value)


def test_nothing_gives_no_row(encoder):
    for found in (
        encoder.encode_image([]),
        encoder.encode_image(np.zeros((0, 9, 9, 3), np.uint8)),
        encoder.encode_text([]),
    ):
        assert found.shape == (0, 16)
        assert found.dtype == np.float32


def counted(encoder: Encoder, numbers) -> tuple[dict[int, int], int]:
    """Rows that the model computes for calls of so many images, and programs that it needs."""
    work, shapes = {}, set()

    def model(params, batch_stats, block):
        shapes.add(block.shape)
        work[number] = work.get(number, 0) + len(block)
        return np.asarray(block, np.float32)

    for number in numbers:
        rows = np.arange(2 * number).reshape(number, 2)
        found = encoder._in_batches(model, iter(rows))
        np.testing.assert_array_equal(found, rows)
    return work, len(shapes)


def test_few_images_do_not_cost_a_large_batch(encoder):
    work, programs = counted(encoder, range(1, 600))
    assert work[1] == 1
    assert programs == len(SIZES) == 5
    for number, computed in work.items():
        assert number <= computed < 4 * number, number
        assert computed - number < 256
    assert work[257] == 256 + 1


def test_sizes_are_multiples_of_the_devices():
    config = MODELS["test-vit"]
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    encoder = Encoder(config, *start(config, 0), rows=rows)
    work, programs = counted(encoder, range(1, 300))
    assert (work[1], work[9], work[17], work[65]) == (8, 16, 64, 256)
    assert programs == 4


def test_company_does_not_change_a_feature(encoder):
    images = np.random.default_rng(1).integers(0, 255, (7, SIDE, SIDE, 3), np.uint8)
    texts = [f"picture number {number}" for number in range(7)]
    for encode, items in ((encoder.encode_image, images), (encoder.encode_text, texts)):
        together = encode(items)
        alone = np.concatenate([encode(items[number]) for number in range(7)])
        # Another size sums float32 products in another order.
        np.testing.assert_allclose(alone, together, atol=1e-6)
        assert np.abs(together[0] - together[1]).max() > 1e-3


def glued(length: int, word: str) -> str:
    """A caption of `length` ids of which several are 0, and `word` somewhere in it."""
    return f"{word} " + "!🙂" + "a " * (length - 5)


@pytest.mark.parametrize("length", [24, 25, 26, 48, 49, 50, 77])
def test_captions_with_a_token_of_id_zero(encoder, length):
    texts = [glued(length, "red"), glued(length, "blue")]
    tokens = encoder._tokenizer(texts)
    assert ((tokens == 0).sum(axis=1) > 77 - length).all()
    assert (tokens.argmax(axis=1) == length - 1).all()
    whole = encoder._text_features(encoder.params, encoder.batch_stats, tokens)
    found = encoder.encode_text(texts)
    np.testing.assert_allclose(found, whole, atol=1e-6)
    assert np.abs(found[0] - found[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "not a NoneType"),
        (b"a dog", "not a bytes"),
        (3, "not a int"),
        ({"a": "dog"}, "not a dict"),
        (["a dog", None], "text 1 is a NoneType"),
        (["a dog", float("nan")], "text 1 is a float"),
        ([["a dog"]], "text 0 is a list"),
        (Path("a"), "not a PosixPath"),
        (np.array("a dog"), "iteration over a 0-d array"),
        (np.array(3), "iteration over a 0-d array"),
        (np.array([["a dog"]]), "text 0 is a ndarray"),
        (np.array([b"a dog"]), "text 0 is a bytes_"),
    ],
)
def test_texts_of_another_type_are_refused(encoder, value, message):
    with pytest.raises(ValueError, match=message):
        encoder.encode_text(value)


def test_one_text_is_one_row(encoder):
    expected = encoder.encode_text(["a dog"])
    assert expected.shape == (1, 16)
    for value in ("a dog", ("a dog",), np.array(["a dog"]), iter(["a dog"])):
        np.testing.assert_array_equal(encoder.encode_text(value), expected)
    # Documented: the empty text is no error.
    assert np.isfinite(encoder.encode_text("")).all()
