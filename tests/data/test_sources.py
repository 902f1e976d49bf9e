"""Sources by name, and random subsets of them."""

import argparse
import pickle
from pathlib import Path

import numpy as np
import pytest

from protoclip_jax.data.emoji_text import EmojiText
from protoclip_jax.data.source_options import add_source_options, chosen_source
from protoclip_jax.data.sources import KINDS, needless_limit, open_source, where

CASES = Path(__file__).parents[1] / "cases"
LIST = str(CASES / "DIST-01" / "pairs.tsv")


def test_a_pair_list_by_its_name():
    source = open_source(LIST)
    assert len(source) == 13
    assert source.name == LIST
    data, caption = source.read(3)
    assert data[:2] == b"\xff\xd8"
    assert caption == "an old lighthouse in the fog"


def test_options_reach_the_list():
    source = open_source(str(CASES / "TSV-05" / "comma.tsv"), separator=",")
    assert len(source) == 8
    source = open_source(LIST, image_root="/elsewhere")
    assert where(source, 0) == "/elsewhere/images/ok00.jpg"


def test_emoji_text_by_its_name():
    source = open_source("emoji_text/val")
    data, caption = source.read(0)
    assert len(source) == len(EmojiText("val"))
    assert (data, caption) == EmojiText("val").read(0)
    assert where(source, 0) == "emoji_text/val row 0"


def test_unknown_kinds_list_what_there_is():
    with pytest.raises(ValueError, match="'somewhere'") as error:
        open_source("somewhere")
    for form, _, _ in KINDS:
        assert form in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_list():
    with pytest.raises(FileNotFoundError, match=r"nowhere.tsv"):
        open_source("nowhere.tsv")


def test_limit_draws_a_seeded_subset():
    whole = open_source(LIST)
    some = open_source(LIST, limit=5, seed=3)
    again = open_source(LIST, limit=5, seed=3)
    other = open_source(LIST, limit=5, seed=4)
    assert len(some) == 5
    assert len(set(some.rows.tolist())) == 5
    assert np.all(np.diff(some.rows) > 0)
    assert some.rows.tolist() == again.rows.tolist() != other.rows.tolist()
    assert [some.read(i) for i in range(5)] == [whole.read(int(row)) for row in some.rows]
    assert where(some, 2) == where(whole, int(some.rows[2]))
    assert some.fingerprint == again.fingerprint
    assert len({whole.fingerprint, some.fingerprint, other.fingerprint}) == 3


def test_a_limit_above_the_length_takes_all():
    assert len(open_source(LIST, limit=14)) == 13
    assert open_source(LIST, limit=13).fingerprint == open_source(LIST).fingerprint
    assert needless_limit(13, 14) == "there are only 13 pairs, and all are used"
    assert needless_limit(13, 13) is needless_limit(13, None) is None


def test_a_limit_above_the_length_is_told_by_commands(capsys):
    parser = argparse.ArgumentParser()
    add_source_options(parser)
    for limit in (12, 13, 14):
        options = parser.parse_args([f"--limit={limit}"])
        options.source = LIST
        assert len(chosen_source(options)) == min(limit, 13)
        told = capsys.readouterr().err
        assert told == ("protoclip_jax: --limit=14: there are only 13 pairs, and all are used\n"
                        if limit == 14 else "")  # fmt: skip


def test_a_subset_of_a_list_keeps_its_report():
    source = open_source(str(CASES / "TSV-01" / "pairs.tsv"), limit=4)
    assert {reason: dropped.count for reason, dropped in source.report.items()} == {"no caption": 3}


def test_subsets_pickle():
    source = pickle.loads(pickle.dumps(open_source(LIST, limit=5)))
    assert source.read(4)[0]
