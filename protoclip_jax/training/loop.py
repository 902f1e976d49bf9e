"""The trainer: the only loop there is.

An episode is the paper's five steps: draw, extract, cluster, back-translate, train.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from protoclip_jax.config import Config, ConfigError
from protoclip_jax.distributed import broadcast, exchange
from protoclip_jax.episodes.extraction import EpisodeFeatures, make_extract_step
from protoclip_jax.storage import objects
from protoclip_jax.storage.mirror import Mirror
from protoclip_jax.storage.paths import AnyPath, workdir_at
from protoclip_jax.storage.retries import Unreachable
from protoclip_jax.training import agreement, finished, messages, record, state, step
from protoclip_jax.training.checkpoint import Checkpoints
from protoclip_jax.training.clustering import Clustering
from protoclip_jax.training.compiled import CompiledStep
from protoclip_jax.training.evaluator import Evaluator
from protoclip_jax.training.input import Input
from protoclip_jax.training.labels import EpisodeLabels
from protoclip_jax.training.logging import Meter, MetricLog, check_wandb
from protoclip_jax.training.pace import Pace
from protoclip_jax.training.phases import Phase, phase_of
from protoclip_jax.training.profile import Profile
from protoclip_jax.training.progress import Progress
from protoclip_jax.training.reporter import Reporter, cluster_numbers
from protoclip_jax.training.requests import LEAVE, AtOnce, Leaving, Requests
from protoclip_jax.training.restore import start_weights
from protoclip_jax.training.stopwatch import Stopwatch

# Prototypes and labels: what training needs of the steps before it.
Prepared = tuple[dict, EpisodeLabels]

APPENDED = ("metrics.jsonl", "unreadable*.tsv")  # files of a workdir that a later run goes on with


def train(
    config: Config,
    workdir: AnyPath,
    profile: str | None = None,
    libraries: messages.Messages | None = None,
) -> None:
    """Runs a recipe in a workdir: starts, goes on where it stopped, or says it is finished.

    Args:
      config: a checked recipe.
      workdir: folder of the run, local or gs://.
      profile: "a:b" writes a trace of these steps.
      libraries: what libraries tell; none = that is the caller's affair.

    Raises:
      ConfigError: the recipe does not fit the data, or the run that is in the workdir.
      CheckpointError: a checkpoint cannot be written.
      FloatingPointError: too many steps in a row had a loss or gradient that is not finite.
      Leaving: a signal asked to save and leave.
      Unreachable: remote storage gave no answer for minutes.
    """
    check_wandb(config)
    try:
        objects.make_folder(workdir)
    except Unreachable:
        raise
    except OSError as error:
        raise ConfigError(f"--workdir={workdir} is no folder to write to: {error}") from error
    agreement.compare("the processes would not train the same", record.identity(config))
    record.check(workdir)
    agreement.same_folder(epath.Path(workdir))
    with agreement.in_use(workdir):
        trainer = Trainer(config, workdir, profile, libraries)
        try:
            trainer.run()
        finally:
            trainer.close()


class Trainer:
    """A run: its state on the devices, its input, and where its numbers go."""

    def __init__(
        self,
        config: Config,
        workdir: AnyPath,
        profile: str | None = None,
        libraries: messages.Messages | None = None,
    ):
        self.config, self.workdir = config, workdir
        self.progress = Progress(config.total_steps, config.log.progress)
        self.mirror = Mirror(workdir, APPENDED, say=self.progress.say)
        if libraries is not None:
            number = f".{jax.process_index()}" if jax.process_index() else ""
            libraries.keep_in(self.mirror.local / f"{messages.FILE}{number}")
            libraries.say_with(self.progress.say)
        self.mesh = state.make_mesh(config.mesh.fsdp)
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.model = state.model_of(config)
        self.profile = Profile(profile, self.mirror.local, config.total_steps)
        self.input = Input(
            config,
            self.model.vision.image_size,
            self.model.text.context_length,
            self.mesh,
            self.mirror.local,
        )
        self.checkpoints = Checkpoints(workdir, config.checkpoint, config.steps_per_episode)
        agreement.compare("the processes would read different data", self.input.fingerprints())
        self.meta = record.meta(config) | self.input.fingerprints()
        # Only shapes: what a checkpoint holds is not made before.
        self.graphdef, self.like = state.abstract(config, self.mesh)
        self.cache_form: str | None = None
        self.done, self.interrupted = self.restored()
        cache = self.input.plan_cache(self.cache_form)
        self.meta[record.IMAGE_CACHE] = cache.form
        self.saved = self.done
        self.progress.start(self.done)
        self.log = MetricLog(self.mirror.local, config, self.done, workdir.name, self.progress.say)
        self.reporter = Reporter(config, self.model.embed_dim, self.progress, self.log)
        self.evaluator = Evaluator(config, self.model, self.graphdef, self.mesh)
        self.reporter.lines(cache.lines())
        self.requests = Requests(config.checkpoint.minutes, self.mesh, self.settled)
        self.clustering = Clustering(config, self.mesh, self.input.teacher)
        self.train_steps: dict[Phase, CompiledStep] = {}
        self.clock = Stopwatch()
        by_row = NamedSharding(self.mesh, PartitionSpec(state.BATCH_AXES))
        self.extract_step = jax.jit(
            make_extract_step(
                self.graphdef,
                step.image_preparation(config, "extract"),
                self.mesh,
                config.model.dtype,
            ),
            out_shardings=by_row,
        )

    def restored(self) -> tuple[int, Prepared | None]:
        """Takes over the newest checkpoint that reads back whole.

        Returns:
          Finished steps, and what was prepared for the episode that the checkpoint interrupts.
        """
        found = self.checkpoints.newest_whole(self._read, self.progress.say)
        if found is None:
            finished.refuse_lost(self.workdir)
            self.state = self.fresh()
            record.write(self.workdir, self.config)
            return 0, None
        done, (self.state, prepared) = found
        if not objects.is_file(self.workdir / record.RECIPE_FILE):  # somebody removed it
            record.write(self.workdir, self.config)
        return done, prepared

    def fresh(self) -> dict:
        """The state that a new run starts from."""
        config = self.config
        if config.model.weights is None:
            return state.create(config, self.mesh)[1]
        weights = start_weights(workdir_at(config.model.weights), self.like, config)
        return state.around(config, self.mesh, weights)

    def _read(self, done: int) -> tuple[dict, Prepared | None]:
        stored = self.checkpoints.meta(done)
        record.check_resumable(self.workdir, stored, self.meta)
        self.cache_form = record.cache_form(stored)
        restored = self.checkpoints.restore(done, self.like)
        episode, steps = divmod(done, self.config.steps_per_episode)
        if not steps or episode not in self.config.prototype_episodes:
            return restored, None
        kept = self.checkpoints.episode(done, self.replicated)
        if kept is None:
            raise ValueError("the episode's prototypes are missing")
        labels = EpisodeLabels.restored(kept)
        if not labels.checked:
            self.progress.say(
                f"checkpoints/{done} is of an earlier version: to the end of this episode a pair "
                "that takes the place of an unreadable one gets its label"
            )
        return restored, (kept["prototypes"], labels)

    def run(self) -> None:
        """Trains what is left, then prints the table of the evaluation."""
        config = self.config
        first, steps = divmod(self.done, config.steps_per_episode)
        if self.done == config.total_steps:
            self.progress.say(f"{self.workdir} is finished: {self.done} steps.")
        else:
            if self.done:
                self.progress.say(f"Going on after step {self.done} of {config.total_steps}.")
            self.reporter.source(self.input.source, self.input.teacher)
            if not self.done:
                self.evaluate("untrained", 0)
        with self.requests, self.input.batches(first, steps) as self.batches:
            try:
                for episode in range(first, config.episode.count):
                    self.run_episode(episode)
            except AtOnce:  # between two steps: alone, and this process's state is whole
                self.save()
                self.leave()
            self.checkpoints.wait()
        # Process 0 writes the log, so that the others might read it too early.
        if self.done and not broadcast(self.evaluator.measured(self.mirror.local, self.done)):
            if any(exchange(self.requests.heard)):
                self.leave()
            self.evaluate(phase_of(config, config.episode.count - 1).name, config.episode.count - 1)
        finished.mark(self.workdir, config)
        self.progress.close()
        if jax.process_index() == 0:
            self.reporter.result(self.workdir, self.evaluator.table(self.mirror.local))

    def run_episode(self, episode: int) -> None:
        """Trains an episode; evaluates and saves when due, and tells."""
        config, phase, clock = self.config, phase_of(self.config, episode), self.clock
        numbers, asked = self.train_episode(episode, phase, clock)
        leave, found = asked == LEAVE, None
        last = episode + 1 == config.episode.count
        due = config.evaluation.every and (episode + 1) % config.evaluation.every == 0
        if (last or due) and not leave:
            with self.part(clock, "evaluate"), self.requests.breaking():
                found = self.evaluate(phase.name, episode)
        numbers |= self.input.losses()
        # Before the save, so that a run that goes on from there finds this line. The seconds of the
        # save are told with the next episode.
        self.reporter.episode(self.done, episode, phase, numbers, clock)
        self.reporter.losses(self.input.unreadable)
        self.clock = Stopwatch()
        if last or leave or (episode + 1) % config.checkpoint.every == 0:
            with self.part(self.clock, "save"):
                self.save(metrics=found)
        if leave:
            self.leave()

    def train_episode(
        self, episode: int, phase: Phase, clock: Stopwatch
    ) -> tuple[dict[str, float], int]:
        """Draws, extracts, clusters, back-translates, trains.

        Returns:
          What there is to log, and what is asked of the run at the end.
        """
        self.title, numbers = self.reporter.title(episode), {}
        prepared, self.interrupted = self.interrupted, None
        if phase.prototypes and prepared is None:
            prepared, numbers = self.prepare(episode, clock)
        with self.part(clock, "train", phase.name):
            trained, asked = self.train(episode, phase, prepared)
        return numbers | trained, asked

    def prepare(self, episode: int, clock: Stopwatch) -> tuple[Prepared, dict[str, float]]:
        """All of an episode's steps before training; its features end with them.

        Returns:
          What training needs, and what there is to log about the clusters.
        """
        with self.part(clock, "sample"):
            batches = self.draw()
        with self.part(clock, "extract"):
            features, rows = self.extract(episode, batches)
        with self.part(clock, "cluster"), self.requests.breaking():
            clusters = self.clustering.clusters(episode, features, rows)
        with self.part(clock, "back-translate"):
            prototypes = self.clustering.prototypes(features[0], features[1], clusters)
        prepared = prototypes, self.clustering.labels(clusters, rows)
        numbers = cluster_numbers(clusters)
        self.reporter.prototypes(numbers, self.batches.roomless)
        return prepared, numbers

    def draw(self) -> Iterator[dict]:
        """The episode's batches to extract, once the first of them is there."""
        count = -(-self.config.extracted // self.config.optimizer.batch)
        first = next(self.batches)
        return itertools.chain([first], itertools.islice(self.batches, count - 1))

    def extract(self, episode: int, batches: Iterable[dict]) -> tuple[jax.Array, np.ndarray]:
        """Projected features, float32 (2, n, d), of the extracted positions, and the rows read."""
        count, width = self.config.extracted, self.config.model.projection_width
        features = EpisodeFeatures(count, width, self.replicated)
        pace, positions, rows = Pace(), [], []
        for batch in batches:
            positions.append(batch["position"])
            rows.append(batch["row"])
            arrays = self.input.on_devices(step_inputs(batch))
            parts = self.extract_step(
                self.state["params"], self.state["batch_stats"], arrays, np.int32(episode)
            )
            pace.dispatched(features.add(*parts, arrays["position"]))
            if self.requests.after_step() == LEAVE:  # nothing of this episode is worth keeping
                self.save()
                self.leave()
        rows_n = self.input.all_rows(positions, rows, count)
        return jax.block_until_ready(features.whole()), rows_n

    def train(
        self, episode: int, phase: Phase, prepared: Prepared | None
    ) -> tuple[dict[str, float], int]:
        """Steps through what is left of the episode; saves on the way when asked.

        Returns:
          The mean of every metric, and what is asked of the run after the last step.
        """
        if phase not in self.train_steps:
            self.reporter.compiling(phase)
            self.train_steps[phase] = self.compiled(phase)
        train_step, asked = self.train_steps[phase], 0
        prototypes, labels = prepared or (None, None)
        pace, recent, whole = Pace(), Meter(), Meter()
        steps = self.config.steps_per_episode
        self.reporter.begin()
        for index in range(self.done % steps, steps):
            self.profile.before(self.done)
            inputs = self.train_inputs(pace.next(self.batches), labels)
            arrays = self.input.on_devices(inputs)
            with jax.transfer_guard("disallow"):
                self.state, metrics = train_step(self.state, arrays, prototypes)
            pace.dispatched(metrics["loss/total"])
            self.done += 1
            self.progress.step()
            recent.add(metrics)
            asked = self.requests.after_step()
            if self.done % self.config.log.every == 0 or asked or index + 1 == steps:
                self.reporter.steps(self.done, episode, phase, recent, whole, train_step.flops)
            if asked and index + 1 < steps:
                self.save({"prototypes": prototypes, **labels.arrays()} if prepared else None)
                if asked == LEAVE:
                    self.leave()
        jax.block_until_ready(self.state)
        numbers = whole.mean() | {"seconds/input_wait": pace.waited}
        if labels is not None:
            numbers["labels/other_pair"] = float(sum(exchange(labels.other)))
        return numbers, asked

    def train_inputs(self, batch: dict[str, Any], labels: EpisodeLabels | None) -> dict[str, Any]:
        """A host batch with its labels, and with the teacher's rows where the step makes labels."""
        inputs = step_inputs(batch)
        if labels is not None:
            inputs["labels"] = labels.of(batch["position"], batch["row"])
            if self.config.episode.online is not None and self.input.teacher is not None:
                inputs["teacher"] = self.input.teacher.rows(batch["row"])
        return inputs

    def compiled(self, phase: Phase) -> CompiledStep:
        """The compiled step of a phase; the state that goes in is given away."""
        function = step.make_train_step(self.graphdef, self.config, phase, self.mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        return CompiledStep(function, donate_argnums=0, out_shardings=(shardings, self.replicated))

    def evaluate(self, phase: str, episode: int) -> dict[str, float]:
        """Measures the model as it stands and logs it."""
        self.progress.doing(f"evaluate ({phase})")
        values = self.evaluator.measure(self.state["params"], self.state["batch_stats"])
        if values:
            self.log.write(self.done, episode, phase, values)
        return values

    def save(self, episode: dict | None = None, metrics: dict[str, float] | None = None) -> None:
        """Starts to save the state as it stands, unless that is saved already."""
        if self.done != self.saved:
            # A run that goes on from here must find all that was told up to here.
            self.log.flush()
            self.mirror.flush()
            self.checkpoints.save(self.done, self.state, self.meta, episode, metrics)
            self.saved = self.done
        self.requests.saved()

    def settled(self) -> bool:
        """Whether the run could end now without losing a step."""
        return self.done == self.saved and not self.checkpoints.saving()

    def leave(self) -> None:
        """Waits until all is saved, and leaves."""
        self.checkpoints.wait()
        self.requests.left()
        raise Leaving(self.done)

    @contextlib.contextmanager
    def part(self, clock: Stopwatch, name: str, shown_as: str | None = None) -> Iterator[None]:
        """Times a part of the episode and names it on the bar."""
        self.progress.doing(f"{self.title} {shown_as or name}")
        with clock.part(name):
            yield

    def close(self) -> None:
        """Finishes what is being written: all of it, also where one cannot be."""
        with contextlib.ExitStack() as stack:
            for one in (self.checkpoints, self.mirror, self.log, self.progress, self.profile):
                stack.callback(one.close)


def step_inputs(batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """What of a host batch goes to the devices."""
    return {
        "image": batch["image"],
        "tokens": batch["tokens"],
        "position": batch["position"].astype(np.int32),
    }
