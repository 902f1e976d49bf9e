"""A whole run, worked out again in float64 NumPy beside the trainer's own.

Of the product only `models.clip` is used, which the golden files prove: its towers (in float64),
their derivative, and their start. Two things that rounding decides are taken from the recorded
run after they were found right: the bytes of an image (two resizers may differ by a level) and the
clusters of k-means.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import plain_input as read
import plain_loss as loss
from PIL import Image

from protoclip_jax.models import clip
from protoclip_jax.models.presets import CLIPConfig

Arrays = dict[str, np.ndarray]


@dataclass
class Recorded:
    """What the trainer's own run did, in the order in which it did it."""

    batches: list[dict] = field(default_factory=list)
    kmeans: list[tuple[np.ndarray, int, dict, Any]] = field(default_factory=list)
    evaluations: list[Any] = field(default_factory=list)


@dataclass
class Episode:
    """What is compared of a prototype episode: features and teacher's rows by position."""

    number: int
    features: Arrays
    labels: Arrays


def flat(tree: dict, prefix: str = "") -> Arrays:
    """Nested dicts by path."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        else:
            found[f"{prefix}{key}"] = np.asarray(value)
    return found


def nested(arrays: Arrays) -> dict:
    """The nested dicts that `flat` came from."""
    tree: dict = {}
    for path, value in arrays.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    return tree


class Towers:
    """The product's towers in float64, as functions of flat parameters."""

    def __init__(self, sizes: CLIPConfig, seed: int):
        start = jax.jit(lambda: clip.initialise(sizes, seed)[1:])()
        self.start = [{n: np.float64(x) for n, x in flat(tree).items()} for tree in start]
        with jax.enable_x64(True):
            apply = partial(clip.apply, clip.initialise(sizes, 0, jnp.float64)[0])

            @jax.jit
            def train(params, stats, images, tokens, slopes):
                def features(params):
                    return apply(params, stats, images, tokens, train=True)

                found, pull, moved = jax.vjp(features, params, has_aux=True)
                return found, moved, pull(slopes)[0]

            @jax.jit
            def extract(params, stats, images, tokens):
                return apply(params, stats, images, tokens, train=False)[0]

        self._train, self._extract = train, extract

    def train(self, params, stats, images, tokens, slopes):
        """Features, moved statistics, and the gradient of sum(slopes * features)."""
        with jax.enable_x64(True):
            found, moved, gradients = self._train(
                nested(params), nested(stats), images, tokens, slopes
            )
            return clip.Features(*map(np.asarray, found)), flat(moved), flat(gradients)

    def extract(self, params, stats, images, tokens) -> clip.Features:
        """Features with running statistics."""
        with jax.enable_x64(True):
            found = self._extract(nested(params), nested(stats), images, tokens)
        return clip.Features(*map(np.asarray, found))


