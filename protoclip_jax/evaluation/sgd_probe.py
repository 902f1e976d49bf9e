"""The linear probe by SGD: one jitted program, for training sets too large for L-BFGS."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from protoclip_jax.evaluation.features import finite_features
from protoclip_jax.evaluation.linear_probe import (
    HELD_OUT,
    LinearClassifier,
    Standardiser,
    split_rows,
)

# Mean squared length of the features: momentum SGD with the reference's rate of 0.1 is then
# stable whatever the directions (a softmax curves by half of this at most; 38 is the limit).
SQUARE_LENGTH = 32.0

Params = dict[str, Array]


class SGDSettings(NamedTuple):
    """The reference's: momentum SGD, decay also on the bias, cosine to 0 stepped once an epoch.

    `shuffle_seed` None keeps the rows in the order given (as the reference does), which fails
    when they are sorted by class.
    """

    epochs: int = 100
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-6
    batch_size: int = 1024
    shuffle_seed: int | None = 0


DEFAULTS = SGDSettings()


class SGDRun(NamedTuple):
    """One training: the classifier after the epoch asked for, and numbers of every epoch.

    `train_loss` is the mean over the epoch's rows, each batch before its update; `monitor_top1`
    is the accuracy on the monitor rows after the epoch, in percent.
    """

    classifier: LinearClassifier
    train_loss: Float[np.ndarray, "epochs"]
    monitor_top1: Float[np.ndarray, "epochs"]


class SGDProbeResult(NamedTuple):
    """`top1` is of the epoch (0-based) that was best on held-out training rows.

    `best_test_top1` is what the reference reports: the best of all epochs *on the test rows*. It
    is biased upwards, and here only for comparison.
    """

    top1: float
    epoch: int
    best_test_top1: float
    held_out_top1: Float[np.ndarray, "epochs"]
    classifier: LinearClassifier


def sgd_probe(
    train_features: Float[Array | np.ndarray, "n e"],
    train_labels: Int[Array | np.ndarray, "n"],
    test_features: Float[Array | np.ndarray, "m e"],
    test_labels: Int[Array | np.ndarray, "m"],
    *,
    settings: SGDSettings = DEFAULTS,
    held_out: float = HELD_OUT,
    seed: int = 0,
) -> SGDProbeResult:
    """Trains twice: without some rows to find the best epoch, then on all rows.

    Features are centred and scaled as a whole first, so that the rate suits every model; the
    reference trains on what the model gives (`train_sgd` does that).

    Args:
        train_features: one row a training picture.
        train_labels: its class, from 0.
        test_features: one row a test picture.
        test_labels: its class, in the same numbering.
        settings: of both trainings.
        held_out: share of the training rows the epoch is chosen by.
        seed: of that split and of the start.
    """
    train_features = finite_features(train_features, "training")
    test_features = finite_features(test_features, "test")
    train_labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
    shape = (int(train_labels.max()) + 1, train_features.shape[1])
    start = 0.01 * jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    standard = Standardiser.of(train_features, SQUARE_LENGTH)
    train, test = (standard.apply(x) for x in (train_features, test_features))
    rows, held = split_rows(train_labels, held_out, seed)
    choosing = train_sgd(
        train[rows], train_labels[rows], start, settings=settings,
        monitor_features=train[held], monitor_labels=train_labels[held],
    )  # fmt: skip
    epoch = int(choosing.monitor_top1.argmax())
    final = train_sgd(
        train, train_labels, start, settings=settings, keep_epoch=epoch,
        monitor_features=test, monitor_labels=test_labels,
    )  # fmt: skip
    return SGDProbeResult(
        top1=float(final.monitor_top1[epoch]),
        epoch=epoch,
        best_test_top1=float(final.monitor_top1.max()),
        held_out_top1=choosing.monitor_top1,
        classifier=standard.fold(final.classifier),
    )


def train_sgd(
    features: Float[Array | np.ndarray, "n e"],
    labels: Int[Array | np.ndarray, "n"],
    initial_weights: Float[Array | np.ndarray, "c e"],
    *,
    settings: SGDSettings = DEFAULTS,
    monitor_features: Float[Array | np.ndarray, "m e"],
    monitor_labels: Int[Array | np.ndarray, "m"],
    keep_epoch: int = -1,
) -> SGDRun:
    """Softmax regression by SGD from given weights and a bias of 0.

    The monitor rows only measure: nothing in the training depends on them. The last batch of an
    epoch may be smaller. `keep_epoch` is the epoch whose classifier is returned (-1: the last).

    Reference: the SGD mode of linear_eval.
    """
    kept, losses, right = _train(
        jnp.asarray(features),
        jnp.asarray(labels),
        jnp.asarray(initial_weights),
        jnp.asarray(monitor_features),
        jnp.asarray(monitor_labels),
        keep_epoch % settings.epochs,
        settings,
    )
    classifier = LinearClassifier(np.asarray(kept["weights"]), np.asarray(kept["bias"]))
    return SGDRun(classifier, np.asarray(losses), 100 * np.asarray(right) / len(monitor_labels))


@partial(jax.jit, static_argnames="settings")
def _train(features, labels, initial_weights, monitor_features, monitor_labels, keep, settings):
    params = {
        "weights": initial_weights,
        "bias": jnp.zeros(len(initial_weights), initial_weights.dtype),
    }

    def epoch(carry, index):
        params, velocity, kept = carry
        rate = settings.learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * index / settings.epochs))
        rows, real = _epoch_batches(len(labels), index, settings)

        def step(carry, batch):
            params, velocity = carry
            batch_rows, batch_real = batch
            loss, grads = jax.value_and_grad(_loss)(
                params, features[batch_rows], labels[batch_rows], batch_real
            )
            # As torch does it: decay joins the gradient before the momentum.
            velocity = jax.tree.map(
                lambda v, g, p: settings.momentum * v + g + settings.weight_decay * p,
                velocity, grads, params,
            )  # fmt: skip
            params = jax.tree.map(lambda p, v: p - rate * v, params, velocity)
            return (params, velocity), loss * batch_real.sum()

        (params, velocity), loss_sums = jax.lax.scan(step, (params, velocity), (rows, real))
        kept = jax.tree.map(lambda old, new: jnp.where(index == keep, new, old), kept, params)
        right = _scores(params, monitor_features).argmax(axis=1) == monitor_labels
        return (params, velocity, kept), (loss_sums.sum() / len(labels), right.sum())

    start = (params, jax.tree.map(jnp.zeros_like, params), params)
    (_, _, kept), (losses, right) = jax.lax.scan(epoch, start, jnp.arange(settings.epochs))
    return kept, losses, right


def _epoch_batches(count: int, epoch, settings: SGDSettings):
    """Row numbers (steps, batch) of one epoch, and 1 where they are real, 0 where they pad."""
    rows = jnp.arange(count)
    if settings.shuffle_seed is not None:
        rows = jax.random.permutation(
            jax.random.fold_in(jax.random.key(settings.shuffle_seed), epoch), count
        )
    steps = -(-count // settings.batch_size)
    padding = steps * settings.batch_size - count
    shape = (steps, settings.batch_size)
    real = jnp.pad(jnp.ones(count, jnp.float32), (0, padding))
    return jnp.pad(rows, (0, padding)).reshape(shape), real.reshape(shape)


def _scores(params: Params, features: Float[Array, "b e"]) -> Float[Array, "b c"]:
    return features @ params["weights"].T + params["bias"]


def _loss(params: Params, features, labels, real) -> Float[Array, ""]:
    """Mean cross-entropy of the real rows of a batch."""
    log_p = jax.nn.log_softmax(_scores(params, features))
    return -(jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0] * real).sum() / real.sum()
