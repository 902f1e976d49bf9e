"""The trainer, from files to metrics, number by number beside a plain float64 run.

The plain run (tests/plain_*.py) is written apart from the product and shares its towers only. It
goes from the list of pairs to the last evaluation; what each test compares is in its name.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import plain_evaluation
import pytest
from PIL import Image
from plain_run import PlainRun, Recorded, Towers, flat
from tiny_run import (
    MODELS,
    metrics,
    small_config,
    tiny_models,  # noqa: F401 (a fixture)
)

import protoclip_jax
from protoclip_jax.data import pipeline
from protoclip_jax.episodes.kmeans import Clusters
from protoclip_jax.evaluation import suite
from protoclip_jax.models import presets
from protoclip_jax.training import clustering, evaluator, loop

# Every option is another than the default where it can be, so that a dropped one shows.
OFFLINE = {
    "seed": 7,
    "model.name": "test-vit",
    "model.projection": 1,
    "model.projection_hidden": 24,
    "model.projection_width": 12,
    "model.batch_norm_group": 8,
    "data.augmentation": "light",
    "data.keep_side": 36,
    "episode.count": 2,
    "episode.size": 50,  # three steps and a tail of two
    "episode.warmup": 0,
    "episode.locked": 0,
    "episode.online": "none",
    "episode.prototypes": 7,
    "episode.external_prototypes": 6,
    "episode.iterations": 9,
    "episode.redos": 2,
    "episode.seeding": "random",
    "episode.empty": "keep",
    "objective.clip": 0.7,
    "objective.prototype": 1.3,
    "objective.external": 0.6,
    "objective.temperature": 0.05,
    "optimizer.batch": 16,
    "optimizer.accumulate": 1,
    "optimizer.learning_rate": 2e-3,
    "optimizer.text_learning_rate": 3e-3,
    "optimizer.warmup_steps": 2,
    "optimizer.weight_decay": 0.3,
    "optimizer.beta1": 0.85,
    "optimizer.beta2": 0.95,
    # So large that rounding does not grow where a gradient is nearly 0.
    "optimizer.epsilon": 1e-5,
    "optimizer.clip_norm": 15.0,
    "optimizer.text_start_episode": 0,
    "evaluation.suite": "",
    "log.every": 1,
}
# Warm-up, lock, parts of a batch (each is a BatchNorm group of eight), labels at the step.
ONLINE = OFFLINE | {
    "model.batch_norm_group": "none",
    "episode.count": 4,
    "episode.warmup": 1,
    "episode.locked": 1,
    "episode.online": 0.5,
    "optimizer.accumulate": 2,
    "optimizer.text_start_episode": 1,
    "evaluation.suite": "emoji_text",
    "mesh.fsdp": 2,
}
VARIANTS = [
    pytest.param(OFFLINE, id="offline"),
    pytest.param(ONLINE, id="online", marks=pytest.mark.slow),
]
SPLITS = {
    "train": plain_evaluation.DrawnSource(30, 5, seed=1),
    "test": plain_evaluation.DrawnSource(21, 8, seed=2),
    "val": plain_evaluation.DrawnSource(13, 7, seed=3),
}


def write_input(folder: Path) -> tuple[Path, Path]:
    """60 images of two sizes; captions and teacher's rows occur several times each, so that
    some prototypes have no member."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    lines = ["filepath\ttitle"]
    for row in range(60):
        size = (40, 50, 3) if row % 3 else (64, 44, 3)
        pixels = rng.integers(0, 255, size, np.uint8)
        pixels[: 3 * (row % 9)] //= 3
        Image.fromarray(pixels).save(folder / "images" / f"{row}.png")
        lines.append(f"images/{row}.png\tImage of  {row % 11 * 7} cats &amp; dogs")
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n")
    kinds = rng.normal(size=(4, 5)).astype(np.float32)
    np.save(folder / "teacher.npy", kinds[rng.integers(0, 4, 60)])
    return folder / "pairs.tsv", folder / "teacher.npy"


def record(patched: pytest.MonkeyPatch, recorded: Recorded) -> None:
    """Listens to what the rooms hand to each other."""
    following, cluster, measure = pipeline.Batches.__next__, clustering.kmeans, suite.measure

    def next_batch(self):
        recorded.batches.append(following(self))
        return dict(recorded.batches[-1])

    def clustered(points, k, **options):
        found = cluster(points, k, **options)
        host = Clusters(*(np.asarray(values) for values in found))
        recorded.kmeans.append((np.asarray(points), k, options, host))
        return found

    def measured(features, *rest):
        recorded.evaluations.append(features)
        return measure(features, *rest)

    patched.setattr(pipeline.Batches, "__next__", next_batch)
    patched.setattr(clustering, "kmeans", clustered)
    patched.setattr(suite, "measure", measured)
    patched.setattr(evaluator, "EmojiText", SPLITS.__getitem__)


