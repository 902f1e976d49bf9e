"""The trainer's own loop, with listeners at the doors of the rooms in place of what takes time.

All that decides what reaches a room (training/loop, input, step, state, evaluator, logging) is the
product's; towers, losses, k-means, sources, files of pictures and checkpoints only note what they
were given. Nothing is compiled but a few additions, so that a run takes a fraction of a second.
"""

import dataclasses
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_run import MODELS, metrics

from protoclip_jax.config import Config
from protoclip_jax.data import augmentation, image_cache, pipeline, sources, teacher
from protoclip_jax.episodes.kmeans import Clusters
from protoclip_jax.models import clip, presets, sharding
from protoclip_jax.training import (
    clustering,
    compiled,
    evaluator,
    gradients,
    logging,
    loop,
    optimizer,
    schedule,
    state,
    step,
)
from protoclip_jax.training import input as training_input

PAIRS = 64  # of the source
IMAGE, TEXT, TEACHER = 1.0, 2.0, 3.0  # in features and clusters: whose they are
FINITE = {
    "loss/total": 0.0, "loss/clip": 0.0, "geometry/image_std": 1.0, "geometry/text_std": 1.0,
}  # fmt: skip
GRAPHDEF = nnx.split(nnx.Dict())[0]


class Source:
    """Pairs that nobody reads."""

    name, fingerprint = "rehearsed", "source"

    def __len__(self) -> int:
        return PAIRS

    def read(self, row: int) -> tuple[bytes, str]:
        raise AssertionError("nothing is read")


class Teacher(teacher.Teacher):
    """Rows that say whose they are, and which."""

    def __init__(self):
        self.path, self.fingerprint, self.note = "teacher.npy", "teacher", "made for them"
        self.empty = 0

    def __len__(self) -> int:
        return PAIRS

    def rows(self, rows: np.ndarray) -> np.ndarray:
        return np.stack([TEACHER + rows / 1000, rows], axis=1).astype(np.float32)


