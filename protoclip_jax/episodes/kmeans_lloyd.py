"""Lloyd's algorithm on one set of points: start, iterations, final assignment in float32."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from protoclip_jax.episodes.kmeans_assignment import (
    Assignment,
    Plan,
    assign_pass,
    nearest_squared_distances,
    unknown,
)
from protoclip_jax.episodes.kmeans_seeding import centres_a_round, d2_rows, random_rows
from protoclip_jax.episodes.kmeans_update import member_means, normalised, split_largest
from protoclip_jax.episodes.segments import segment_counts

# A row whose squared length is above this counts as infinite: scores stay inside float32.
_LARGEST_SQUARE = 1e36
# Points whose mean is nearer to the origin than this many standard deviations are not shifted.
_NEAR = 4.0
# How far the halves of a split cluster are pushed apart, as faiss does it.
_NUDGE = 1 / 1024


class Clusters(NamedTuple):
    """What k-means found. With a leading modality axis on the points, every field has it too.

    Attributes:
      centroids: float32, all finite. Not of length 1 unless spherical.
      labels: int32, the nearest centroid of each point in float32, ties to the lowest index:
        exactly `assign(points, centroids, used=counts > 0)`.
      counts: int32, members of each cluster among rows that are finite and have weight. A
        prototype with count 0 is unused: it must be masked and is no one's target.
      objective: float32, weighted sum of squared distances of the finite rows.
      iterations: int32, updates made before nothing changed (or the limit).
      nonfinite: int32, rows left out because they hold NaN, infinity or absurdly large values.
        They carry the label of the used centroid nearest to the middle of all.
    """

    centroids: Float[Array, "*m k d"]
    labels: Int[Array, "*m n"]
    counts: Int[Array, "*m k"]
    objective: Float[Array, "*m"]
    iterations: Int[Array, "*m"]
    nonfinite: Int[Array, "*m"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What stays fixed while one program runs; see `kmeans` for the meaning."""

    k: int
    redos: int
    seeding: str
    empty: str
    spherical: bool
    exact_sums: bool
    plan: Plan


class _State(NamedTuple):
    centroids: Array
    known: Array  # the centroids of `assigned`
    assigned: Assignment
    iteration: Array


def best_of_redos(
    points_nd: Float[Array, "n d"],
    initial_kd: Float[Array, "k d"] | None,
    weights_n: Float[Array, "n"] | None,
    key: Key[Array, ""],
    iterations: Int[Array, ""],
    settings: Settings,
) -> Clusters:
    """Runs from `settings.redos` starts, one after the other; keeps the best objective."""
    _, finite = shifted(points_nd, jnp.zeros(points_nd.shape[1]))
    weights = jnp.where(finite, 1.0 if weights_n is None else weights_n, 0.0)

    origin = _loop_origin(points_nd, weights, settings)
    centred_nd, _ = shifted(points_nd, origin)

    def redo(index):
        key_of_one = jax.random.fold_in(key, index)
        start = _start(centred_nd, initial_kd, origin, weights, key_of_one, settings)
        state = _State(
            centroids=start,
            known=start,
            assigned=unknown(points_nd.shape[0]),
            iteration=jnp.int32(0),
        )
        state = _iterate(centred_nd, weights, weights_n is None, iterations, state, settings)
        return _finish(points_nd, finite, weights, origin, state, settings)

    runs = lax.map(redo, jnp.arange(settings.redos))
    best = jnp.argmin(runs.objective)
    return jax.tree.map(lambda leaf: leaf[best], runs)


def _start(centred_nd, initial_kd, origin, weights_n, key, settings: Settings) -> Array:
    """Start centroids around the origin of the first iterations."""
    if settings.seeding == "given":
        start = initial_kd - origin
    elif settings.seeding == "random":
        start = random_rows(key, centred_nd, weights_n, settings.k)
    else:
        base, centres = settings.plan, centres_a_round(settings.k)
        plan = base.resized(centres, low_precision=base.low_precision, active=False)
        start = d2_rows(key, centred_nd, weights_n, settings.k, plan)
    return normalised(start, start) if settings.spherical else start


