"""What a run reads is opened, or refused in a line that names the option."""

from pathlib import Path

import numpy as np
import pytest
from tiny_run import small_config

from protoclip_jax.config import ConfigError
from protoclip_jax.data.emoji_text import EmojiText
from protoclip_jax.data.sources import open_source
from protoclip_jax.training import input as module

PAIRS = open_source(str(Path(__file__).parents[1] / "cases" / "DIST-01" / "pairs.tsv"))


def opened(train: str, source, teacher: str = "emoji_text"):
    config = small_config(train, data__teacher=teacher, objective__external=1)
    return module._open_teacher(config, source)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("own.tsv", "python -m protoclip_jax.teacher own.tsv --out"),
        ("cc3m_256", "of emoji_text/train only, and data.train=cc3m_256"),
        ("cc3m/train", "of emoji_text/train only, and data.train=cc3m/train"),
        ("tfds:coco", "of emoji_text/train only, and data.train=tfds:coco"),
        ("emoji_text/val", "none for 'val'"),
        ("emoji_text/test", "none for 'test'"),
    ],
)
def test_features_of_the_package_are_of_its_own_pairs_only(train, words):
    with pytest.raises(ConfigError, match=r"^config\.data\.teacher=emoji_text: ") as caught:
        opened(train, PAIRS)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_features_of_the_package_fit_its_pairs():
    assert len(opened("emoji_text/train", EmojiText("train"))) == 6804


def test_a_teacher_that_says_nothing_names_the_option(tmp_path):
    np.save(tmp_path / "t.npy", np.zeros((13, 8), np.float32))
    with pytest.raises(ConfigError, match=r"^config\.data\.teacher=.*: all 13 rows are 0"):
        opened("own.tsv", PAIRS, str(tmp_path / "t.npy"))
