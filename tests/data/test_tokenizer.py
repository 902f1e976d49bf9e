"""The tokenizer: open_clip's ids, every language, the end token kept."""

import html
import json
import multiprocessing
import pickle
import random
from pathlib import Path

import ftfy
import numpy as np
import pytest
from golden_files import golden, golden_json

from protoclip_jax.data.sources import open_source
from protoclip_jax.data.tokenizer import Tokenizer, clean

CASES = Path(__file__).parents[1] / "cases"


def case(name: str) -> tuple[list[str], list[str]]:
    """Captions of the case's bad rows (numbered from 0) as training reads them, and the others."""
    bad = json.loads((CASES / name / "case.json").read_text())["rows"]
    source = open_source(str(CASES / name / "pairs.tsv"))
    captions = [source.read(row)[1] for row in range(len(source))]
    return [captions[row] for row in bad], [c for row, c in enumerate(captions) if row not in bad]


@pytest.mark.core
def test_ids_equal_open_clip():
    arrays, described = golden("tokenizer"), golden_json("tokenizer")
    strings = described["strings"]
    compared = 0
    for key in arrays:
        if not key.startswith("ids_open_clip_current_ctx"):
            continue
        length = int(key.removeprefix("ids_open_clip_current_ctx"))
        tokenizer = Tokenizer(length)
        ids = tokenizer(strings)
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids, arrays[key], err_msg=key)
        compared += 1
    assert compared == 2
    tokenizer = Tokenizer()
    assert (tokenizer.sot, tokenizer.eot) == (described["sot"], described["eot"])
    assert tokenizer.vocab_size == described["vocab"]
    np.testing.assert_array_equal(tokenizer.lengths(strings), arrays["full_length_with_sot_eot"])


@pytest.mark.core
def test_alone_or_in_a_batch_gives_the_same_row():
    strings, tokenizer = golden_json("tokenizer")["strings"][-40:], Tokenizer(32)
    together = tokenizer(strings)
    for row, text in zip(together, strings, strict=True):
        np.testing.assert_array_equal(tokenizer(text)[0], row)
    assert tokenizer([]).shape == (0, 32)


def test_long_caption_keeps_its_end_token():
    """TOK-01."""
    (long,), others = case("TOK-01")
    tokenizer = Tokenizer()
    assert tokenizer.lengths([long])[0] > 77
    ids = tokenizer([long, "zebra " + long.split(" ", 1)[1], *others])
    assert ids.shape[1] == 77
    assert ids[0, -1] == tokenizer.eot
    assert not np.array_equal(ids[0], ids[1])
    # The text tower pools at the largest id, so each row must have one end token, and it last.
    assert (ids.max(axis=1) == tokenizer.eot).all()
    assert ((ids == tokenizer.eot).sum(axis=1) == 1).all()
    for length in (2, 3, 76):
        short = Tokenizer(length)([long])[0]
        assert (short[0], short[-1]) == (tokenizer.sot, tokenizer.eot)


def test_entities_and_mojibake_are_mended():
    """TOK-03."""
    (once, twice, composed, decomposed, mojibake), _ = case("TOK-03")
    tokenizer = Tokenizer()
    ids = tokenizer([once, twice, "fish & chips", composed, decomposed, mojibake])
    np.testing.assert_array_equal(ids[0], ids[2])
    np.testing.assert_array_equal(ids[1], ids[2])
    np.testing.assert_array_equal(ids[4], ids[3])
    np.testing.assert_array_equal(ids[5], ids[3])


def test_every_language_passes_through():
    """TOK-05."""
    titles, _ = case("TOK-05")
    tokenizer = Tokenizer()
    rows = {tuple(row) for row in tokenizer([*titles, ""])}
    assert len(rows) == len(titles) + 1
    # Each is told apart by its own words, not merely not empty.
    assert len({tuple(row) for row in tokenizer([t[: len(t) // 2] for t in titles])} | rows) == 9


def test_the_short_way_through_cleaning_changes_nothing():
    letters = [chr(code) for code in range(32, 127)] + ["\t", "\n", "\x00", "\x1b[31m", "&amp;"]
    draw = random.Random(0)
    for _ in range(3000):
        text = "".join(draw.choice(letters) for _ in range(draw.randint(0, 30)))
        slow = html.unescape(html.unescape(ftfy.fix_text(text)))
        assert clean(text) == " ".join(slow.split()).lower()


@pytest.mark.parametrize("text", ["", "   ", "\x00", "\ud800 half a pair", "a" * 100_000, "\u200d"])
def test_odd_captions_still_give_a_row(text):
    ids = Tokenizer(16)([text])
    assert ids[0, 0] == Tokenizer().sot
    assert (ids == Tokenizer().eot).sum() == 1


def test_too_short_a_context_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        Tokenizer(1)


def test_works_in_a_spawned_worker():
    tokenizer = Tokenizer(16)
    assert len(pickle.dumps(tokenizer)) < 200
    texts = ["a cat", "日本の猫"]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(tokenizer, (texts,)), tokenizer(texts))