def _iterate(
    centred_nd, weights_n, equal_weights: bool, iterations, state: _State, settings: Settings
) -> _State:
    """Lloyd's steps until no centroid moves."""
    plan = settings.plan

    def step(state: _State) -> _State:
        assigned = assign_pass(centred_nd, state.centroids, state.assigned, state.known, plan)
        centroids, counts = member_means(
            centred_nd,
            None if equal_weights else weights_n,
            jnp.where(weights_n > 0, assigned.labels, settings.k),
            state.centroids,
            exact=settings.exact_sums,
        )
        if settings.empty == "split":
            last = state.iteration + 1 >= iterations
            centroids = split_largest(centroids, counts, _NUDGE, ~last)
        if settings.spherical:
            centroids = normalised(centroids, state.centroids)
        return _State(centroids, state.centroids, assigned, state.iteration + 1)

    def unfinished(state: _State):
        moved = jnp.any(state.centroids != state.known)
        return (state.iteration < iterations) & (moved | (state.iteration == 0))

    return lax.while_loop(unfinished, step, state)


def _finish(points_nd, finite, weights_n, origin, state: _State, settings: Settings) -> Clusters:
    """The float32 assignment to the centroids as they are returned, as `assign` makes it."""
    k, plan = settings.k, settings.plan
    centroids = state.centroids + origin
    middle = origin_of_centroids(centroids)
    centred_nd, _ = shifted(points_nd, middle)
    # What the loop knows holds here too if neither shifts the points.
    same = jnp.all(middle == 0) & jnp.all(origin == 0)
    before = state.assigned._replace(scores=jnp.where(same, state.assigned.scores, jnp.inf))
    shifted_kd = centroids - middle
    labels = assign_pass(centred_nd, shifted_kd, before, state.known, plan).labels
    counts = segment_counts(jnp.where(weights_n > 0, labels, k), k)
    # As assign_pass scores a point at the middle.
    scores = jnp.where(counts > 0, -0.5 * jnp.sum(shifted_kd * shifted_kd, axis=1), -jnp.inf)
    labels = jnp.where(finite, labels, jnp.argmax(scores).astype(jnp.int32))
    distances = nearest_squared_distances(centred_nd, shifted_kd, labels)
    return Clusters(
        centroids=centroids,
        labels=labels,
        counts=counts,
        objective=jnp.sum(jnp.where(weights_n > 0, weights_n * distances, 0)),
        iterations=state.iteration,
        nonfinite=jnp.sum(~finite, dtype=jnp.int32),
    )


def shifted(
    points_nd: Float[Array, "n d"], origin_d: Float[Array, "d"]
) -> tuple[Float[Array, "n d"], Bool[Array, "n"]]:
    """Points minus the origin, with 0 in rows that are not finite; and which rows are."""
    finite = jnp.sum(points_nd * points_nd, axis=1) <= _LARGEST_SQUARE
    return jnp.where(finite[:, None], points_nd - origin_d, 0), finite


def origin_of_centroids(centroids_kd: Float[Array, "k d"]) -> Float[Array, "d"]:
    """What `assign` subtracts from points before scoring: a function of the centroids only."""
    return _zero_or_mean(centroids_kd, jnp.ones(centroids_kd.shape[0]))


def _loop_origin(points_nd, weights_n, settings: Settings) -> Array:
    """The mean, or 0 where that loses no precision; 0 for spherical k-means."""
    if settings.spherical:
        return jnp.zeros(points_nd.shape[1])
    clean_nd, _ = shifted(points_nd, jnp.zeros(points_nd.shape[1]))
    return _zero_or_mean(clean_nd, weights_n)


def _zero_or_mean(points_nd: Array, weights_n: Array) -> Array:
    """The weighted mean, but 0 when it is near.

    Far from the origin x.c - |c|^2 / 2 cancels; near it points are best left as they are, since
    the centroids then need no second rounding.
    """
    share = weights_n / jnp.maximum(jnp.sum(weights_n), 1e-30)
    mean = jnp.sum(points_nd * share[:, None], axis=0)
    difference = points_nd - mean
    spread = jnp.sum(jnp.sum(difference * difference, axis=1) * share)
    return jnp.where(jnp.sum(mean * mean) <= _NEAR**2 * spread, 0.0, mean)
