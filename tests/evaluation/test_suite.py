import numpy as np
import pytest
from evaluation_fakes import COLOURS, ConstantEncoder, FakeEncoder, FakeSource

from protoclip_jax.data.emoji_text import EmojiText
from protoclip_jax.encoder import Encoder
from protoclip_jax.evaluation.suite import Labels, SuiteSettings, chance, evaluate
from protoclip_jax.evaluation.table import comparison_table
from protoclip_jax.models import clip
from protoclip_jax.models.presets import preset

TRAIN = FakeSource([*COLOURS] * 6, seed=1)
TEST = FakeSource([*COLOURS], seed=2)
VAL = FakeSource(["red", "green", "blue", "white", "black", "cyan"] * 2, seed=3)
SETTINGS = SuiteSettings(batch=5, regularisation=(1.0, 10.0))


def test_a_model_that_knows_the_colours_gets_everything_right():
    found = evaluate(FakeEncoder(), TRAIN, TEST, VAL, SETTINGS)
    for name, value in found.items():
        if name.startswith(("zero_shot", "retrieval")):
            assert value == 100.0, name
    assert found["linear_probe/top1"] > chance(TRAIN, TEST, VAL)["linear_probe/top1"]
    assert found["geometry/alignment"] > 0.95
    assert all(isinstance(value, float) for value in found.values())


def test_a_collapsed_model_gets_chance():
    found = evaluate(ConstantEncoder(), TRAIN, TEST, VAL, SETTINGS)
    expected = chance(TRAIN, TEST, VAL, SETTINGS)
    assert set(expected) <= set(found)
    for name, level in expected.items():
        assert found[name] == pytest.approx(level, abs=1e-4), name
    assert found["geometry/modality_gap"] == pytest.approx(0, abs=1e-6)


def test_same_model_same_numbers():
    first, second = (evaluate(FakeEncoder(), TRAIN, TEST, VAL, SETTINGS) for _ in range(2))
    assert first == second


def test_labels_are_numbered_alike_in_train_and_test():
    settings = SuiteSettings(probe_rows=20, seed=4)
    labels = Labels.of(TRAIN, TEST, VAL, settings)
    assert len(labels.probe_rows) == len(set(labels.probe_rows)) == 20
    train_names = np.array(TRAIN.column("subgroup"))[labels.probe_rows]
    names = dict(zip(labels.train_label, train_names, strict=True))
    assert [names[i] for i in labels.test_label] == TEST.column("subgroup")
    assert [labels.val_concepts[i] for i in labels.val_concept] == VAL.column("concept")
    assert labels.val_concepts == sorted(set(VAL.column("concept")))


@pytest.mark.slow
def test_an_untrained_model_on_emoji_text_is_near_chance():
    config = preset("tiny-rn")
    encoder = Encoder(config, *clip.initialise(config, 0))
    sources = [EmojiText(split) for split in ("train", "test", "val")]
    settings = SuiteSettings(probe_rows=1024)
    found, levels = evaluate(encoder, *sources, settings), chance(*sources, settings)
    assert set(levels) <= set(found)
    assert levels["zero_shot/top1"] == pytest.approx(100 / len(sources[1]))
    for name, level in levels.items():
        if name.startswith(("zero_shot", "retrieval")):
            assert found[name] < level + 2, name
    table = comparison_table({"untrained": found}, levels)
    assert max(map(len, table.splitlines())) <= 80
