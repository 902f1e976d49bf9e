"""What is told of a run: lines and bar for people, numbers for the log."""

import math
import resource
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np

from protoclip_jax.config import Config
from protoclip_jax.data.list_lines import Repeats
from protoclip_jax.data.sources import PairSource, needless_limit
from protoclip_jax.data.start_check import equal_captions
from protoclip_jax.data.teacher import Teacher
from protoclip_jax.data.unreadable import UnreadableLog
from protoclip_jax.episodes.kmeans import Clusters
from protoclip_jax.storage.paths import AnyPath
from protoclip_jax.training.compiled import peak_flops
from protoclip_jax.training.logging import Meter, MetricLog
from protoclip_jax.training.phases import Phase, phase_of
from protoclip_jax.training.progress import Progress
from protoclip_jax.training.stopwatch import Stopwatch

OVERHEAD = ("sample", "extract", "cluster", "back-translate")  # what plain CLIP has not
WAIT_WARNING = 0.1  # share of training for which devices may wait for input unnoticed
FEW_POINTS = 8  # clustered pairs a prototype
FEW_USED = 0.5  # share of the prototypes that have members
STUCK_STEPS = 200  # steps in a row after which a model that does not learn is told of
# What such a model looks like.
STUCK = {
    "loss": "the InfoNCE loss is within 1 % of ln(batch), as of features that say nothing: check "
    "optimizer.learning_rate and the captions",
    "image": "image features have collapsed: they spread less than a twentieth of what they could",
    "text": "text features have collapsed: they spread less than a twentieth of what they could",
}


