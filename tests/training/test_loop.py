"""The trainer, on runs of a few seconds."""

import shutil

import jax
import numpy as np
import pytest
from tiny_run import (
    final_state,
    metrics,
    small_config,
    tiny_models,  # noqa: F401 (a fixture)
    untimed,
    write_pairs,
)

import protoclip_jax
from protoclip_jax.config import ConfigError
from protoclip_jax.training import finished, loop
from protoclip_jax.training.checkpoint import Checkpoints

pytestmark = [pytest.mark.usefixtures("tiny_models")]


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "data")


def teacher(tmp_path, rows: int = 40):
    path = tmp_path / "teacher.npy"
    np.save(path, np.random.default_rng(1).normal(size=(rows, 5)).astype(np.float32))
    return path


def three_phases(pairs, tmp_path, **overrides):
    """One episode of each phase, with a teacher."""
    settings = {
        "episode__count": 3,
        "episode__warmup": 1,
        "episode__locked": 1,
        "data__teacher": teacher(tmp_path),
        "objective__external": 1,
    }
    return small_config(pairs, num_devices=8, **(settings | overrides))


def assert_equal_trees(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.core
def test_run_goes_through_the_three_phases_and_can_be_loaded(pairs, tmp_path, capsys):
    config, workdir = three_phases(pairs, tmp_path), tmp_path / "run"
    loop.train(config, workdir)
    lines = metrics(workdir)
    assert [line["phase"] for line in lines if "seconds/train" in line] == [
        "warmup",
        "prototype",
        "locked",
    ]
    assert lines[-1]["step"] == 9 == config.total_steps
    assert finished.is_marked(workdir, config)
    prototype = next(line for line in lines if line["phase"] == "prototype")
    warmup = next(line for line in lines if line["phase"] == "warmup")
    assert {"train/loss/prototype", "train/loss/external"} <= prototype.keys()
    assert "train/loss/prototype" not in warmup
    assert next(line for line in lines if "clusters/image_used" in line)["clusters/image_used"] > 1

    model = protoclip_jax.load(workdir)
    images = np.zeros((3, 50, 40, 3), np.uint8)
    assert model.encode_image(images).shape == (3, 16)
    texts = model.encode_text(["a red kite", "two"])
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, rtol=1e-5)

    loop.train(config, workdir)  # again: nothing left to do
    assert "is finished" in capsys.readouterr().err
    assert len(metrics(workdir)) == len(lines)


@pytest.mark.core
def test_stopped_run_goes_on_bit_for_bit(pairs, tmp_path, monkeypatch):
    config = three_phases(pairs, tmp_path, data__augmentation="light")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    loop.train(config, whole)

    run_episode = loop.Trainer.run_episode

    def stops_before_the_last(self, episode):
        if episode == 2:
            raise KeyboardInterrupt
        run_episode(self, episode)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Trainer, "run_episode", stops_before_the_last)
        with pytest.raises(KeyboardInterrupt):
            loop.train(config, broken)
    assert Checkpoints(broken).latest() == 6
    loop.train(config, broken)
    assert_equal_trees(final_state(config, whole), final_state(config, broken))
    # The log has every step once, with the same numbers.
    for left, right in zip(metrics(whole), metrics(broken), strict=True):
        assert untimed(left) == untimed(right)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test-vit", "test-rn"])
def test_locked_episode_moves_only_the_text_tower(pairs, tmp_path, name):
    settings = {"episode__count": 2, "episode__warmup": 1, "episode__locked": 1}
    config = small_config(pairs, num_devices=8, model__name=name, **settings)
    workdir = tmp_path / "run"
    loop.train(config, workdir)
    checkpoints = Checkpoints(workdir)
    trainer = loop.Trainer(config, workdir)
    before, after = (checkpoints.restore(step, trainer.state) for step in (3, 6))
    trainer.close()
    still = ("image_projection_head", "text_projection_head", "logit_scale_proto", "visual")
    for name in before["params"]:
        changed = any(
            np.any(np.asarray(x) != np.asarray(y))
            for x, y in zip(
                jax.tree.leaves(before["params"][name]),
                jax.tree.leaves(after["params"][name]),
                strict=True,
            )
        )
        assert changed == (name not in still), name
    assert_equal_trees(before["batch_stats"], after["batch_stats"])


@pytest.mark.slow
def test_plain_clip_runs_on_the_same_code(pairs, tmp_path):
    config = small_config(
        pairs, num_devices=8, model__projection="none", episode__count=1, episode__warmup=0
    )
    loop.train(config, tmp_path / "run")
    line = metrics(tmp_path / "run")[-1]
    assert line["phase"] == "clip"
    assert "loss/prototype" not in line


