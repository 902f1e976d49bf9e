"""Start centroids: rounds of D2 sampling, or a random permutation of the points."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from protoclip_jax.episodes.kmeans_assignment import (
    Plan,
    assign_pass,
    nearest_squared_distances,
    unknown,
)

_ROUNDS = 8
_ONE_AT_A_TIME = 64


def random_rows(
    key: Key[Array, ""], points_nd: Float[Array, "n d"], weights_n: Float[Array, "n"], k: int
) -> Float[Array, "k d"]:
    """k different rows with positive weight, each as likely (the reference's random start)."""
    draws = jnp.where(weights_n > 0, jax.random.uniform(key, weights_n.shape), -1.0)
    return points_nd[lax.top_k(draws, k)[1]]


def centres_a_round(k: int) -> int:
    """Few centres one at a time (k-means++), many in eight rounds."""
    return 1 if k <= _ONE_AT_A_TIME else -(-k // _ROUNDS)


def d2_rows(
    key: Key[Array, ""],
    points_nd: Float[Array, "n d"],
    weights_n: Float[Array, "n"],
    k: int,
    plan: Plan,
) -> Float[Array, "k d"]:
    """k rows drawn in rounds, each round in proportion to the squared distance to the last ones.

    A round draws its centres at once and without repetition (Gumbel noise and the k largest), so
    all rounds together cost one pass of assignment. The distances are taken by differences, so
    repeats of a chosen point are never drawn while any other point is left.

    Args:
      key: random key.
      points_nd: finite rows.
      weights_n: weight of each row; rows of weight 0 are never drawn while others are left.
      k: number of centres.
      plan: tile shapes for `centres_a_round(k)` centroids.
    """
    size = centres_a_round(k)
    rounds = -(-k // size)
    num_points, width = points_nd.shape

    def draw(index, carry):
        chosen, nearest_n = carry
        noise = jax.random.gumbel(jax.random.fold_in(key, index), (num_points,))
        logits = jnp.log(weights_n * nearest_n) + noise
        centres = points_nd[lax.top_k(logits, size)[1]]
        if size == 1:
            labels = jnp.zeros(num_points, jnp.int32)
        else:
            labels = assign_pass(points_nd, centres, unknown(num_points), centres, plan).labels
        distance = nearest_squared_distances(points_nd, centres, labels)
        nearest_n = jnp.where(index == 0, distance, jnp.minimum(nearest_n, distance))
        return lax.dynamic_update_slice(chosen, centres, (index * size, 0)), nearest_n

    chosen = jnp.zeros((rounds * size, width), jnp.float32)
    chosen, _ = lax.fori_loop(0, rounds, draw, (chosen, jnp.ones(num_points)))
    return chosen[:k]
