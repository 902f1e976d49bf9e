"""ProtoCLIP's objective, its gradient, AdamW and the learning rates, in float64 NumPy.

Written from the paper and the reference's notes, apart from the product: nothing is imported.
"""

import math

import numpy as np


def log_softmax(rows: np.ndarray) -> np.ndarray:
    rows = rows - rows.max(axis=1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def info_nce(image: np.ndarray, text: np.ndarray, log_scale: float):
    """Loss, and its gradient by image features, text features and the log scale."""
    size, scale = len(image), math.exp(log_scale)
    cosines = image @ text.T
    rows, columns = log_softmax(scale * cosines), log_softmax(scale * cosines.T).T
    loss = -(np.trace(rows) + np.trace(columns)) / (2 * size)
    slope = (np.exp(rows) + np.exp(columns) - 2 * np.eye(size)) / (2 * size)
    return loss, scale * slope @ text, scale * slope.T @ image, scale * np.sum(slope * cosines)


def prototype_side(features, log_scale, student, teacher, labels, used, temperature):
    """One prototype term: loss, accuracy in percent, and its gradient by features and log scale.

    `teacher` is None for hard targets. Prototypes that are not `used` are left out of both
    softmaxes, and rows with such a label out of the mean.
    """
    scale, student = math.exp(log_scale), student[used]
    place = np.full(len(used), -1)
    place[used] = np.arange(used.sum())  # where a used prototype stands among the used
    own = place[labels]
    counts = own >= 0
    cosines = features @ student.T
    logs = log_softmax(scale * cosines)
    if teacher is None:
        targets = np.eye(len(student))[own]
    else:
        teacher = teacher[used]
        targets = np.exp(log_softmax(teacher[own] @ teacher.T / temperature))
    share = np.where(counts, 1 / max(counts.sum(), 1), 0)[:, None]
    loss = -np.sum(share * targets * logs)
    accuracy = 100 * np.mean(counts & (logs.argmax(axis=1) == own))
    slope = share * (np.exp(logs) - targets)
    return loss, accuracy, scale * slope @ student, scale * np.sum(slope * cosines)


def geometry(image: np.ndarray, text: np.ndarray) -> dict[str, float]:
    """What is logged of a batch's un-projected features."""
    return {
        "geometry/image_std": image.std(axis=0, ddof=1).mean(),
        "geometry/text_std": text.std(axis=0, ddof=1).mean(),
        "geometry/modality_gap": np.linalg.norm(image.mean(axis=0) - text.mean(axis=0)),
        "geometry/pair_similarity": np.mean(np.sum(image * text, axis=1)),
    }


def means_by_label(rows: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Mean of the rows of each label; zero where there is none."""
    members = (rows[labels == k] for k in range(count))
    return np.stack([found.mean(axis=0) if len(found) else 0 * rows[0] for found in members])


def rate(step: int, peak: float, warmup: int, length: int) -> float:
    """Linear warm-up, then half a cosine that reaches 0 at `length`; nothing before 0."""
    if step < 0 or step >= length:
        return 0.0
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak / 2 * (1 + math.cos(math.pi * (step - warmup) / (length - warmup)))


def group(name: str) -> str:
    """Image tower, heads (with their temperature), or all the rest."""
    if "visual" in name:
        return "image"
    return "heads" if "projection_head" in name or name == "logit_scale_proto" else "text"


class AdamW:
    """torch's AdamW over a flat dict of arrays; each group counts its own steps."""

    def __init__(self, params, beta1, beta2, epsilon, decay, clip_norm):
        self.settings = beta1, beta2, epsilon, decay, clip_norm
        self.moments = {name: (0 * value, 0 * value) for name, value in params.items()}
        self.counts = {group(name): 0 for name in params}

    def step(self, params, gradients, rates, trained) -> tuple[dict[str, np.ndarray], float]:
        """Moved parameters, and the norm of the trained gradients before they are clipped."""
        beta1, beta2, epsilon, decay, clip_norm = self.settings
        moving = {name: g for name, g in gradients.items() if group(name) in trained}
        norm = math.sqrt(sum(np.sum(g * g) for g in moving.values()))
        factor = 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))
        for name in trained:
            self.counts[name] += 1
        params = dict(params)
        for name, gradient in moving.items():
            first, second = self.moments[name]
            first = beta1 * first + (1 - beta1) * factor * gradient
            second = beta2 * second + (1 - beta2) * (factor * gradient) ** 2
            self.moments[name] = first, second
            count = self.counts[group(name)]
            mean, square = first / (1 - beta1**count), second / (1 - beta2**count)
            move = mean / (np.sqrt(square) + epsilon)
            exempt = ("bn", "ln", "bias", "logit_scale", "projection_head")
            if params[name].ndim >= 2 and not any(part in name for part in exempt):
                move = move + decay * params[name]
            params[name] = params[name] - rates["image" if "visual" in name else "text"] * move
        for name in ("logit_scale", "logit_scale_proto"):
            params[name] = np.clip(params[name], 0, math.log(100))
        return params, norm