def test_start_tells_of_its_rows_and_a_change_is_refused_unless_harmless(pairs, tmp_path, capsys):
    """CKPT-05: every difference is listed with both values."""
    pairs.write_text(pairs.read_text() + "39.png\t\n")
    workdir = tmp_path / "run"
    first = {"episode__count": 2, "episode__warmup": 2}
    config = small_config(pairs, num_devices=8, **first)
    loop.train(config, workdir)
    told = capsys.readouterr().err
    assert "40 pairs of" in told
    assert "left out" in told
    assert "1 (line 42)" in told
    changed = small_config(
        pairs,
        num_devices=8,
        **first,
        model__projection=2,
        model__projection_width=10,
        episode__prototypes=5,
        episode__size=16,
        objective__back_translation=False,
        optimizer__beta1=0.8,
    )
    with pytest.raises(ConfigError) as caught:
        loop.train(changed, workdir)
    message = str(caught.value)
    assert "model.projection: stored 1, wanted 2" in message
    assert "model.projection_width: stored 12, wanted 10" in message
    assert "episode.prototypes: stored 6, wanted 5" in message
    assert "episode.size: stored 24, wanted 16" in message
    assert "objective.back_translation: stored true, wanted false" in message
    assert "optimizer.beta1: stored 0.9, wanted 0.8" in message
    loop.train(small_config(pairs, num_devices=8, **first, log__every=1), workdir)
    pairs.write_text(pairs.read_text().replace("number 3 ", "number 33 "))
    with pytest.raises(ConfigError, match="source: stored"):
        loop.train(config, workdir)
    before = (workdir / "metrics.jsonl").read_text()
    shutil.rmtree(workdir / "checkpoints")  # of a run that was over
    with pytest.raises(ConfigError, match="is of a finished run, whose checkpoints are gone"):
        loop.train(config, workdir)
    assert (workdir / "metrics.jsonl").read_text() == before


def test_episode_larger_than_the_source_is_refused_with_both_numbers(pairs, tmp_path):
    config = small_config(pairs, num_devices=8, episode__size=48)
    with pytest.raises(ConfigError, match=r"episode.size=48 .* 40 pairs"):
        loop.train(config, tmp_path / "run")


def test_teacher_of_another_length_is_refused_with_both_numbers(pairs, tmp_path):
    config = small_config(
        pairs, num_devices=8, data__teacher=teacher(tmp_path, 41), objective__external=1
    )
    with pytest.raises(ConfigError, match=r"(?s)41.*40|40.*41"):
        loop.train(config, tmp_path / "run")


def test_numbers_are_tensorboard_events_too(pairs, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    workdir = tmp_path / "run"
    loop.train(small_config(pairs, num_devices=8, episode__count=1, episode__warmup=1), workdir)
    events = EventAccumulator(str(workdir / "tensorboard"))
    events.Reload()
    points = {point.step: point.value for point in events.Scalars("train/loss/clip")}
    logged = {x["step"]: x["train/loss/clip"] for x in metrics(workdir) if "train/loss/clip" in x}
    assert points.keys() == logged.keys()
    for step, value in logged.items():
        assert points[step] == pytest.approx(value, rel=1e-6)


def test_wandb_is_an_option_that_says_when_it_is_missing(pairs, tmp_path):
    config = small_config(pairs, num_devices=8, log__wandb_project="x")
    with pytest.raises(ConfigError, match=r"wandb extra"):
        loop.train(config, tmp_path / "run")


@pytest.mark.slow
def test_worker_processes_change_no_number(pairs, tmp_path):
    settings = {"episode__count": 2, "episode__warmup": 1, "data__augmentation": "light"}
    logs = []
    for workers in (0, 2):
        config = small_config(pairs, num_devices=8, **settings, data__workers=workers)
        loop.train(config, tmp_path / str(workers))
        logs.append(metrics(tmp_path / str(workers)))
    for left, right in zip(*logs, strict=True):
        assert untimed(left) == untimed(right)


def test_steps_that_are_not_finite_are_skipped_and_too_many_stop_the_run(pairs, tmp_path, capsys):
    """NUM-09: parameters, moments and the next checkpoint stay finite."""
    config = small_config(
        pairs,
        num_devices=8,
        episode__count=2,
        episode__warmup=2,
        optimizer__learning_rate=1e30,
        optimizer__max_skipped=3,
    )
    workdir = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"3 steps in a row, the last is step 4: .*grad"):
        loop.train(config, workdir)
    assert "step 2: not finite: " in capsys.readouterr().err
    # What was saved after two skipped steps is the state of the last good one.
    state = final_state(config, workdir)
    assert state["step"] == 3
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))
    assert state["opt_state"]["text"].count == 1


def test_load_without_a_run_or_a_checkpoint_says_so(pairs, tmp_path):
    with pytest.raises(ConfigError, match=r"recipe\.json"):
        protoclip_jax.load(tmp_path / "nothing")