class Reporter:
    """Says and logs what happens; knows the recipe, but nothing of the state."""

    def __init__(self, config: Config, width: int, progress: Progress, log: MetricLog):
        """Args:
        config: the recipe.
        width: of the features.
        progress: for people.
        log: for numbers.
        """
        self._config, self._width, self._progress, self._log = config, width, progress, log
        self._told: set[str] = set()
        self._unreadable = 0  # pairs that were told
        self._skipped = self._skipped_ever = 0  # the first counts steps in a row
        self._stuck = dict.fromkeys(STUCK, 0)  # steps in a row
        self._since = time.perf_counter()

    def begin(self) -> None:
        """Starts the clock of the steps' speed: called before the first step of an episode."""
        self._since = time.perf_counter()

    def steps(
        self,
        step: int,
        episode: int,
        phase: Phase,
        recent: Meter,
        whole: Meter,
        flops: float | None = None,
    ) -> None:
        """Fetches the metrics since the last call, logs and shows their mean.

        Args:
          step: finished steps.
          episode: 0-based.
          phase: of the episode.
          recent: metrics since the last call.
          whole: metrics of the episode, to which they are added.
          flops: operations of a step over all devices.

        Raises:
          FloatingPointError: too many steps in a row were skipped.
        """
        if not len(recent):
            return
        part, rows = Meter(), recent.take(into=whole)
        for number, row in enumerate(rows, step - len(rows) + 1):
            part.count(row)
            self._look(number, row)
        values = part.mean()
        numbers = {f"train/{name}": value for name, value in values.items()}
        numbers |= self._speed(len(rows), flops)
        self._log.write(step, episode, phase.name, numbers)
        self._progress.show(shown(values) | shown_speed(numbers))

    def _look(self, step: int, row: dict[str, float]) -> None:
        """Warns of a step that was skipped, and of a model that does not learn."""
        if row["skipped"]:
            self._skip(step, row)
            return
        self._skipped = 0
        for name, what in STUCK.items():
            stuck = is_stuck(name, row, self._config.optimizer.batch, self._width)
            self._stuck[name] = self._stuck[name] + 1 if stuck else 0
            if self._stuck[name] == STUCK_STEPS:
                self._once(name, f"warning: at step {step}, for {STUCK_STEPS} steps, {what}")

    def _skip(self, step: int, row: dict[str, float]) -> None:
        self._skipped, self._skipped_ever = self._skipped + 1, self._skipped_ever + 1
        broken = ", ".join(name for name, value in row.items() if not math.isfinite(value))
        if self._skipped >= self._config.optimizer.max_skipped:
            raise FloatingPointError(
                f"not finite in {self._skipped} steps in a row, the last is step {step}: {broken}; "
                "parameters and checkpoints are as before them. Lower optimizer.learning_rate or "
                "set optimizer.clip_norm, in a new workdir"
            )
        self._progress.say(
            f"  step {step}: not finite: {broken}; the update was skipped "
            f"({self._skipped_ever} so far)"
        )

    def _speed(self, steps: int, flops: float | None) -> dict[str, float]:
        """Pairs a second and model FLOP use of a device, and memory, since the last call."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        devices = jax.device_count()
        pairs = steps * self._config.optimizer.batch
        numbers = {"speed/pairs_per_second_per_device": pairs / seconds / devices}
        if flops is not None:
            rate = flops * steps / seconds / devices
            numbers["speed/teraflops_per_device"] = rate / 1e12
            peak = peak_flops(jax.local_devices()[0])
            if peak is not None:
                numbers["speed/flop_use"] = rate / peak
        return numbers | memory()

    def title(self, episode: int) -> str:
        """What an episode (0-based) is called."""
        return f"episode {episode + 1}/{self._config.episode.count}"

    def source(self, source: PairSource, teacher: Teacher | None) -> None:
        """Tells how many pairs there are, which rows of a list are none, and what looks wrong."""
        first, *rest = source_lines(self._config, source, teacher)
        self._progress.say(first)
        self.lines(rest)

    def compiling(self, phase: Phase) -> None:
        """Tells that the step of a phase is compiled, and how many phases the run has."""
        episodes = range(self._config.episode.count)
        phases = list(dict.fromkeys(phase_of(self._config, episode) for episode in episodes))
        self._progress.say(
            f"  compiling the {phase.name} step, phase {phases.index(phase) + 1} of {len(phases)}: "
            "minutes for a large model, seconds where it was compiled before"
        )

    def lines(self, lines: Sequence[str]) -> None:
        """Tells what another room has to say."""
        for line in lines:
            self._progress.say(f"  {line}")

    def prototypes(self, numbers: dict[str, float], roomless: int) -> None:
        """After an extraction: warns of unused prototypes, and of pictures that are read twice."""
        if roomless:
            self._once(
                "room",
                f"data.keep_gigabytes={self._config.data.keep_gigabytes:g} has no room for "
                f"{roomless:,} of an episode's {self._config.extracted:,} pictures: they are read "
                "twice",
            )
        for name in ("image", "text", "external"):
            if f"clusters/{name}_used" in numbers:
                self._clusters(name, numbers)

    def _clusters(self, name: str, numbers: dict[str, float]) -> None:
        """Warns of clusters that say little, of one kind of features."""
        config, used = self._config, numbers[f"clusters/{name}_used"]
        count = config.external_prototypes if name == "external" else config.episode.prototypes
        if used <= 1 and used < count:
            self._once(
                f"one {name}",
                f"warning: {used:.0f} of {count:,} {name} prototypes has members: the {name} "
                "features are all alike or not finite, and their prototype terms say nothing",
            )
        elif used / count < FEW_USED:
            self._once(
                f"used {name}",
                f"warning: only {used / count:.0%} of the {name} prototypes have members: the "
                f"{name} features are few or have collapsed",
            )
        if bad := numbers.get(f"clusters/{name}_nonfinite_rows"):
            self._once(
                f"not finite {name}",
                f"warning: {bad:,.0f} of {config.extracted:,} {name} features are not finite or "
                "too large: no prototype is made of them",
            )

    def _once(self, key: str, text: str) -> None:
        if key not in self._told:
            self._told.add(key)
            self._progress.say(f"  {text}")

    def episode(
        self, step: int, episode: int, phase: Phase, numbers: dict, clock: Stopwatch
    ) -> None:
        """Logs an episode's numbers and seconds, and says them in a line."""
        seconds = clock.seconds
        numbers |= {f"seconds/{name}": value for name, value in seconds.items()}
        overhead = sum(seconds.get(name, 0.0) for name in OVERHEAD)
        numbers["share/overhead"] = overhead / seconds["train"]
        numbers["share/input_wait"] = numbers["seconds/input_wait"] / seconds["train"]
        numbers |= agreements(numbers)
        self._log.write(step, episode, phase.name, numbers)
        losses = ", ".join(f"{name} {value:.3f}" for name, value in shown(numbers).items())
        times = clock.line()
        if overhead:
            times += f"; overhead {numbers['share/overhead']:.0%} of training"
        self._progress.say(f"{self.title(episode)} {phase.name}: {losses} ({times})")
        # With online assignment every pair takes its own label at the step.
        other = numbers.get("labels/other_pair", 0)
        if other and self._config.episode.online is None:
            self._progress.say(
                f"  {other:,.0f} pairs trained without a prototype: their position was another "
                "pair's at extraction, because one of the two reads failed (see unreadable.tsv)"
            )
        if numbers["share/input_wait"] > WAIT_WARNING:
            data = self._config.data
            how = f"data.workers={data.workers}" if data.workers else f"data.threads={data.threads}"
            self._progress.say(
                f"  devices waited for input {numbers['share/input_wait']:.0%} of the time: "
                f"raise {how}, or keep pictures (data.keep, data.keep_gigabytes)"
            )

    def losses(self, log: UnreadableLog) -> None:
        """Tells of pairs that could not be read, when there are more, and of each kind of odd ones.

        Args:
          log: of all processes.
        """
        if len(log) > self._unreadable:
            self._unreadable = len(log)
            reasons = ", ".join(f"{what}: {n:,}" for what, n in log.counts.most_common())
            self._progress.say(
                f"  {len(log):,} pairs could not be read so far, over all processes, and others "
                f"took their place ({reasons}): unreadable*.tsv lists them"
            )
        for kind, rows in log.odd.items():
            self._once(
                f"odd {kind}",
                f"{len(rows):,} pictures so far have {kind}, and are used all the same; the first "
                f"is {log.first_odd(kind)}",
            )

    def result(self, workdir: AnyPath, table: str | None) -> None:
        """Prints the table of the evaluation and what to do next."""
        if table:
            print(table)
        print(
            f"\nNext: python -m protoclip_jax.evaluate --workdir={workdir}\n"
            f'or in Python: model = protoclip_jax.load("{workdir}"); '
            'model.encode_text(["a red kite"])'
        )


