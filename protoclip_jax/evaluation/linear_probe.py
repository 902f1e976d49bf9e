"""Linear probe: a linear classifier on frozen image features.

Multinomial logistic regression to convergence, for sets that fit this machine; `sgd_probe` is for
larger ones. Nothing is ever chosen on test rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from protoclip_jax.evaluation.features import finite_features

# Values of C for features of unit variance: from little more than class means to no penalty.
REGULARISATION = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
HELD_OUT = 0.2


class LinearClassifier(NamedTuple):
    """Scores are `features @ weights.T + bias`."""

    weights: Float[np.ndarray, "c e"]
    bias: Float[np.ndarray, "c"]


class ProbeResult(NamedTuple):
    """What a probe found: test accuracy in percent, and how the classifier was chosen.

    `held_out_top1` has the accuracy on the held-out rows, in percent, for every C that was tried.
    """

    top1: float
    regularisation: float
    held_out_top1: dict[float, float]
    classifier: LinearClassifier


def linear_probe(
    train_features: Float[Array | np.ndarray, "n e"],
    train_labels: Int[Array | np.ndarray, "n"],
    test_features: Float[Array | np.ndarray, "m e"],
    test_labels: Int[Array | np.ndarray, "m"],
    *,
    regularisation: Sequence[float] = REGULARISATION,
    held_out: float = HELD_OUT,
    seed: int = 0,
    tolerance: float = 0.1,
) -> ProbeResult:
    """Logistic regression with C chosen on held-out training rows, then fitted on all of them.

    The test rows are used once, for the number reported. C grows until two values in a row are
    no better than the best before them; of equally good ones the smallest wins. Features are
    standardised first (see `Standardiser`), so that C means the same for every model.

    Args:
        train_features: one row a training picture.
        train_labels: its class, from 0.
        test_features: one row a test picture.
        test_labels: its class, in the same numbering; a class not trained counts as wrong.
        regularisation: values of C to choose from.
        held_out: share of the training rows to choose by.
        seed: of that split.
        tolerance: of the fits, see `logistic_regression`.
    """
    train_features = finite_features(train_features, "training").astype(np.float64)
    test_features = finite_features(test_features, "test")
    train_labels = np.asarray(train_labels)
    classes = int(train_labels.max()) + 1
    standard = Standardiser.of(train_features)
    features = standard.apply(train_features)
    rows, held = split_rows(train_labels, held_out, seed)
    scores, best, start = {}, None, None
    for C in sorted(regularisation):
        start = logistic_regression(
            features[rows], train_labels[rows], C,
            num_classes=classes, tolerance=tolerance, start=start,
        )  # fmt: skip
        scores[C] = accuracy(start, features[held], train_labels[held])
        if best is None or scores[C] > scores[best]:
            best = C
        elif len([tried for tried in scores if tried > best]) == 2:
            break
    fitted = logistic_regression(
        features, train_labels, best, num_classes=classes, tolerance=tolerance
    )
    classifier = standard.fold(fitted)
    top1 = accuracy(classifier, test_features, test_labels)
    return ProbeResult(top1, float(best), scores, classifier)


def logistic_regression(
    features: Float[Array | np.ndarray, "n e"],
    labels: Int[Array | np.ndarray, "n"],
    C: float,
    *,
    num_classes: int | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    start: LinearClassifier | None = None,
) -> LinearClassifier:
    """Multinomial logistic regression in float64.

    Minimises C x (sum of cross-entropies) + |weights|^2 / 2, the bias being free: the problem
    that scikit-learn's `LogisticRegression` states. L-BFGS runs in coordinates in which the
    curvature at the start is the identity, so that it needs tens of iterations and not hundreds
    when the features are nearly alike, as an untrained model's are.

    Args:
        features: one row a picture.
        labels: classes, 0 to num_classes - 1.
        C: inverse strength of the penalty.
        num_classes: rows of the result; by default the largest label + 1. A class without a
            training row is never the answer: its weights are 0 and its bias -inf.
        tolerance: largest gradient entry to stop at, in those coordinates: the objective is then
            about tolerance^2 / 2 from its minimum for every parameter.
        max_iterations: of L-BFGS, at most.
        start: where to start from, instead of 0.

    Raises:
        ValueError: with fewer than two classes, or features that are not finite.
    """
    features = np.asarray(finite_features(features, "training"), np.float64)
    present, numbers = np.unique(np.asarray(labels), return_inverse=True)
    if len(present) < 2:
        raise ValueError(f"found {len(present)} class in the training labels, wanted 2 or more")
    initial = np.zeros((len(present), features.shape[1] + 1))
    if start is not None:
        initial = np.column_stack([start.weights[present], start.bias[present]])
    options = {"maxiter": max_iterations, "maxfun": 2 * max_iterations, "gtol": tolerance}
    options |= {"ftol": 64 * np.finfo(np.float64).eps, "maxls": 50}
    # One thread: where the cores have other work too, BLAS threads that wait for each other cost
    # ten times what they save.
    with threadpool_limits(1, user_api="blas"):
        problem = _Problem(features, numbers, len(present), C)
        found = minimize(
            problem.value_and_gradient, problem.inside(initial).ravel(),
            jac=True, method="L-BFGS-B", options=options,
        )  # fmt: skip
    weights = problem.outside(found.x.reshape(initial.shape))
    rows = int(present.max()) + 1 if num_classes is None else num_classes
    result = LinearClassifier(np.zeros((rows, features.shape[1])), np.full(rows, -np.inf))
    result.weights[present], result.bias[present] = weights[:, :-1], weights[:, -1]
    return result


class _Problem:
    """The objective in coordinates U with W = U L^-1, for L L' the curvature shared by classes.

    W has the bias in its last column, features a column of ones.
    """

    def __init__(self, features, labels, classes: int, C: float):
        self._labels, self._classes, self._C = labels, classes, C
        features = np.column_stack([features, np.ones(len(features))])
        self._penalty = np.ones(features.shape[1])
        self._penalty[-1] = 0.0
        # With W = 0 every probability is 1 / classes.
        curvature = C * (1 / classes) * (1 - 1 / classes) * (features.T @ features)
        curvature[np.diag_indices_from(curvature)] += self._penalty
        self._factor = cholesky(curvature, lower=True)
        self._features = np.ascontiguousarray(
            solve_triangular(self._factor, features.T, lower=True).T
        )

    def inside(self, weights: np.ndarray) -> np.ndarray:
        return weights @ self._factor

    def outside(self, inner: np.ndarray) -> np.ndarray:
        return solve_triangular(self._factor, inner.T, lower=True, trans=1).T

    def value_and_gradient(self, flat: np.ndarray) -> tuple[float, np.ndarray]:
        inner = flat.reshape(self._classes, -1)
        weights = self.outside(inner)
        scores = self._features @ inner.T
        scores -= scores.max(axis=1, keepdims=True)
        own = np.arange(len(scores)), self._labels
        own_scores = scores[own].sum()
        np.exp(scores, out=scores)
        totals = scores.sum(axis=1, keepdims=True)
        value = self._C * (np.log(totals).sum() - own_scores)
        value += 0.5 * (weights**2 @ self._penalty).sum()
        error = np.divide(scores, totals, out=scores)
        error[own] -= 1
        penalty = solve_triangular(self._factor, (weights * self._penalty).T, lower=True).T
        return value, (self._C * (error.T @ self._features) + penalty).ravel()


class Standardiser(NamedTuple):
    """Features less their mean, divided by one number: no direction is favoured or lost.

    A linear classifier can undo it, so it changes only what a penalty or a learning rate means.
    """

    mean: Float[np.ndarray, "e"]
    scale: float

    @classmethod
    def of(
        cls, features: Float[np.ndarray, "n e"], square_length: float | None = None
    ) -> "Standardiser":
        """Rows come to a mean squared length of `square_length`; by default e, unit variance."""
        mean = features.mean(axis=0, dtype=np.float64).astype(features.dtype)
        spread = float(np.square(features - mean).sum(dtype=np.float64) / len(features))
        wanted = features.shape[1] if square_length is None else square_length
        return cls(mean, (spread / wanted) ** 0.5 or 1.0)

    def apply(self, features: Float[np.ndarray, "n e"]) -> Float[np.ndarray, "n e"]:
        """Standardised features, in the type of what comes in."""
        return (features - self.mean) / self.scale

    def fold(self, classifier: LinearClassifier) -> LinearClassifier:
        """The classifier of plain features that equals `classifier` on standardised ones."""
        weights = classifier.weights / self.scale
        return LinearClassifier(weights, classifier.bias - weights @ self.mean)


def accuracy(
    classifier: LinearClassifier,
    features: Float[Array | np.ndarray, "n e"],
    labels: Int[Array | np.ndarray, "n"],
) -> float:
    """Share of rows whose best score is their label, in percent."""
    scores = np.asarray(features) @ classifier.weights.T + classifier.bias
    return float(100 * np.mean(scores.argmax(axis=1) == np.asarray(labels)))


def split_rows(
    labels: Int[Array | np.ndarray, "n"], held_out: float = HELD_OUT, seed: int = 0
) -> tuple[Int[np.ndarray, "a"], Int[np.ndarray, "b"]]:
    """Training rows cut in two, class by class: rows to fit on and rows to choose by.

    Every class with two or more rows has at least one on each side; a single row stays with the
    fit. Depends on the labels and the seed only.
    """
    labels = np.asarray(labels)
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    chosen = []
    for rows in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        count = min(len(rows) - 1, max(1, round(held_out * len(rows))))
        chosen.append(rows[:count])
    held = np.sort(np.concatenate(chosen))
    if not len(held):
        raise ValueError(
            f"none of the {len(labels)} training rows can be held out: every class has one row"
        )
    return np.setdiff1d(np.arange(len(labels)), held), held


def chance(
    train_labels: Int[Array | np.ndarray, "n"], test_labels: Int[Array | np.ndarray, "m"]
) -> float:
    """What a probe gets without looking: always the commonest training class, in percent.

    For balanced classes that is 100 / classes; otherwise more, and the fairer thing to beat.
    """
    commonest = np.bincount(np.asarray(train_labels)).argmax()
    return float(100 * np.mean(np.asarray(test_labels) == commonest))
