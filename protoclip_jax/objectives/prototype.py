"""The prototype loss: a student feature against the prototypes of its own space."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from protoclip_jax.objectives.logits import cross_entropy, similarity, wide
from protoclip_jax.objectives.shards import over_rows, summed


def prototype_loss(
    features_bd: Float[Array | np.ndarray, "b d"],
    logit_scale: Float[Array | np.ndarray, ""],
    student_kd: Float[Array | np.ndarray, "k d"],
    teacher_kd: Float[Array | np.ndarray, "k e"] | None,
    labels_b: Int[Array | np.ndarray, " b"],
    used_k: Bool[Array | np.ndarray, " k"] | None,
    temperature: float | int | None,
    *,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of student scores with the teacher's view of the label.

    Scores S = exp(s) f C'. The target of a row with label y is softmax(C_T[y] C_T' / T), or y
    itself without a temperature (reference: `ProtoLoss`). Prototypes carry no gradient and are
    not re-normalised.

    Args:
        features_bd: L2-normalised projected features of the student.
        logit_scale: s, the raw (log) parameter of the prototype loss.
        student_kd: C, the prototypes in the student's space.
        teacher_kd: C_T, the centroids the labels belong to; not needed for hard targets.
        labels_b: Cluster of each row; a label outside [0, k) takes its row out of the mean.
        used_k: Prototypes without members (False) leave both softmaxes, and rows with such a
            label leave the mean. None keeps all of them, as the reference does.
        temperature: T, or None for hard targets.
        mesh: Spreads the rows over all its axes; prototypes are whole on every device.

    Returns:
        loss: Mean over the rows that count, float32 or wider; 0 without a gradient if none does.
        accuracy: Percent of *all* rows whose best prototype is their label; rows that do not
            count are wrong.

    Raises:
        ValueError: A temperature that is not positive, a temperature without a teacher, or a
            batch that the devices of the mesh do not divide.
    """
    if temperature is not None and temperature <= 0:
        raise ValueError(
            f"target temperature is {temperature}, but must be above 0; use None for hard targets"
        )
    if temperature is not None and teacher_kd is None:
        raise ValueError(f"soft targets (temperature {temperature}) need the teacher's centroids")
    used_k = jnp.ones(student_kd.shape[0], bool) if used_k is None else jnp.asarray(used_k)
    teacher_kd = None if temperature is None else _constant(teacher_kd, used_k)
    whole = (logit_scale, _constant(student_kd, used_k), teacher_kd, used_k)
    local = functools.partial(_prototype_loss, temperature=temperature)
    return over_rows(local, mesh, (features_bd, jnp.asarray(labels_b)), whole)


def _prototype_loss(
    features_bd, labels_b, logit_scale, student_kd, teacher_ke, used_k, axes, *, temperature
):
    features_bd, logit_scale, student_kd = wide(features_bd, logit_scale, student_kd)
    scores_bk = jnp.exp(logit_scale) * similarity(features_bd, student_kd)
    scores_bk = _only_used(scores_bk, used_k)
    own_bk = jnp.arange(used_k.shape[0]) == labels_b[:, None]
    counts_b = jnp.any(own_bk & used_k, axis=1)
    if teacher_ke is None:
        losses_b = cross_entropy(scores_bk, labels_b)
    else:
        target_bk = _soft_targets(teacher_ke.astype(scores_bk.dtype), labels_b, used_k, temperature)
        losses_b = -jnp.sum(target_bk * jax.nn.log_softmax(scores_bk), axis=1)
    loss = summed(jnp.sum(jnp.where(counts_b, losses_b, 0)), axes)
    counted = summed(jnp.sum(counts_b, dtype=loss.dtype), axes)
    right_b = counts_b & (jnp.argmax(scores_bk, axis=1) == labels_b)
    right = summed(jnp.sum(right_b, dtype=loss.dtype), axes)
    rows = summed(jnp.asarray(labels_b.shape[0], loss.dtype), axes)
    return loss / jnp.maximum(counted, 1), 100 * right / rows


def _soft_targets(teacher_ke, labels_b, used_k, temperature):
    """softmax(C_T[y] C_T' / T) over the used prototypes, for the local rows only."""
    own_be = teacher_ke[jnp.clip(labels_b, 0, teacher_ke.shape[0] - 1)]
    return jax.nn.softmax(_only_used(similarity(own_be, teacher_ke) / temperature, used_k))


def _constant(prototypes_kd, used_k):
    """Prototypes without a gradient, the unused ones as zeros.

    An unused one may hold anything, even NaN, which 0 * NaN would bring into the gradient.
    """
    return jax.lax.stop_gradient(jnp.where(used_k[:, None], prototypes_kd, 0))


def _only_used(logits_bk, used_k):
    """Unused prototypes at the lowest finite number: probability 0, and 0 * log(0) stays 0."""
    return jnp.where(used_k, logits_bk, jnp.finfo(logits_bk.dtype).min)
