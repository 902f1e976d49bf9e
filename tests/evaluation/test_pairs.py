import numpy as np
import pytest
from evaluation_fakes import COLOURS, ConstantEncoder, FakeEncoder, FakeSource

from protoclip_jax.data.decoding import UnreadableImage
from protoclip_jax.evaluation import geometry, retrieval
from protoclip_jax.evaluation.pairs import evaluate_pairs


class SeveralCaptions:
    """Rows of a picture and one of its captions, in no particular order."""

    def __init__(self, rows):
        self.source, self.rows = FakeSource([*COLOURS]), rows

    def __len__(self):
        return len(self.rows)

    def read(self, row):
        picture, caption = self.rows[row]
        if picture is None:
            raise UnreadableImage("broken image")
        if isinstance(picture, bytes):
            return picture, caption
        return self.source.read(picture)[0], caption


ROWS = [(2, "blue"), (0, "red"), (2, "a blue thing"), (1, "green"), (0, "pink red"), (7, "pink")]


def test_rows_with_one_picture_are_its_captions():
    source, encoder = SeveralCaptions(ROWS), FakeEncoder()
    metrics, chance = evaluate_pairs(encoder, source, batch=2)
    assert metrics["data/pictures"] == 4
    assert metrics["data/captions"] == 6
    images = np.concatenate([encoder.encode_image(_pixels(source, i)) for i in (2, 0, 1, 7)])
    texts = encoder.encode_text([caption for _, caption in ROWS])
    own = np.array([0, 1, 0, 2, 1, 3])
    for name, value in retrieval.retrieve(images, texts, own).items():
        assert metrics[f"retrieval/{name}"] == pytest.approx(value), name
    for name, value in geometry.evaluate(images, texts[[0, 1, 3, 5]]).items():
        assert metrics[f"geometry/{name}"] == pytest.approx(value, abs=1e-6), name
    assert chance["retrieval/image_to_text_r1"] == pytest.approx(100 * np.mean([2, 2, 1, 1]) / 6)


def _pixels(source, picture):
    from protoclip_jax.data.decoding import decode, evaluation_crop

    return evaluation_crop(decode(source.source.read(picture)[0]), FakeEncoder.image_size)[None]


def test_unreadable_pictures_leave_with_their_captions():
    rows = [(b"<html>", "nothing"), *ROWS[:3], (None, "gone"), *ROWS[3:], (b"<html>", "again")]
    plain, _ = evaluate_pairs(FakeEncoder(), SeveralCaptions(ROWS))
    found, _ = evaluate_pairs(FakeEncoder(), SeveralCaptions(rows))
    assert found["data/unreadable"] == 2
    assert {**found, "data/unreadable": 0.0} == pytest.approx(plain)


def test_pairs_without_a_caption_are_left_out():
    rows = [(3, "&nbsp;"), *ROWS[:3], (2, "\u200b"), *ROWS[3:]]
    plain, _ = evaluate_pairs(FakeEncoder(), SeveralCaptions(ROWS))
    found, _ = evaluate_pairs(FakeEncoder(), SeveralCaptions(rows))
    assert found["data/unreadable"] == 2
    assert {**found, "data/unreadable": 0.0} == pytest.approx(plain)


def test_a_collapsed_model_gets_chance():
    metrics, chance = evaluate_pairs(ConstantEncoder(), SeveralCaptions(ROWS))
    for name, level in chance.items():
        assert metrics[name] == pytest.approx(level), name


def test_no_pairs_are_refused():
    with pytest.raises(ValueError, match="found 0 pairs"):
        evaluate_pairs(FakeEncoder(), SeveralCaptions([]))
