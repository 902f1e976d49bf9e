"""Columns behind the end token are cut, and no others."""

import numpy as np
import pytest

from protoclip_jax.data.padding import LENGTHS, without_padding
from protoclip_jax.data.tokenizer import Tokenizer

END = 49407


def row(length: int, zeros: int = 0) -> np.ndarray:
    """Ids of a caption that ends at `length`; the last `zeros` before its end are token 0."""
    ids = np.zeros(77, np.int32)
    ids[0], ids[1 : length - 1 - zeros], ids[length - 1] = END - 1, 5, END
    return ids


@pytest.mark.parametrize("zeros", [0, 1, 9])
@pytest.mark.parametrize(
    ("length", "columns"),
    [(12, 24), (23, 24), (24, 24), (25, 48), (48, 48), (49, 77), (57, 77), (77, 77)],
)
def test_length_is_that_of_the_end_token(length, columns, zeros):
    tokens = np.stack([row(3), row(length, zeros), row(12)])
    cut = without_padding(tokens)
    assert cut.shape == (3, columns)
    np.testing.assert_array_equal(cut.argmax(1), tokens.argmax(1))
    np.testing.assert_array_equal(cut, tokens[:, :columns])


def test_token_zero_is_a_token():
    # "!" before a symbol is id 0: these captions have more ids than those that are not zero.
    tokens = Tokenizer()(["!🙂" * 11 + "!", "a" + " !»" * 23])
    ends = tokens.argmax(1)
    assert (np.count_nonzero(tokens, axis=1) < ends + 1).all()
    for ids, end in zip(tokens, ends, strict=True):
        cut = without_padding(ids[None])
        assert cut[0, end] == END == cut.max()


def test_short_contexts_and_no_rows():
    assert without_padding(np.zeros((0, 77), np.int32)).shape == (0, LENGTHS[0])
    tokens = Tokenizer(16)(["a dog"])
    np.testing.assert_array_equal(without_padding(tokens), tokens)