class PlainRun:
    """The same run; `settings` holds the recipe's options by their path."""

    def __init__(
        self, settings: dict, towers: Towers, pairs: Path, teacher: Path, recorded: Recorded
    ):
        self.settings, self.towers, self.recorded = settings, towers, recorded
        self.files, self.captions = read.read_list(pairs)
        self.teacher = np.load(teacher)
        self.params, self.stats = towers.start
        self.optimizer = loss.AdamW(
            self.params,
            *(settings[f"optimizer.{name}"] for name in ("beta1", "beta2", "epsilon")),
            settings["optimizer.weight_decay"],
            settings["optimizer.clip_norm"],
        )
        self.batches: list[dict] = []  # as they should be, to compare with the recorded
        self.episodes: list[Episode] = []
        self.steps: list[dict[str, float]] = []
        self.margins: list[float] = []  # by how much online labels are nearest

    def run(self, evaluate: Callable | None = None) -> None:
        """All episodes; `evaluate` is called where the trainer evaluates."""
        s = self.settings
        if evaluate:
            evaluate(self)
        for episode in range(s["episode.count"]):
            locked = episode >= s["episode.count"] - s["episode.locked"]
            prototypes = s["episode.warmup"] <= episode and not locked
            episode_rows = read.episode_rows(len(self.files), s["episode.size"], episode, s["seed"])
            found = self.prepared(episode, episode_rows) if prototypes else None
            for step in range(self.per_episode):
                batch = self.batch(episode_rows, read.TRAIN, episode, step, self.trained)
                self.step(batch, found, locked)
        if evaluate:
            evaluate(self)

    @property
    def per_episode(self) -> int:
        return self.settings["episode.size"] // self.settings["optimizer.batch"]

    @property
    def trained(self) -> int:
        return self.per_episode * self.settings["optimizer.batch"]

    @property
    def extracted(self) -> int:
        online = self.settings["episode.online"]
        size = self.settings["episode.size"]
        return size if online == "none" else round(online * size)

    def batch(self, rows: np.ndarray, purpose: int, episode: int, step: int, end: int) -> dict:
        """A batch of a pass, ready for the towers; positions from `end` on are padding."""
        s, size = self.settings, self.towers_size
        positions = np.arange(step * s["optimizer.batch"], (step + 1) * s["optimizer.batch"])
        images = np.zeros((len(positions), size, size, 3), np.uint8)
        captions, row_of = [""] * len(positions), np.full(len(positions), -1)
        for at, position in enumerate(positions):
            if position < end:
                row = row_of[at] = rows[position]
                captions[at] = self.captions[row]
                with Image.open(self.files[row]) as image:
                    image = read.kept(image, s["data.keep_side"])
                place = s["seed"], episode, purpose, int(position)
                images[at] = read.light_crop(image, size, *place)
        expected = {
            "image": images,
            "tokens": np.array([read.tokens(caption) for caption in captions]),
            "position": positions,
            "row": row_of,
            "episode": episode,
            "kind": purpose,
        }
        seen = self.recorded.batches[len(self.batches)]
        self.batches.append(expected)
        values = read.light_colours(seen["image"], s["seed"], episode, purpose, positions)
        return expected | {"pixels": read.normalised(values)}

    @property
    def towers_size(self) -> int:
        return self.settings["image_size"]

    def prepared(self, episode: int, rows: np.ndarray) -> dict:
        """Extraction, the recorded clusters, and back translation of our own features."""
        s, parts = self.settings, []
        for step in range(-(-self.extracted // s["optimizer.batch"])):
            batch = self.batch(rows, read.EXTRACT, episode, step, self.extracted)
            parts.append(
                self.towers.extract(self.params, self.stats, batch["pixels"], batch["tokens"])
            )
        features = {
            name: np.concatenate([getattr(part, f"{name}_projected") for part in parts])
            for name in ("image", "text")
        }
        features = {name: values[: self.extracted] for name, values in features.items()}
        features["external"] = self.teacher[rows[: self.extracted]]
        first = 2 * len(self.episodes)
        both, external = (found for *_, found in self.recorded.kmeans[first : first + 2])
        labels = {"image": both.labels[0], "text": both.labels[1], "external": external.labels}
        centroids = {
            "image": np.float64(both.centroids[0]),
            "text": np.float64(both.centroids[1]),
            "external": np.float64(external.centroids),
        }
        self.episodes.append(Episode(episode, features, labels))
        used = {
            name: np.bincount(found, minlength=len(centroids[name])) > 0
            for name, found in labels.items()
        }
        means = {
            (space, source): loss.means_by_label(features[space], labels[source], len(used[source]))
            for space in ("image", "text")
            for source in labels
        }
        return {"labels": labels, "centroids": centroids, "used": used, "means": means}

    def labels(self, batch: dict, features: Arrays, prepared: dict) -> tuple[Arrays, dict]:
        """Of a batch: by position, or the nearest centroid now; and the shares that are logged."""
        offline = {}
        for name, found in prepared["labels"].items():
            known = np.full(self.settings["episode.size"], -1)
            known[: len(found)] = found
            offline[name] = known[batch["position"]]
        if self.settings["episode.online"] == "none":
            return offline, {}
        online = {}
        for name, rows in features.items():
            distances = np.linalg.norm(rows[:, None] - prepared["centroids"][name], axis=2)
            distances[:, ~prepared["used"][name]] = np.inf
            online[name] = distances.argmin(axis=1)
            first, second = np.sort(distances, axis=1)[:, :2].T
            self.margins.append(np.min(second - first))
        shares = {"online/known": np.mean(offline["image"] >= 0)}
        for name, found in online.items():
            shares[f"online/same_{name}"] = np.mean(found == offline[name])
        return online, shares

    def step(self, batch: dict, prepared: dict | None, locked: bool) -> None:
        """Forward, losses, gradient, update; keeps what the trainer logs."""
        s, number, images = self.settings, len(self.steps), batch["pixels"]
        inputs = self.params, self.stats, images, batch["tokens"]
        zeros = clip.Features(*(np.zeros((len(images), n)) for n in self.widths))
        features, moved, _ = self.towers.train(*inputs, zeros)
        scale, scale_proto = self.params["logit_scale"], self.params["logit_scale_proto"]
        value, *slopes, by_scale = loss.info_nce(features.image, features.text, scale)
        terms = {"loss/clip": value}
        metrics = {"temperature/clip": np.exp(-scale)}
        weight = s["objective.clip"]
        total = weight * value
        slopes = [*(weight * slope for slope in slopes), 0 * zeros[2], 0 * zeros[3]]
        by_scale, by_scale_proto = weight * by_scale, 0.0
        if prepared is not None:
            own = {"image": features.image_projected, "text": features.text_projected}
            rows = own | {"external": self.teacher[batch["row"]]}
            labels, shares = self.labels(batch, rows, prepared)
            metrics |= shares | {"temperature/prototype": np.exp(-scale_proto)}
            for term, weight in (
                ("prototype", s["objective.prototype"]),
                ("external", s["objective.external"]),
            ):
                for at, student in ((2, "image"), (3, "text")):
                    other = {"image": "text", "text": "image"}[student]
                    source = other if term == "prototype" else "external"
                    value, accuracy, slope, slope_scale = loss.prototype_side(
                        own[student],
                        scale_proto,
                        prepared["means"][student, source],
                        prepared["centroids"][source] if term == "prototype" else None,
                        labels[source],
                        prepared["used"][source],
                        s["objective.temperature"],
                    )
                    terms[f"loss/{term}_{student}"] = value
                    metrics[f"accuracy/{term}_{student}"] = accuracy
                    total += weight * value / 2
                    slopes[at] = slopes[at] + weight / 2 * slope
                    by_scale_proto += weight / 2 * slope_scale
                both = [terms[f"loss/{term}_{student}"] for student in ("image", "text")]
                terms[f"loss/{term}"] = np.mean(both)
        *_, gradients = self.towers.train(*inputs, clip.Features(*slopes))
        gradients |= {"logit_scale": by_scale, "logit_scale_proto": by_scale_proto}
        rates = self.rates(number)
        trained = {"text"} | (set() if locked else {"image"})
        trained |= {"heads"} if prepared is not None else set()
        self.params, norm = self.optimizer.step(self.params, gradients, rates, trained)
        # Statistics of what does not run, or is locked, stand still.
        self.stats |= {
            name: value
            for name, value in moved.items()
            if (prepared is not None if "projection_head" in name else not locked)
        }
        metrics |= terms | {"loss/total": total, "grad_norm": norm, "skipped": 0.0}
        metrics |= {f"learning_rate/{tower}": rate for tower, rate in rates.items()}
        for name in ("logit_scale", "logit_scale_proto"):
            metrics[f"{name}_after"] = self.params[name]
        self.steps.append(metrics | loss.geometry(features.image, features.text))

    @property
    def widths(self) -> tuple[int, ...]:
        projected = self.settings["model.projection_width"]
        return (self.settings["embed_dim"],) * 2 + (projected,) * 2

    def rates(self, step: int) -> dict[str, float]:
        """Learning rates: the image tower's ends at the lock, the rest's may start late."""
        s, per_episode = self.settings, self.per_episode
        warmup = s["optimizer.warmup_steps"]
        free = (s["episode.count"] - s["episode.locked"]) * per_episode
        late = s["optimizer.text_start_episode"] * per_episode
        total = s["episode.count"] * per_episode
        return {
            "image": loss.rate(step, s["optimizer.learning_rate"], warmup, free),
            "text": loss.rate(step - late, s["optimizer.text_learning_rate"], warmup, total - late),
        }
