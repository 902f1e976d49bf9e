"""Every fast path of the assignment against the plain one, and against float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protoclip_jax.episodes import kmeans_assignment as module
from protoclip_jax.episodes.kmeans import assign, kmeans


def features(n=3000, width=24, seed=0, spread=0.6):
    """Unit rows around a few hundred centres, as an encoder gives them."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(n // 10, width))
    rows = centres[rng.integers(0, len(centres), n)] + spread * rng.normal(size=(n, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def distances(points, centroids):
    """Squared distances in float64."""
    points, centroids = points.astype(np.float64), np.asarray(centroids, np.float64)
    cross = points @ centroids.T
    return np.sum(points**2, 1)[:, None] - 2 * cross + np.sum(centroids**2, 1)


def plan(k, **changes):
    return module.plan(k, platform="cpu", **({"low_precision": False, "active": False} | changes))


POINTS = features()
CENTROIDS = POINTS[:600] * np.float32(0.8)


@pytest.mark.parametrize("shift", [0.0, 30.0, 1000.0])
def test_labels_differ_from_float64_only_within_the_stated_margin(shift):
    points, centroids = POINTS + np.float32(shift), CENTROIDS + np.float32(shift)
    labels = np.asarray(assign(points, centroids))
    exact = distances(points - np.float64(shift), centroids - np.float64(shift))
    excess = exact[np.arange(len(points)), labels] - exact.min(1)
    radius = max(np.linalg.norm(part - shift, axis=1).max() for part in (points, centroids))
    assert excess.max() <= points.shape[1] * 2.0**-20 * radius**2


def test_ties_go_to_the_lowest_index():
    centroids = np.repeat(POINTS[:300], 2, axis=0)[np.random.default_rng(0).permutation(600)]
    lowest = np.array([np.flatnonzero((centroids == row).all(1))[0] for row in POINTS[:300]])
    np.testing.assert_array_equal(assign(POINTS[:300], centroids), lowest)
    for low_precision in (False, True):
        result = module.assign_pass(
            jnp.asarray(POINTS),
            jnp.asarray(centroids),
            module.unknown(len(POINTS)),
            jnp.ones(600, bool),
            plan(600, low_precision=low_precision),
        )
        first = np.array([np.flatnonzero((centroids == c).all(1))[0] for c in centroids])
        np.testing.assert_array_equal(first[np.asarray(result.labels)], result.labels)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("pick", ["_pick_exact", "_pick_packed"])
def test_picking_finds_the_maximum(pick, sign):
    group = 64 if pick == "_pick_exact" else 256
    scores = sign * np.random.default_rng(1).uniform(0.5, 1.5, (200, 512)).astype(np.float32)
    scores[:, 500] = module.FAR
    score, column = getattr(module, pick)(jnp.asarray(scores), group)
    best = scores.max(1)
    chosen = scores[np.arange(200), np.asarray(column)]
    if pick == "_pick_exact":
        np.testing.assert_array_equal(score, best)
        np.testing.assert_array_equal(column, scores.argmax(1))
    else:
        # 16 significant bits are kept.
        np.testing.assert_allclose(chosen, best, rtol=2.0**-15)
        np.testing.assert_allclose(score, best, rtol=2.0**-15)


def test_packed_agrees_with_exact_on_nearly_all_points():
    arguments = (
        jnp.asarray(POINTS),
        jnp.asarray(CENTROIDS),
        module.unknown(len(POINTS)),
        jnp.ones(600, bool),
    )
    exact = module.assign_pass(*arguments, plan(600))
    packed = module.assign_pass(*arguments, plan(600, low_precision=True))
    assert np.mean(np.asarray(exact.labels) == np.asarray(packed.labels)) >= 0.995
    np.testing.assert_allclose(packed.scores, exact.scores, rtol=0, atol=2e-2)


@pytest.mark.parametrize(("precision", "empty"), [("float32", "split"), ("bfloat16", "keep")])
def test_active_sets_change_nothing(precision, empty):
    """Bit for bit the plain algorithm, at every iteration, also with repeats and ties."""
    points = np.concatenate([POINTS, POINTS[:500], POINTS[:200]])
    for iterations in (2, 5, 20):
        plain, active = (
            kmeans(
                points,
                600,
                seed=1,
                seeding="random",
                iterations=iterations,
                precision=precision,
                empty=empty,
                active=active,
            )
            for active in (False, True)
        )
        for name, left, right in zip(plain._fields, plain, active, strict=True):
            np.testing.assert_array_equal(left, right, err_msg=f"{name}, {iterations} iterations")


def test_active_sets_skip_work(monkeypatch):
    """With one moved centroid only the points it may concern are compared with all."""
    counted = []
    original = module._compare

    def counting(points_td, columns, j, best, plan):
        jax.debug.callback(lambda j: counted.append(int(j)), j)
        return original(points_td, columns, j, best, plan)

    monkeypatch.setattr(module, "_compare", counting)
    active = plan(600, active=True)
    points, centroids = jnp.asarray(POINTS), jnp.asarray(CENTROIDS)
    everything = jnp.ones(600, bool)
    first = module.assign_pass(points, centroids, module.unknown(len(POINTS)), everything, active)
    jax.effects_barrier()
    plain_work, counted[:] = len(counted), []
    moved = jnp.arange(600) == 5
    nudged = centroids.at[5].multiply(0.5)
    second = module.assign_pass(points, nudged, first, moved, active)
    jax.effects_barrier()
    assert len(counted) < plain_work
    monkeypatch.undo()
    fresh = module.assign_pass(points, nudged, module.unknown(len(POINTS)), everything, plan(600))
    np.testing.assert_array_equal(second.labels, fresh.labels)
    np.testing.assert_array_equal(second.scores, fresh.scores)


def test_chunks_give_the_labels_of_the_whole():
    result = kmeans(POINTS, 600, seed=0, iterations=3)
    used = np.asarray(result.counts) > 0
    edges = [0, 1, 1300, len(POINTS)]
    parts = [assign(POINTS[a:b], result.centroids, used=used) for a, b in itertools.pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(parts), result.labels)


def test_place_does_not_change_a_points_scores():
    order = np.random.default_rng(0).permutation(len(POINTS))
    for low_precision in (False, True):
        run = [
            module.assign_pass(
                jnp.asarray(points),
                jnp.asarray(CENTROIDS),
                module.unknown(len(POINTS)),
                jnp.ones(600, bool),
                plan(600, low_precision=low_precision),
            )
            for points in (POINTS, POINTS[order])
        ]
        np.testing.assert_array_equal(np.asarray(run[0].scores)[order], run[1].scores)
        np.testing.assert_array_equal(np.asarray(run[0].labels)[order], run[1].labels)


def test_unused_centroids_are_never_chosen():
    used = np.arange(600) % 3 == 0
    labels = np.asarray(assign(POINTS, CENTROIDS, used=used))
    exact = np.where(used, distances(POINTS, CENTROIDS), np.inf)
    assert np.all(used[labels])
    assert np.mean(labels == exact.argmin(1)) > 0.999
    assert np.all(np.asarray(assign(POINTS, CENTROIDS, used=np.zeros(600, bool))) == 0)
