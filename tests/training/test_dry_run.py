"""What a dry run tells is what the trainer does: phases, rates, and the model's numbers."""

import jax
import pytest
from tiny_run import (
    small_config,
    tiny_models,  # noqa: F401 (a fixture)
)

from protoclip_jax.training import dry_run, state

SETTINGS = {
    "episode__count": 3,
    "episode__size": 40,
    "episode__locked": 1,
    "optimizer__batch": 16,
    "optimizer__warmup_steps": 1,
    "optimizer__text_learning_rate": 1e-3,
    "objective__clip": 0.5,
    "objective__external": 0.25,
    "data__teacher": "teacher.npy",
}


@pytest.mark.usefixtures("tiny_models")
def test_the_plan_is_that_of_the_run():
    config = small_config("pairs.tsv", num_devices=8, **SETTINGS)
    lines = dry_run.describe(config).splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith("Learning rate")]
    assert lines[at].split()[-4:] == ["image", "tower", "the", "rest"]
    rates = [line.split() for line in lines[at + 1 : at + 6]]
    # Half cosines: the image tower's over three steps to the lock, the rest's over five.
    assert rates == [
        ["0", "0.0005", "0.001"],
        ["1", "0.0005", "0.001"],
        ["3", "0.000125", "0.000655"],
        ["4", "0", "0.000345"],
        ["5", "0", "9.55e-05"],
    ]
    (at,) = [number for number, line in enumerate(lines) if line.startswith("Episodes")]
    assert "3 of 40 pairs, 2 steps of 16 pairs: 6 steps" in lines[at]
    assert [" ".join(line.split()) for line in lines[at + 1 : at + 4]] == [
        "1 to 1 warmup loss = 0.5 clip + 0 prototype + 0 external; trained: image, text",
        "2 to 2 prototype loss = 0.5 clip + 1 prototype + 0.25 external; "
        "trained: image, text, heads",
        "3 to 3 locked loss = 0.5 clip + 0 prototype + 0 external; trained: text",
    ]
    _, like = state.shapes(config)
    count = sum(leaf.size for leaf in jax.tree.leaves(like["params"]))
    (all_,) = [line.split() for line in lines if line.startswith("  all  ")]
    assert all_[1] == f"{count:,}"
    assert float(all_[2]) == pytest.approx(4 * count / 1e6, abs=0.06)
