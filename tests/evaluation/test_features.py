import numpy as np
import pytest
from evaluation_fakes import SIZE, FakeEncoder, FakeSource

from protoclip_jax.evaluation.features import (
    extract_images,
    extract_readable,
    extract_texts,
    finite_features,
    normalise,
    score_blocks,
)


@pytest.mark.parametrize(("count", "batch"), [(1, 4), (4, 4), (9, 4), (9, 100)])
def test_pictures_come_back_in_order_whatever_the_batch(count, batch):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (count, SIZE, SIZE, 3)).astype(np.uint8)
    encoder = FakeEncoder()
    found = extract_images(encoder, pictures.__getitem__, count, batch=batch, threads=3)
    np.testing.assert_array_equal(found, encoder.encode_image(pictures))


def test_equal_texts_are_encoded_once():
    class Counting(FakeEncoder):
        seen = 0

        def encode_text(self, texts):
            self.seen += len(texts)
            return super().encode_text(texts)

    encoder, texts = Counting(), ["red", "blue", "red", "green", "red"]
    found = extract_texts(encoder, texts, batch=2)
    assert encoder.seen == 3
    np.testing.assert_array_equal(found, FakeEncoder().encode_text(texts))


def test_unreadable_pictures_are_left_out_and_named(caplog):
    source = FakeSource(["red", "green", "blue", "red"])
    files = [source.read(i)[0] for i in range(4)]
    files[1] = b"<html>not found</html>"

    def read(row):
        if row == 3:
            raise FileNotFoundError("gone.png")
        return files[row]

    features, readable = extract_readable(FakeEncoder(), read, 4, batch=2)
    assert readable.tolist() == [True, False, True, False]
    assert len(features) == 2
    assert "left out 2 of 4 pictures: row 1 (" in caplog.text
    with pytest.raises(ValueError, match="none of 1 pictures can be read; the first is row 0"):
        extract_readable(FakeEncoder(), lambda row: b"", 1)


def test_score_blocks_equal_the_whole_product():
    rng = np.random.default_rng(0)
    queries, corpus = rng.normal(size=(10, 5)), rng.normal(size=(7, 5))
    blocks = list(score_blocks(queries, corpus, rows=4))
    assert [len(scores) for _, scores in blocks] == [4, 4, 2]
    np.testing.assert_allclose(
        np.concatenate([scores for _, scores in blocks]), queries @ corpus.T, rtol=1e-6
    )


def test_normalise_leaves_a_zero_row_zero():
    found = normalise(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32))
    np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0]])
    assert found.dtype == np.float32


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(ValueError, match="no image features"):
        finite_features(np.zeros((0, 4)), "image")
    with pytest.raises(ValueError, match="no pictures"):
        extract_images(FakeEncoder(), lambda row: None, 0)
    with pytest.raises(ValueError, match="no texts"):
        extract_texts(FakeEncoder(), [])
