"""The prototype loss: a student feature against the prototypes of its own space."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from protoclip_jax.objectives.logits import similarity, wide
from protoclip_jax.objectives.shards import over_rows, summed

# Scores of a chunk: 8 MB in float32, which stay in a processor's caches, and enough work that a
# loop over chunks costs nothing. Of 2^19 to 2^23 the fastest on two CPU cores at K = 20,000.
_SCORES_AT_ONCE = 2**21


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


def chunk_rows(rows: int, k: int) -> int:
    """Rows that a device scores at a time, against k prototypes."""
    chunks = -(-rows * k // _SCORES_AT_ONCE)
    size = -(-rows // max(1, chunks))
    return min(rows, -(-size // 8) * 8)  # whole tiles of eight


def working_bytes(rows: int, k: int, width: int, *, soft: bool) -> int:
    """Memory of a device while it computes one such loss and its gradient, in float32.

    Args:
        rows: Of the batch on this device.
        k: Prototypes.
        width: Of the features.
        soft: Whether the targets are soft: their numbers and the teacher's centroids come on top.
    """
    scores, copies = (4, 2) if soft else (3, 1)
    return 4 * (scores * chunk_rows(rows, k) * k + copies * k * width)


def _prototype_loss(
    features_bd, labels_b, logit_scale, student_kd, teacher_ke, used_k, axes, *, temperature
):
    features_bd, logit_scale, student_kd = wide(features_bd, logit_scale, student_kd)
    if teacher_ke is not None:
        teacher_ke = teacher_ke.astype(student_kd.dtype)
    # The scale goes in with the features, so that its gradient comes of theirs.
    scaled_bd = jnp.exp(logit_scale) * features_bd
    losses_b, right_b = _row_losses(
        temperature, scaled_bd, labels_b, student_kd, teacher_ke, used_k
    )
    k = used_k.shape[0]
    counts_b = (labels_b >= 0) & (labels_b < k) & used_k[jnp.clip(labels_b, 0, k - 1)]
    loss = summed(jnp.sum(jnp.where(counts_b, losses_b, 0)), axes)
    counted = summed(jnp.sum(counts_b, dtype=loss.dtype), axes)
    right = summed(jnp.sum(counts_b & right_b, dtype=loss.dtype), axes)
    rows = summed(jnp.asarray(labels_b.shape[0], loss.dtype), axes)
    return loss / jnp.maximum(counted, 1), 100 * right / rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _row_losses(temperature, scaled_bd, labels_b, student_kd, teacher_ke, used_k):
    """Cross-entropy of every row, and whether its best prototype is its label.

    A row's loss depends on no other row, and prototypes take no gradient. So what goes back to the
    features, softmax minus target times the prototypes, is made on the way forward, some rows at a
    time: (b, k) is never held, and nothing is computed twice.
    """
    return _by_chunks(temperature, scaled_bd, labels_b, student_kd, teacher_ke, used_k)[:2]


def _forward(temperature, scaled_bd, labels_b, student_kd, teacher_ke, used_k):
    *out, slopes_bd = _by_chunks(temperature, scaled_bd, labels_b, student_kd, teacher_ke, used_k)
    return tuple(out), slopes_bd


def _backward(temperature, slopes_bd, cotangents):
    losses_b, _ = cotangents
    return losses_b[:, None] * slopes_bd, None, None, None, None


_row_losses.defvjp(_forward, _backward)


def _by_chunks(temperature, scaled_bd, labels_b, *whole):
    """`_chunk` over as many rows at a time as `chunk_rows` says."""
    rows = labels_b.shape[0]
    size = chunk_rows(rows, whole[0].shape[0])
    if size >= rows:
        return _chunk(temperature, scaled_bd, labels_b, *whole)
    rest = -rows % size
    chunks = (
        jnp.pad(scaled_bd, ((0, rest), (0, 0))).reshape(-1, size, scaled_bd.shape[1]),
        jnp.pad(labels_b, (0, rest)).reshape(-1, size),
    )
    found = jax.lax.map(lambda chunk: _chunk(temperature, *chunk, *whole), chunks)
    return tuple(part.reshape(-1, *part.shape[2:])[:rows] for part in found)


def _chunk(temperature, scaled_bd, labels_b, student_kd, teacher_ke, used_k):
    """Losses of a few rows, whether they are right, and the gradient by the scaled features."""
    scores_bk = _only_used(similarity(scaled_bd, student_kd), used_k)
    places_k = jnp.arange(used_k.shape[0])
    if teacher_ke is None:
        target_bk = (places_k == labels_b[:, None]).astype(scores_bk.dtype)
    else:
        target_bk = _soft_targets(teacher_ke, labels_b, used_k, temperature)
    logs_bk = jax.nn.log_softmax(scores_bk)
    losses_b = -jnp.sum(target_bk * logs_bk, axis=1)
    # The lowest index of the best score. Two reductions: argmax itself takes a CPU longer than a
    # matmul.
    best_b = jnp.max(scores_bk, axis=1, keepdims=True)
    first_b = jnp.min(jnp.where(scores_bk == best_b, places_k, used_k.shape[0]), axis=1)
    slopes_bd = jnp.matmul(
        jnp.exp(logs_bk) - target_bk, student_kd, precision=jax.lax.Precision.HIGHEST
    )
    return losses_b, first_b == labels_b, slopes_bd


def _soft_targets(teacher_ke, labels_b, used_k, temperature):
    """softmax(C_T[y] C_T' / T) over the used prototypes."""
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
