"""Padding that need not be computed: captions are short, the context is long."""

import numpy as np
from jaxtyping import Int

# Few lengths, since each is a program of its own to compile. Nine captions in ten have at most 24
# tokens; at 77 the text tower of a small model costs more than the image tower.
LENGTHS = (24, 48)


def without_padding(tokens: Int[np.ndarray, "n t"]) -> Int[np.ndarray, "n s"]:
    """Cuts columns behind the end token of every row, down to one of `LENGTHS`.

    Features do not change: the text tower is causal and pools at the end token, so what stands
    after it is never seen. As there, the end token is the first largest id of a row: padding is 0,
    but so is a token of the vocabulary.
    """
    longest = int(np.max(tokens.argmax(axis=1), initial=0)) + 1
    for length in LENGTHS:
        if longest <= length < tokens.shape[1]:
            return tokens[:, :length]
    return tokens
