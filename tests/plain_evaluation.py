"""The evaluation of a run, worked out again: features in float64, measures in plain NumPy.

Of the product only functions with tests of their own against scikit-learn and faiss: the probe's
fit and k-means.
"""

import io

import numpy as np
import plain_input as read
from PIL import Image
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

from protoclip_jax.episodes.kmeans import kmeans
from protoclip_jax.evaluation.linear_probe import linear_probe

PROMPTS = ("{}", "{} emoji", "a drawing of {}", "an icon showing {}")


class DrawnSource:
    """Few noisy images with captions, concepts and subgroups; each split has its own number."""

    def __init__(self, count: int, concepts: int, seed: int):
        rng = np.random.default_rng(seed)
        pixels = rng.integers(0, 255, (count, 40, 56, 3), np.uint8)
        pixels[:, :20] //= np.arange(1, count + 1, dtype=np.uint8)[:, None, None, None]
        self.images = [Image.fromarray(image) for image in pixels]
        self.captions = [f"thing {seed}{row} of colour {row * row % 7}" for row in range(count)]
        order = rng.permutation(count)
        self.columns = {
            "concept": [f"concept {(3 * row) % concepts}" for row in order],
            "subgroup": [f"group {row % 3}" for row in order],
        }

    def __len__(self):
        return len(self.images)

    def read(self, row: int) -> tuple[bytes, str]:
        file = io.BytesIO()
        self.images[row].save(file, "PNG")
        return file.getvalue(), self.captions[row]

    def column(self, name: str) -> list[str]:
        return self.columns[name]


def numbered(names: list[str]) -> tuple[list[str], np.ndarray]:
    classes = sorted(set(names))
    return classes, np.array([classes.index(name) for name in names])


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def features(run, train, test, val) -> dict[str, np.ndarray]:
    """What a model makes of the three splits, by the names of the suite."""

    def encoded(images=None, texts=None):
        """Whole batches of the size that is compiled already."""
        count, size = len(images or texts), run.settings["optimizer.batch"]
        side, found = run.towers_size, []
        for first in range(0, count, size):
            pixels, tokens = np.zeros((size, side, side, 3)), np.zeros((size, 77), np.int32)
            for at in range(min(size, count - first)):
                if images:
                    pixels[at] = read.normalised(read.middle(images[first + at], side) / 255)
                else:
                    tokens[at] = read.tokens(texts[first + at])
            found.append(run.towers.extract(run.params, run.stats, pixels, tokens))
        name = "image" if images else "text"
        return np.concatenate([getattr(part, name) for part in found])[:count]

    def classifier(source):
        names, _ = numbered(source.column("concept"))
        prompts = [prompt.replace("{}", name) for name in names for prompt in PROMPTS]
        return unit(encoded(texts=prompts).reshape(len(names), len(PROMPTS), -1).mean(axis=1))

    return {
        "train": encoded(train.images),
        "test": encoded(test.images),
        "val": encoded(val.images),
        "captions": encoded(texts=test.captions),
        "test_classifier": classifier(test),
        "val_classifier": classifier(val),
    }


def found_among(scores: np.ndarray, own: np.ndarray, k: int) -> float:
    """Percent of the rows whose own column is among the k best; equal scores share places."""
    scores = scores.astype(np.float32)
    mine = scores[np.arange(len(scores)), own][:, None]
    above, tied = (scores > mine).sum(axis=1), (scores == mine).sum(axis=1)
    return 100 * np.mean(np.clip((k - above) / tied, 0, 1))


def measures(found, train, test, val) -> dict[str, float]:
    """All metrics of the suite, from features."""
    values = {}
    splits = {
        "zero_shot": (found.test, found.test_classifier, test),
        "zero_shot_unseen": (found.val, found.val_classifier, val),
    }
    for name, (images, classes, source) in splits.items():
        _, own = numbered(source.column("concept"))
        for k in (1, 5):
            values[f"{name}/top{k}"] = found_among(np.float64(images) @ classes.T, own, k)
    _, groups = numbered([*train.column("subgroup"), *test.column("subgroup")])
    train_groups, test_groups = groups[: len(train)], groups[len(train) :]
    probe = linear_probe(found.train, train_groups, found.test, test_groups, seed=0)
    values["linear_probe/top1"] = probe.top1
    image, text = np.float64(found.test), np.float64(found.captions)
    each = np.arange(len(test))
    for k in (1, 5, 10):
        values[f"retrieval/image_to_text_r{k}"] = found_among(image @ text.T, each, k)
        values[f"retrieval/text_to_image_r{k}"] = found_among(text @ image.T, each, k)
    recalls = [value for name, value in values.items() if name.startswith("retrieval/")]
    values["retrieval/mean_recall"] = np.mean(recalls)
    k = len(set(test.column("subgroup")))
    clusters = kmeans(found.test, k, seed=0, iterations=100, redos=5).labels
    values["clustering/ari"] = adjusted_rand_score(test_groups, clusters)
    values["clustering/ami"] = adjusted_mutual_info_score(test_groups, clusters)
    values["geometry/modality_gap"] = np.linalg.norm(image.mean(axis=0) - text.mean(axis=0))
    values["geometry/alignment"] = np.mean(np.sum(image * text, axis=1))
    for name, rows in (("image", image), ("text", text)):
        cosines = rows @ rows.T
        others = cosines[~np.eye(len(rows), dtype=bool)]
        values[f"geometry/{name}_std"] = rows.std(axis=0, ddof=1).mean()
        values[f"geometry/{name}_self_similarity"] = others.mean()
        positive = cosines[cosines > 0].mean()
        values[f"geometry/{name}_self_similarity_positive"] = positive
    return values
