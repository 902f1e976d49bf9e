"""The trainer: the only loop there is.

An episode is the paper's five steps: draw, extract, cluster, back-translate, train.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from protoclip_jax.config import Config
from protoclip_jax.episodes.extraction import in_episode_order, make_extract_step
from protoclip_jax.episodes.kmeans import Clusters, kmeans
from protoclip_jax.episodes.prototypes import build_prototypes
from protoclip_jax.training import record, state, step
from protoclip_jax.training.checkpoint import Checkpoints
from protoclip_jax.training.evaluator import Evaluator
from protoclip_jax.training.input import Input
from protoclip_jax.training.logging import Meter, MetricLog, check_wandb
from protoclip_jax.training.phases import Phase, phase_of
from protoclip_jax.training.progress import Progress, Stopwatch


def train(config: Config, workdir: Path) -> None:
    """Runs a recipe in a workdir: starts, goes on where it stopped, or says it is finished.

    Raises:
      ConfigError: the recipe does not fit the data, or the run that is in the workdir.
      FloatingPointError: the loss, or another metric, is not finite.
    """
    check_wandb(config)
    trainer = Trainer(config, workdir)
    try:
        trainer.run()
    finally:
        trainer.close()


class Trainer:
    """A run: its state on the devices, its input, and where its numbers go."""

    def __init__(self, config: Config, workdir: Path):
        self.config, self.workdir = config, workdir
        self.mesh = state.make_mesh(config.mesh.fsdp)
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.model = state.model_of(config)
        workdir.mkdir(parents=True, exist_ok=True)
        self.input = Input(
            config,
            self.model.vision.image_size,
            self.model.text.context_length,
            self.mesh,
            workdir,
        )
        self.checkpoints = Checkpoints(workdir, config.checkpoint.keep)
        self.meta = record.meta(config) | self.input.fingerprints()
        latest = self.checkpoints.latest()
        if latest is not None:
            record.check_resumable(workdir, self.checkpoints.meta(latest), self.meta)
        self.graphdef, self.state = state.create(config, self.mesh)
        if latest is None:
            record.write(workdir, config)
        else:
            self.state = self.checkpoints.restore(latest, self.state)
        self.done = latest or 0
        self.progress = Progress(config.total_steps, self.done, config.log.progress)
        self.log = MetricLog(workdir, config, self.done)
        self.evaluator = Evaluator(config, self.model, self.graphdef)
        self.train_steps: dict[Phase, step.Step] = {}
        self.extract_step = jax.jit(
            make_extract_step(self.graphdef, step.image_preparation(config, "extract"))
        )

    def run(self) -> None:
        """Trains what is left, then prints the table of the evaluation."""
        config, steps = self.config, self.config.steps_per_episode
        if self.done == config.total_steps:
            self.progress.say(f"{self.workdir} is finished: {self.done} steps.")
        elif self.done:
            self.progress.say(f"Going on after step {self.done} of {config.total_steps}.")
        else:
            self.say_source()
            self.evaluate("untrained", 0)
        first = self.done // steps
        remaining = range(first, config.episode.count)
        extracted = [e for e in remaining if e in config.prototype_episodes]
        with (
            self.input.batches("train", remaining) as self.train_batches,
            self.input.batches("extract", extracted) as self.extract_batches,
        ):
            for episode in remaining:
                self.run_episode(episode)
        self.checkpoints.wait()
        self.progress.close()
        self.say_result()

    def run_episode(self, episode: int) -> None:
        """Draws, extracts, clusters, back-translates, trains; evaluates and saves when due."""
        config, phase = self.config, phase_of(self.config, episode)
        clock, numbers = Stopwatch(), {}
        title = f"episode {episode + 1}/{config.episode.count}"
        prototypes, labels = None, None
        if phase.prototypes:
            self.progress.doing(f"{title} extract")
            with clock.part("extract"):
                image, text, rows = self.extract(episode)
            self.progress.doing(f"{title} cluster")
            with clock.part("cluster"):
                clusters = self.cluster(episode, image, text, rows)
            with clock.part("back-translate"):
                prototypes, labels = self.back_translate(image, text, clusters)
            numbers = cluster_numbers(clusters)
        self.progress.doing(f"{title} {phase.name}")
        with clock.part("train"):
            numbers |= self.train(episode, phase, prototypes, labels)
        last = episode + 1 == config.episode.count
        if last or (config.evaluation.every and (episode + 1) % config.evaluation.every == 0):
            with clock.part("evaluate"):
                self.evaluate(phase.name, episode)
        if last or (episode + 1) % config.checkpoint.every == 0:
            with clock.part("save"):
                self.checkpoints.save(self.done, self.state, self.meta)
        seconds = {f"seconds/{name}": value for name, value in clock.seconds.items()}
        self.log.write(self.done, episode, phase.name, numbers | seconds)
        losses = ", ".join(f"{name} {value:.3f}" for name, value in shown(numbers).items())
        self.progress.say(f"{title} {phase.name}: {losses} ({clock.line()})")

    def extract(self, episode: int) -> tuple[jax.Array, jax.Array, np.ndarray]:
        """Projected features of every position, float32 (n, d), and the rows that were read."""
        size, batch_size = self.config.episode.size, self.config.optimizer.batch
        rows, features = [], []
        for _ in range(-(-size // batch_size)):
            batch = next(self.extract_batches)
            rows.append(batch["row"])
            arrays = self.input.on_devices(step_inputs(batch))
            parts = self.extract_step(
                self.state["params"], self.state["batch_stats"], arrays, np.int32(episode)
            )
            features.append(parts)
        image, text = in_episode_order(features, size)
        return image, text, np.concatenate(rows)[:size]

    def cluster(self, episode: int, image, text, rows: np.ndarray) -> dict[str, Clusters]:
        """k-means in each modality, and of the teacher's rows."""
        settings = self.config.episode
        run = functools.partial(
            kmeans,
            seed=self.config.seed + episode,
            iterations=settings.iterations,
            redos=settings.redos,
            seeding=settings.seeding,
            empty=settings.empty,
            spherical=settings.spherical,
            mesh=self.mesh,
        )
        both = run(jnp.stack([image, text]), settings.prototypes)
        clusters = {
            name: Clusters(*(field[index] for field in both))
            for index, name in enumerate(("image", "text"))
        }
        if self.input.teacher is not None:
            teacher = self.input.teacher.rows(rows)
            clusters["external"] = run(teacher, self.config.external_prototypes)
        return clusters

    def back_translate(self, image, text, clusters: dict[str, Clusters]) -> tuple[dict, dict]:
        """Prototypes in each student's own space, and the labels by position as host arrays."""
        external = clusters.get("external")
        prototypes = build_prototypes(
            image,
            text,
            clusters["image"],
            clusters["text"],
            None if external is None else external.labels,
            self.config.external_prototypes,
        )
        labels = {name: np.asarray(found.labels) for name, found in clusters.items()}
        return jax.device_put(prototypes, self.replicated), labels

    def train(self, episode: int, phase: Phase, prototypes, labels) -> dict[str, float]:
        """Steps through the episode; returns the mean of every metric over it."""
        if phase not in self.train_steps:
            self.train_steps[phase] = self.compiled(phase)
        train_step = self.train_steps[phase]
        recent, whole = Meter(), Meter()
        for _ in range(self.config.steps_per_episode):
            batch = next(self.train_batches)
            inputs = step_inputs(batch)
            if labels is not None:
                inputs["labels"] = {
                    name: found[inputs["position"]] for name, found in labels.items()
                }
            arrays = self.input.on_devices(inputs)
            with jax.transfer_guard("disallow"):
                self.state, metrics = train_step(self.state, arrays, prototypes)
            self.done += 1
            self.progress.step()
            recent.add(metrics)
            if self.done % self.config.log.every == 0:
                self.report(episode, phase, recent, whole)
        self.report(episode, phase, recent, whole)
        return whole.mean()

    def compiled(self, phase: Phase) -> step.Step:
        """The compiled step of a phase; the state that goes in is given away."""
        function = step.make_train_step(self.graphdef, self.config, phase, self.mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        return jax.jit(function, donate_argnums=0, out_shardings=(shardings, self.replicated))

    def report(self, episode: int, phase: Phase, recent: Meter, whole: Meter) -> None:
        """Fetches the metrics since the last report, logs and shows their mean."""
        if not len(recent):
            return
        values = recent.take(into=whole)
        broken = [name for name, value in values.items() if not np.isfinite(value)]
        if broken:
            raise FloatingPointError(
                f"not finite around step {self.done}: {', '.join(broken)}; lower "
                "optimizer.learning_rate or set optimizer.clip_norm, in a new workdir"
            )
        self.log.write(
            self.done, episode, phase.name, {f"train/{name}": v for name, v in values.items()}
        )
        self.progress.show(shown(values))

    def evaluate(self, phase: str, episode: int) -> None:
        """Measures the model as it stands and logs it."""
        self.progress.doing(f"evaluate ({phase})")
        values = self.evaluator.measure(self.state["params"], self.state["batch_stats"])
        if values:
            self.log.write(self.done, episode, phase, values)

    def say_source(self) -> None:
        """Tells how many pairs there are, and which rows of a list are none."""
        source = self.input.source
        self.progress.say(f"{len(source):,} pairs of {source.name}.")
        for reason, dropped in getattr(source, "report", {}).items():
            self.progress.say(f"  left out, {reason}: {dropped}")

    def say_result(self) -> None:
        """Prints the table and what to do next."""
        table = self.evaluator.table(self.workdir)
        if table:
            print(table)
        print(
            f"\nNext: python -m protoclip_jax.evaluate --workdir={self.workdir}\n"
            f'or in Python: model = protoclip_jax.load("{self.workdir}"); '
            'model.encode_text(["a red kite"])'
        )

    def close(self) -> None:
        """Finishes what is being written."""
        self.progress.close()
        self.log.close()
        self.checkpoints.close()


def step_inputs(batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """What of a host batch goes to the devices."""
    return {
        "image": batch["image"],
        "tokens": batch["tokens"],
        "position": batch["position"].astype(np.int32),
    }


def cluster_numbers(clusters: dict[str, Clusters]) -> dict[str, float]:
    """What there is to log about an episode's clusters."""
    numbers = {}
    for name, found in clusters.items():
        numbers[f"clusters/{name}_used"] = float(np.count_nonzero(np.asarray(found.counts)))
        numbers[f"clusters/{name}_objective"] = float(found.objective)
        numbers[f"clusters/{name}_iterations"] = float(found.iterations)
        numbers[f"clusters/{name}_nonfinite_rows"] = float(found.nonfinite)
    return numbers


def shown(values: dict[str, float]) -> dict[str, float]:
    """The loss terms, by their short names."""
    terms = ("total", "clip", "prototype", "external")
    return {term: values[f"loss/{term}"] for term in terms if f"loss/{term}" in values}