class Interpreted:
    """jax, but without its compiler."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jax, name)

    @staticmethod
    def jit(function, *, out_shardings):
        return lambda *arguments: jax.device_put(function(*arguments), out_shardings)


class Rehearsal:
    """One run. `heard` has every different thing that was told, in order, by its name."""

    def __init__(self):
        self.heard: dict[str, list] = {}
        self.trainer: loop.Trainer | None = None

    def hear(self, name: str, value: Any) -> None:
        known = self.heard.setdefault(name, [])
        if value not in known:
            known.append(value)

    def hear_fields(self, name: str, record: Any) -> None:
        for field in dataclasses.fields(record):
            self.hear(f"{name}.{field.name}", getattr(record, field.name))

    def result(self) -> dict[str, Any]:
        """A value alone stands for itself."""
        return {
            name: told[0] if len(told) == 1 else tuple(told) for name, told in self.heard.items()
        }


def rehearse(config: Config, folder: Path) -> dict[str, Any]:
    """What the rooms are given in a run of a recipe, by room and name."""
    run = Rehearsal()
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(presets.PRESETS, "test-vit", MODELS["test-vit"])
        patched.setitem(presets.PRESETS, "test-rn", MODELS["test-rn"])
        arranged = state.arranged
        patched.setattr(state, "arranged", lambda devices, fsdp: arranged(devices[:2], fsdp))
        listen_to_the_model(run, patched)
        listen_to_the_step(run, patched)
        listen_to_the_input(run, patched)
        listen_to_the_clusters(run, patched)
        listen_to_the_workdir(run, patched)
        listen_to_the_evaluation(run, patched)
        run.trainer = loop.Trainer(config, folder)
        try:
            run.hear("skips before the end", skips_before_the_end(run.trainer))
            run.trainer.run()
        finally:
            run.trainer.close()
    lines = metrics(folder)
    run.hear("logged", tuple(line["step"] for line in lines if "train/loss/total" in line))
    phases = [line["phase"] for line in lines if "seconds/train" in line]
    run.hear("phases", tuple(phases))
    return run.result()


def skips_before_the_end(trainer: loop.Trainer) -> int:
    """Steps in a row that are not finite until the run ends."""
    reporter = loop.Reporter(trainer.config, 8, trainer.progress, trainer.log)
    for count in range(1, 100):
        try:
            reporter._look(count, {"skipped": 1.0})
        except FloatingPointError:
            return count
    raise AssertionError("the run goes on for ever")


def listen_to_the_model(run: Rehearsal, patched: pytest.MonkeyPatch) -> None:
    def initialise(model, seed, dtype):
        for name in ("embed_dim", "projection", "batch_norm_group"):
            run.hear(f"model.{name}", getattr(model, name))
        run.hear("model.vision", type(model.vision).__name__)
        run.hear("model.seed", seed)
        run.hear("model.dtype", jnp.dtype(dtype).name)
        params = {
            "logit_scale": jnp.zeros(()),
            "logit_scale_proto": jnp.zeros(()),
            "visual": {"proj": jnp.zeros((8, 8))},
        }
        return GRAPHDEF, params, {}

    def start_weights(workdir, like, config):
        run.hear("model.start", str(workdir))
        return jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape), {name: like[name] for name in ("params",)}
        ) | {"batch_stats": {}}

    def apply(graphdef, params, stats, images, tokens, *, train, train_image=None, project=True):
        assert graphdef is GRAPHDEF
        kind = "train" if train else "extract"
        run.hear(f"{kind}.train_image", train_image)
        run.hear(f"{kind}.project", project)
        run.hear(f"{kind}.image_type", images.dtype.name)
        rows = jnp.zeros((len(tokens), 1)) + params["logit_scale"]
        both = [rows + IMAGE, rows + TEXT]
        projected = [jnp.broadcast_to(x, (len(tokens), run.trainer_width)) for x in both]
        return clip.Features(*both, *projected), stats

    def gathered(params, mesh, dtype):
        run.hear("gathered.dtype", jnp.dtype(dtype).name)
        run.hear("gathered.mesh", dict(mesh.shape))
        return params

    patched.setattr(clip, "initialise", initialise)
    patched.setattr(clip, "apply", apply)
    patched.setattr(sharding, "gathered", gathered)
    patched.setattr(loop, "start_weights", start_weights)
    for module in (loop, state):
        patched.setattr(module, "jax", Interpreted())


class Eager(compiled.CompiledStep):
    """In place of a compiled step: the function itself, the first time."""

    flops = None

    def __init__(self, function, *, donate_argnums, out_shardings):
        assert donate_argnums == 0
        self.function, self.metrics = function, None

    def __call__(self, state, batch, prototypes):
        with jax.transfer_guard("allow"):
            if self.metrics is None:
                self.metrics = self.function(state, batch, prototypes)[1]
        return state, self.metrics


def listen_to_the_step(run: Rehearsal, patched: pytest.MonkeyPatch) -> None:
    def at_once(forward, loss, params, rows, scales, parts=1, mesh=None):
        run.hear("step.parts", parts)
        run.hear("step.rows", len(rows["tokens"]))
        features, stats = forward(params, rows)
        return params, loss(features, scales(params))[1], stats

    def rematerialised(forward):
        run.hear("step.rematerialised", True)
        return forward

    def total_loss(features, scales, labels, prototypes, weights, **options):
        run.hear_fields("loss.weights", weights)
        for name in ("temperature", "back_translation", "mask_unused", "compute_all"):
            run.hear(f"loss.{name}", options.pop(name))
        assert list(options) == ["mesh"]
        run.hear("loss.prototypes", tuple(sorted(prototypes)))
        run.hear("loss.labels", {n: int(found[-1]) for n, found in sorted(labels.items())})
        return jnp.zeros(()), {name: jnp.asarray(value) for name, value in FINITE.items()}

    def online_labels(features, teacher, prototypes):
        run.hear("online.teacher", None if teacher is None else teacher[:, 1].tolist())
        run.hear("online.prototypes", tuple(sorted(prototypes)))
        labels = {"image": 101, "text": 102} | ({} if teacher is None else {"external": 103})
        return {name: jnp.full(len(features.image), code) for name, code in labels.items()}

    def agreement(online, offline):
        run.hear("online.compared", [int(online["image"][-1]), int(offline["image"][-1])])
        return {}

    def update(grads, opt_state, params, lrs, settings, trained):
        run.hear_fields("adamw", settings)
        run.hear("adamw.trained", trained)
        return params, opt_state, {"grad_norm": jnp.zeros(())}

    def learning_rates(settings):
        rates = learning_rates_of(settings)
        for tower, found in rates(np.arange(settings.total_steps)).items():
            run.hear(f"rates.{tower}", tuple(np.round(found, 6).tolist()))
        return lambda step: {"image": jnp.zeros(()), "text": jnp.zeros(())}

    def unit(images):
        assert images.dtype == jnp.uint8
        return jnp.zeros(images.shape, jnp.float16)  # of a type that no other stage gives

    def sample_keys(seed, episode, number, positions):
        run.hear(f"colour.seed_of_pass_{number}", seed)
        return positions, number

    def colour(images, keys, settings):
        assert images.dtype == jnp.float16
        run.hear(f"colour.settings_of_pass_{keys[1]}", settings)
        return images.astype(jnp.bfloat16)

    def normalise(images):
        run.hear("normalised", images.dtype.name)
        return images.astype(jnp.float32)

    learning_rates_of = schedule.learning_rates
    patched.setattr(loop, "CompiledStep", Eager)
    patched.setattr(gradients, "at_once", at_once)
    patched.setattr(gradients, "by_parts", at_once)
    patched.setattr(gradients, "rematerialised", rematerialised)
    patched.setattr(step, "total_loss", total_loss)
    patched.setattr(step, "online_labels", online_labels)
    patched.setattr(step, "agreement", agreement)
    patched.setattr(optimizer, "update", update)
    patched.setattr(schedule, "learning_rates", learning_rates)
    for function in (unit, sample_keys, colour, normalise):
        patched.setattr(augmentation, function.__name__, function)


class Batches(pipeline.Batches):
    """Empty pictures and captions in the order of a walk."""

    roomless = 0

    def __init__(self, run: Rehearsal, walk, reading, *, workers, threads, unreadable):
        sections = [walk.locate(number) for number in range(len(walk))]
        first = [section for section, number in filter(None, sections) if not number]
        passes = [(section.kind, section.episode, section.positions) for section in first]
        run.hear("walk.passes", tuple(passes))
        run.hear("walk.batch", walk.batch)
        run.hear("batches.workers", workers)
        run.hear("batches.threads", threads)
        for name in ("size", "seed", "image_size", "parity", "keep"):
            run.hear(f"reading.{name}", getattr(reading, name))
        for kind, how in reading.augmentation.items():
            run.hear(f"reading.augmentation.{kind}", how)
        run.hear("reading.rows", tuple(reading.rows_of_episode(0).tolist()))
        self._walk, self._rows = walk, reading.rows_of_episode
        self._steps = iter(filter(None, sections))
        self._image_size = reading.image_size

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __next__(self) -> dict:
        section, number = next(self._steps)
        positions = self._walk.positions(number)
        rows = self._rows(section.episode)
        return {
            "image": np.zeros((len(positions), 4, 4, 3), np.uint8),
            "tokens": np.ones((len(positions), 5), np.int32),
            "position": positions,
            "row": np.where(
                positions < section.positions, rows[np.minimum(positions, len(rows) - 1)], -1
            ),
        }


def listen_to_the_input(run: Rehearsal, patched: pytest.MonkeyPatch) -> None:
    def open_source(train, **options):
        run.hear("source.train", train)
        for name, value in options.items():
            run.hear(f"source.{name}", value)
        return Source()

    def check_start(source, *, limit, parity):
        run.hear("start.limit", limit)
        run.hear("start.parity", parity)

    def open_teacher(path, count, source):
        run.hear("teacher.path", Path(path).name)
        assert count == len(source) == PAIRS
        return Teacher()

    def measured(source, side, *, parity):
        run.hear("cache.side", side)
        run.hear("cache.parity", parity)
        return {"pixels": 100.0, "jpeg": 10.0}

    def plan(wanted, images, sizes, budget):
        run.hear("cache.wanted", wanted)
        run.hear("cache.images", images)
        run.hear("cache.budget", budget)
        return plan_of(wanted, images, sizes, budget)

    def batches(walk, reading, **options):
        return Batches(run, walk, reading, **options)

    plan_of = image_cache.plan
    patched.setattr(sources, "open_source", open_source)
    patched.setattr(training_input, "check_start", check_start)
    patched.setattr(training_input, "open_teacher", open_teacher)
    patched.setattr(image_cache, "measured", measured)
    patched.setattr(image_cache, "plan", plan)
    patched.setattr(pipeline, "Batches", batches)


def listen_to_the_clusters(run: Rehearsal, patched: pytest.MonkeyPatch) -> None:
    def features_of(size, width, place):
        run.hear("features.size", size)
        run.hear("features.width", width)
        run.trainer_width = width
        return made(size, width, place)

    def kmeans(points, k, *, mesh, **options):
        points = np.asarray(points)
        assert dict(mesh.shape).keys() == {"data", "fsdp"}
        kind = "modalities" if points.ndim == 3 else "teacher"
        run.hear(f"kmeans.{kind}.points", np.round(points[..., 0, 0].astype(float), 4).tolist())
        run.hear(f"kmeans.{kind}.count", points.shape[-2])
        run.hear(f"kmeans.{kind}.k", k)
        for name, value in options.items():
            run.hear(f"kmeans.{kind}.{name}", value)
        axes = points.shape[:-2]
        whose = points[..., 0, 0]
        return Clusters(
            centroids=jnp.asarray(np.broadcast_to(whose[..., None, None], (*axes, k, 2))),
            # Whose they are and of which position.
            labels=jnp.asarray(
                1000 * np.floor(whose[..., None]).astype(np.int32) + np.arange(points.shape[-2])
            ),
            counts=jnp.ones((*axes, k), jnp.int32),
            objective=jnp.zeros(axes),
            iterations=jnp.zeros(axes, jnp.int32),
            nonfinite=jnp.zeros(axes, jnp.int32),
        )

    def build_prototypes(image, text, image_clusters, text_clusters, external, external_k):
        run.hear(
            "prototypes.of",
            {
                "image": float(image[0, 0]),
                "text": float(text[0, 0]),
                "image clusters": float(image_clusters.centroids[0, 0]),
                "text clusters": float(text_clusters.centroids[0, 0]),
                "external": None if external is None else int(external[0]),
            },
        )
        run.hear("prototypes.external_k", external_k)
        found = {"image": {}, "text": {}} | ({} if external is None else {"external": {}})
        return found

    made = loop.EpisodeFeatures
    run.trainer_width = 1
    patched.setattr(loop, "EpisodeFeatures", features_of)
    patched.setattr(clustering, "kmeans", kmeans)
    patched.setattr(clustering, "build_prototypes", build_prototypes)


def listen_to_the_workdir(run: Rehearsal, patched: pytest.MonkeyPatch) -> None:
    class Checkpoints:
        def __init__(self, workdir, keep, steps_per_episode):
            run.hear_fields("checkpoints", keep)
            run.hear("checkpoints.steps_per_episode", steps_per_episode)

        def newest_whole(self, read, say):
            return None

        def save(self, done, state, meta, episode, metrics):
            run.hear("saved", done)
            run.hear("saved with metrics", (done, metrics))

        def wait(self):
            pass

        close = wait

    class Events:
        def __init__(self, folder, step, say):
            run.hear("tensorboard", Path(folder).name)

        def write(self, *_):
            pass

        flush = close = write

    def start_wandb(config, folder, name):
        run.hear("wandb.run", name)
        run.hear("wandb.project", config.log.wandb_project)
        return types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    def requests(minutes, *rest):
        run.hear("requests.minutes", minutes)
        return requests_of(minutes, *rest)

    def progress(total, enabled):
        run.hear("progress.total", total)
        run.hear("progress.enabled", enabled)
        return progress_of(total, False)

    requests_of, progress_of = loop.Requests, loop.Progress
    patched.setattr(loop, "Checkpoints", Checkpoints)
    patched.setattr(loop, "Requests", requests)
    patched.setattr(loop, "Progress", progress)
    patched.setattr(logging, "Events", Events)
    patched.setattr(logging, "_start_wandb", start_wandb)


def listen_to_the_evaluation(run: Rehearsal, patched: pytest.MonkeyPatch) -> None:
    def measure(features, labels, settings):
        assert (features, labels) == ("features", "labels")
        run.hear("evaluated", run.trainer.done)
        return {"zero_shot/top1": 7.0}

    def features(encoder, train, test, val, labels, settings):
        run.hear("evaluation.sets", (train, test, val))
        return "features"

    room = types.SimpleNamespace(
        SuiteSettings=lambda: None,
        Labels=types.SimpleNamespace(of=lambda train, test, val, settings: "labels"),
        Features=types.SimpleNamespace(of=features),
        measure=measure,
        chance=lambda *sources: {"zero_shot/top1": 1.0},
    )
    patched.setattr(evaluator, "suite", room)
    patched.setattr(evaluator, "EmojiText", lambda split: split)
    patched.setattr(evaluator, "Encoder", lambda *_, **__: types.SimpleNamespace())