def source_lines(config: Config, source: PairSource, teacher: Teacher | None) -> list[str]:
    """How many pairs there are, which rows of a list are none, and what looks wrong."""
    lines = [f"{len(source):,} pairs of {source.name}."]
    lines += [
        f"left out, {why}: {dropped}" for why, dropped in getattr(source, "report", {}).items()
    ]
    if hasattr(source, "repeats") and not jax.process_index():  # one process tells the story
        lines += repeat_lines(source.repeats(), len(source))
    if not jax.process_index() and (line := equal_captions(source)):
        lines.append(line)
    if line := needless_limit(len(source), config.data.limit):
        lines.append(f"data.limit={config.data.limit:,}: {line}")
    if teacher is not None and teacher.note is None:
        lines.append(
            f"{teacher.path} says not which pairs it was made for: only its number of rows could "
            "be checked"
        )
    if teacher is not None and teacher.empty:
        lines.append(
            f"warning: {teacher.empty:,} of {len(teacher):,} rows of {teacher.path} are 0, or as "
            "good as that: such pairs are one cluster, whatever they show"
        )
    points = config.extracted / config.episode.prototypes
    if len(config.prototype_episodes) and points < FEW_POINTS:
        lines.append(
            f"only {points:.1f} pairs are clustered for each prototype; below {FEW_POINTS} "
            "prototypes turn into single pairs: lower episode.prototypes, or raise episode.size "
            "or episode.online"
        )
    return lines


def repeat_lines(repeats: Repeats, pairs: int) -> list[str]:
    """Warns of pairs that repeat earlier ones."""
    if not repeats.count:
        return []
    about = "" if repeats.one_in == 1 else "about "
    return [
        f"warning: {about}{repeats.count:,} of {pairs:,} pairs repeat an earlier one's picture and "
        "caption: in a batch together they are each other's negatives, and clusters count them "
        "twice"
    ]


def cluster_numbers(clusters: dict[str, Clusters]) -> dict[str, float]:
    """What there is to log about an episode's clusters."""
    numbers = {}
    for name, found in clusters.items():
        numbers[f"clusters/{name}_used"] = float(np.count_nonzero(np.asarray(found.counts)))
        numbers[f"clusters/{name}_objective"] = float(found.objective)
        numbers[f"clusters/{name}_iterations"] = float(found.iterations)
        numbers[f"clusters/{name}_nonfinite_rows"] = float(found.nonfinite)
    return numbers


def is_stuck(name: str, row: dict[str, float], batch: int, width: int) -> bool:
    """Whether the numbers of a step look like one kind of `STUCK`.

    Features of length 1 that point in all directions have a standard deviation of 1 / sqrt(width).
    """
    if name == "loss":
        target = math.log(batch)
        return abs(row.get("loss/clip", math.inf) - target) <= 0.01 * target
    return row[f"geometry/{name}_std"] < 0.05 / math.sqrt(width)


def memory() -> dict[str, float]:
    """Peak memory in GB: of this process, and of its fullest device where that can be told."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    numbers = {"memory/host_gb": peak * unit / 1e9}
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if stat and "peak_bytes_in_use" in stat]
    return numbers | ({"memory/device_gb": max(peaks) / 1e9} if peaks else {})


def agreements(numbers: dict[str, float]) -> dict[str, float]:
    """Of the pairs with both labels, the share whose online label is the offline one."""
    known = numbers.get("online/known", 0.0)
    same = {name: value for name, value in numbers.items() if name.startswith("online/same_")}
    if not known:
        return {}
    return {name.replace("same", "agreement"): value / known for name, value in same.items()}


def shown(values: dict[str, float]) -> dict[str, float]:
    """The loss terms, by their short names."""
    terms = ("total", "clip", "prototype", "external")
    return {term: values[f"loss/{term}"] for term in terms if f"loss/{term}" in values}


def shown_speed(numbers: dict[str, float]) -> dict[str, float]:
    """Speed and memory, by the short names of the bar."""
    names = {
        "speed/pairs_per_second_per_device": "pairs/s/device",
        "speed/flop_use": "FLOP use",
        "memory/device_gb": "GB",
    }
    return {short: numbers[name] for name, short in names.items() if name in numbers}