@dataclasses.dataclass
class Both:
    """A finished run of the trainer, and the plain one."""

    workdir: Path
    settings: dict
    recorded: Recorded
    state: dict
    plain: PlainRun
    evaluations: list[dict]


@pytest.fixture(scope="module")
def quick_compiler():
    """These programs are small and run a few times: the compiler is what takes the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", params=VARIANTS)
def both(request, tmp_path_factory, quick_compiler):
    settings, folder = request.param, tmp_path_factory.mktemp("numbers")
    pairs, teacher = write_input(folder)
    overrides = {name.replace(".", "__"): value for name, value in settings.items()}
    recorded = Recorded()
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(presets.PRESETS, "test-vit", MODELS["test-vit"])
        record(patched, recorded)
        config = small_config(pairs, num_devices=8, data__teacher=teacher, **overrides)
        trainer = loop.Trainer(config, folder / "run")
        try:
            trainer.run()
            state = jax.device_get(trainer.state)
        finally:
            trainer.close()
    sizes = dataclasses.replace(
        MODELS["test-vit"],
        projection=presets.ProjectionConfig(1, 24, 12),
        batch_norm_group=8,
    )
    fixed = {"image_size": 32, "embed_dim": 16}
    plain = PlainRun(settings | fixed, Towers(sizes, settings["seed"]), pairs, teacher, recorded)
    evaluations = []

    def evaluate(run):
        evaluations.append(plain_evaluation.features(run, *SPLITS.values()))

    plain.run(evaluate if settings["evaluation.suite"] else None)
    return Both(folder / "run", settings, recorded, state, plain, evaluations)


def step_lines(both: Both) -> list[dict]:
    return [line for line in metrics(both.workdir) if "train/loss/total" in line]


def test_batches_hold_the_pairs_of_the_list(both):
    assert len(both.recorded.batches) == len(both.plain.batches)
    for seen, expected in zip(both.recorded.batches, both.plain.batches, strict=True):
        for name in ("tokens", "position", "row", "episode", "kind"):
            np.testing.assert_array_equal(seen[name], expected[name], err_msg=name)
        # Another resizer may round by a level once in each direction, and each later direction
        # widens a difference by up to 1.25 (the sum of the filter's magnitudes): the first resize
        # is documented to one level, so 1, 1.25 + 1, 2.8 + 1.
        difference = np.abs(np.int64(seen["image"]) - expected["image"])
        assert difference.max() <= 4
        assert difference.mean() < 0.2


def test_kmeans_gets_features_teacher_and_options(both):
    s = both.settings
    assert len(both.recorded.kmeans) == 2 * len(both.plain.episodes) > 0
    calls = iter(both.recorded.kmeans)
    for episode in both.plain.episodes:
        points, k, options, _ = next(calls)
        own = np.stack([episode.features["image"], episode.features["text"]])
        np.testing.assert_allclose(points, own, rtol=0, atol=2e-4)  # see WALKS
        assert k == s["episode.prototypes"]
        points, external_k, external_options, _ = next(calls)
        np.testing.assert_array_equal(points, episode.features["external"])
        assert external_k == s["episode.external_prototypes"]
        for found in (options, external_options):
            found = {name: value for name, value in found.items() if name != "mesh"}
            assert found == {
                "seed": s["seed"] + episode.number,
                "iterations": s["episode.iterations"],
                "redos": s["episode.redos"],
                "seeding": s["episode.seeding"],
                "empty": s["episode.empty"],
                "spherical": False,
            }


def test_clusters_belong_to_their_points(both):
    lines = [line for line in metrics(both.workdir) if "clusters/image_used" in line]
    for index, episode in enumerate(both.plain.episodes):
        modalities, external = (call[3] for call in both.recorded.kmeans[2 * index : 2 * index + 2])
        found = {
            "image": Clusters(*(values[0] for values in modalities)),
            "text": Clusters(*(values[1] for values in modalities)),
            "external": external,
        }
        unused = 0
        for name, clusters in found.items():
            points = np.float64(episode.features[name])
            k = len(clusters.centroids)
            distances = np.linalg.norm(points[:, None] - clusters.centroids, axis=2)
            chosen = distances[np.arange(len(points)), clusters.labels]
            np.testing.assert_allclose(chosen, distances.min(axis=1), rtol=0, atol=1e-4)
            counts = np.bincount(clusters.labels, minlength=k)
            np.testing.assert_array_equal(clusters.counts, counts)
            line = lines[index]
            assert line[f"clusters/{name}_used"] == np.count_nonzero(counts)
            assert line[f"clusters/{name}_objective"] == pytest.approx(
                np.sum(chosen**2), rel=1e-4, abs=1e-6
            )
            unused += np.sum(counts == 0)
        assert unused > 0  # or the masks would not be tested


def test_every_step_logs_the_plain_numbers(both):
    lines = step_lines(both)
    assert len(lines) == len(both.plain.steps)
    assert all(margin > 1e-5 for margin in both.plain.margins)  # or rounding chooses the labels
    for number, (line, expected) in enumerate(zip(lines, both.plain.steps, strict=True)):
        found = {
            name.removeprefix("train/"): value
            for name, value in line.items()
            if name.startswith("train/")
        }
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(
                found[name], value, rtol=2e-4, atol=1e-6, err_msg=f"step {number + 1} {name}"
            )


def test_gradients_of_both_kinds_occur(both):
    """Clipped ones and others: or a dropped clip norm would not show."""
    norms = [step["grad_norm"] for step in both.plain.steps]
    assert min(norms) < both.settings["optimizer.clip_norm"] < max(norms)


def test_episode_lines_are_means_of_the_steps(both):
    lines = [line for line in metrics(both.workdir) if "seconds/train" in line]
    per = both.plain.per_episode
    assert [line["step"] for line in lines] == [
        per * (episode + 1) for episode in range(both.settings["episode.count"])
    ]
    for episode, line in enumerate(lines):
        steps = both.plain.steps[per * episode : per * (episode + 1)]
        for name in steps[0]:
            mean = np.mean([step[name] for step in steps])
            np.testing.assert_allclose(line[name], mean, rtol=2e-4, atol=1e-6, err_msg=name)
        for name in ("image", "text", "external"):
            if "online/known" in line:
                share = line[f"online/same_{name}"] / line["online/known"]
                assert line[f"online/agreement_{name}"] == pytest.approx(share)


# The bias before a BatchNorm has no gradient but rounding, by which it walks: a few 1e-5 a step at
# this epsilon. Training never sees it; the running mean follows, and so features of extraction.
WALKS = ("projection_head/layers/0/bias", "running_mean")


def test_parameters_statistics_and_moments_end_equal(both):
    found = flat(both.state["params"]) | flat(both.state["batch_stats"])
    expected = both.plain.params | both.plain.stats
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        atol = 1e-3 if name.endswith(WALKS) else 2e-5
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=atol, err_msg=name)
    for group, adam in both.state["opt_state"].items():
        assert adam.count == both.plain.optimizer.counts[group]
        for at, tree in enumerate((adam.mu, adam.nu)):
            for name, value in flat(tree).items():
                expected = both.plain.optimizer.moments[name][at]
                # Small ones are differences of terms like the largest, which float32 rounds.
                atol = max(1e-6, 3e-5 * np.abs(expected).max())
                np.testing.assert_allclose(
                    value, expected, rtol=2e-3, atol=atol, err_msg=f"{name} moment {at + 1}"
                )


@pytest.mark.usefixtures("tiny_models")
def test_loaded_model_is_the_last_state(both):
    encoder = protoclip_jax.load(both.workdir)
    for name, value in flat(jax.device_get(encoder.params)).items():
        np.testing.assert_array_equal(value, flat(both.state["params"])[name], err_msg=name)


def test_evaluations_have_the_features_of_their_model(both):
    assert len(both.evaluations) == len(both.recorded.evaluations)
    for expected, found in zip(both.evaluations, both.recorded.evaluations, strict=True):
        for name, rows in expected.items():
            np.testing.assert_allclose(getattr(found, name), rows, atol=2e-4, err_msg=name)


def test_evaluations_log_the_plain_measures(both):
    lines = [line for line in metrics(both.workdir) if "zero_shot/top1" in line]
    assert [line["step"] for line in lines] == ([0, 12] if both.evaluations else [])
    for line, found in zip(lines, both.recorded.evaluations, strict=True):
        expected = plain_evaluation.measures(found, *SPLITS.values())
        logged = {name for name in line if "/" in name}
        assert logged == expected.keys()
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