def test_extraction_gives_each_position_its_features(pairs, tmp_path):
    """DIST-03: 26 pairs in batches of 8 and of 16, the last one partial."""
    found = []
    for batch in (8, 16):
        config = small_config(
            pairs, num_devices=8, episode__size=26, episode__warmup=0, optimizer__batch=batch
        )
        trainer = loop.Trainer(config, tmp_path / str(batch))
        try:
            with trainer.input.batches() as trainer.batches:
                found.append(trainer.extract(0, trainer.draw()))
        finally:
            trainer.close()
    (features, rows), (other_features, other_rows) = found
    assert features.shape == (2, 26, 12)
    assert len(set(rows)) == 26
    np.testing.assert_array_equal(rows, other_rows)
    # Float32 sums in an order that depends on the batch.
    np.testing.assert_allclose(features, other_features, atol=1e-5)
    # Nothing is left over, and no features stand twice.
    np.testing.assert_allclose(np.linalg.norm(features, axis=2), 1, rtol=1e-5)
    assert len(np.unique(np.round(features[0], 4), axis=0)) == 26


# Online assignment, kept pictures, and what is told of them.


def episode_lines(workdir) -> list[dict]:
    return [line for line in metrics(workdir) if "seconds/train" in line]


def test_online_labels_equal_the_offline_ones_while_nothing_moves(pairs, tmp_path):
    """Fraction 1, no augmentation, linear heads (batch statistics would move the features)."""
    frozen = {
        "model__projection": 0,
        "data__augmentation": "none",
        "episode__warmup": 0,
        "episode__locked": 0,
        "episode__count": 1,
        "optimizer__learning_rate": 1e-30,
        "optimizer__weight_decay": 0,
    }
    losses = []
    for online in ("none", 1):
        config = three_phases(pairs, tmp_path, **frozen, episode__online=online)
        loop.train(config, tmp_path / str(online))
        losses.append(episode_lines(tmp_path / str(online))[-1])
    assert losses[1]["online/known"] == 1
    for name in ("image", "text", "external"):
        assert losses[1][f"online/agreement_{name}"] == 1
    for name in ("total", "prototype_image", "external_text"):
        assert losses[0][f"loss/{name}"] == losses[1][f"loss/{name}"]


def test_online_run_extracts_a_sample_and_resumes(pairs, tmp_path, capsys):
    config = three_phases(pairs, tmp_path, episode__online=0.5, episode__count=4)
    loop.train(config, tmp_path / "run")
    told = capsys.readouterr().err
    assert "only 2.0 pairs are clustered for each prototype" in told
    lines = [line for line in episode_lines(tmp_path / "run") if line["phase"] == "prototype"]
    assert len(lines) == 2
    for line in lines:
        assert line["online/known"] == 0.5
        assert 0 < line["online/agreement_external"] <= 1  # a teacher's row never moves
        assert line["share/overhead"] > 0
    assert lines[0]["online/agreement_external"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["jpeg", "none", "pixels"])
def test_pictures_kept_or_read_twice_give_the_same_run(pairs, tmp_path, keep, capsys):
    settings = {"data__keep": keep, "data__keep_side": 32, "data__augmentation": "clip"}
    logs = []
    for gigabytes in (0, 1):
        config = three_phases(pairs, tmp_path, **settings, data__keep_gigabytes=gigabytes)
        workdir = tmp_path / str(gigabytes)
        loop.train(config, workdir)
        logs.append([untimed(line) for line in metrics(workdir)])
        told = "has no room for 24 of an episode's 24 pictures" in capsys.readouterr().err
        assert told == (keep != "none" and not gigabytes)
    assert logs[0] == logs[1]


def test_episode_line_tells_every_part_and_slow_input(pairs, tmp_path, capsys, monkeypatch):
    import time

    from protoclip_jax.data import reader

    made = reader.BatchReader.__getitem__

    def slow(self, index):
        time.sleep(0.5)
        return made(self, index)

    monkeypatch.setattr(reader.BatchReader, "__getitem__", slow)
    loop.train(three_phases(pairs, tmp_path), tmp_path / "run")
    told = capsys.readouterr().err
    for part in ("sample", "extract", "cluster", "back-translate", "train", "save", "compile"):
        assert f"{part} " in told
        assert any(f"seconds/{part}" in line for line in metrics(tmp_path / "run"))
    assert "devices waited for input" in told
    assert "raise data.threads=2" in told


def test_pictures_larger_than_the_kept_ones_are_refused(pairs, tmp_path):
    config = small_config(pairs, num_devices=8, data__keep="jpeg", data__keep_side=8)
    with pytest.raises(ConfigError, match=r"keep_side=8 .* 32 pixels"):
        loop.train(config, tmp_path / "run")
