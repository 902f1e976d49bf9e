"""Every fast path of the assignment against the plain one, and against float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protoclip_jax.episodes import kmeans_assignment as module
from protoclip_jax.episodes import kmeans_picking as picking
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


@pytest.mark.accelerator
@pytest.mark.parametrize("shift", [0.0, 30.0, 1000.0])
def test_labels_differ_from_float64_only_within_the_stated_margin(shift):
    points, centroids = POINTS + np.float32(shift), CENTROIDS + np.float32(shift)
    labels = np.asarray(assign(points, centroids))
    exact = distances(points - np.float64(shift), centroids - np.float64(shift))
    excess = exact[np.arange(len(points)), labels] - exact.min(1)
    radius = max(np.linalg.norm(part - shift, axis=1).max() for part in (points, centroids))
    assert excess.max() <= points.shape[1] * 2.0**-20 * radius**2


@pytest.mark.accelerator
def test_ties_go_to_the_lowest_index():
    centroids = np.repeat(POINTS[:300], 2, axis=0)[np.random.default_rng(0).permutation(600)]
    lowest = np.array([np.flatnonzero((centroids == row).all(1))[0] for row in POINTS[:300]])
    np.testing.assert_array_equal(assign(POINTS[:300], centroids), lowest)
    for low_precision in (False, True):
        result = module.assign_pass(
            jnp.asarray(POINTS),
            jnp.asarray(centroids),
            module.unknown(len(POINTS)),
            jnp.asarray(centroids),
            plan(600, low_precision=low_precision),
        )
        first = np.array([np.flatnonzero((centroids == c).all(1))[0] for c in centroids])
        np.testing.assert_array_equal(first[np.asarray(result.labels)], result.labels)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("pick", ["pick_exact", "pick_packed"])
def test_picking_finds_the_maximum(pick, sign):
    group = 64 if pick == "pick_exact" else 256
    scores = sign * np.random.default_rng(1).uniform(0.5, 1.5, (200, 512)).astype(np.float32)
    scores[:, 500] = module.FAR
    score, column, *second = getattr(picking, pick)(jnp.asarray(scores), group)
    best = scores.max(1)
    chosen = scores[np.arange(200), np.asarray(column)]
    if pick == "pick_exact":
        np.testing.assert_array_equal(score, best)
        np.testing.assert_array_equal(column, scores.argmax(1))
    else:
        # 16 significant bits are kept.
        np.testing.assert_allclose(chosen, best, rtol=2.0**-15)
        np.testing.assert_allclose(score, best, rtol=2.0**-15)
        np.testing.assert_allclose(second[0], np.sort(scores, 1)[:, -2], rtol=2.0**-15)


def hard_cases():
    """Points and centroids where a rounded score is easily wrong."""
    rng = np.random.default_rng(3)
    lengths = np.exp(rng.normal(size=(len(POINTS), 1))).astype(np.float32)
    outlier = np.concatenate([CENTROIDS[:-1], 100 * CENTROIDS[-1:]])
    near_ties = CENTROIDS[:1] + np.float32(1e-4) * rng.normal(size=(600, 24)).astype(np.float32)
    return {
        "features": (POINTS, CENTROIDS),
        "noise": rng.normal(size=(2, 3000, 24)).astype(np.float32),
        "lengths": (POINTS * lengths, CENTROIDS * lengths[:600]),
        "far": (POINTS + np.float32(3), CENTROIDS + np.float32(3)),
        "outlier": (POINTS, outlier),
        "ties": (POINTS, near_ties),
        "repeats": (POINTS, np.repeat(CENTROIDS[:300], 2, axis=0)),
        "zero": (POINTS * 0, CENTROIDS),
    }


@pytest.mark.accelerator
@pytest.mark.parametrize("name", hard_cases())
def test_screening_in_bfloat16_gives_the_labels_of_float32(name):
    """Bit for bit, from nothing and from what an earlier pass knew."""
    points, centroids = map(jnp.asarray, hard_cases()[name])
    centroids = centroids[:600]
    noise = np.random.default_rng(4).normal(size=centroids.shape).astype(np.float32)
    moved = centroids.at[::3].add(0.1 * noise[::3] * jnp.linalg.norm(centroids[::3], axis=1).mean())
    nothing = module.unknown(len(points))
    first, second = [], []
    for low_precision in (False, True):
        shapes = plan(600, low_precision=low_precision, active=True)
        first.append(module.assign_pass(points, centroids, nothing, centroids, shapes))
        second.append(module.assign_pass(points, moved, first[-1], centroids, shapes))
    for exact, screened in (first, second):
        np.testing.assert_array_equal(screened.labels, exact.labels)
        assert np.all(np.asarray(screened.scores) <= np.asarray(exact.scores))
    fresh = module.assign_pass(points, moved, nothing, moved, plan(600))
    np.testing.assert_array_equal(second[0].labels, fresh.labels)


def test_screening_leaves_little_to_float32():
    """And its bound holds for every score, with the rounding of the packing."""
    # Compiled, as it runs: a compiler may leave out conversions there and back.
    error = np.asarray(jax.jit(module._screening_error)(POINTS, CENTROIDS))
    plainly = module._screening_error(jnp.asarray(POINTS), jnp.asarray(CENTROIDS))
    np.testing.assert_allclose(error, plainly, rtol=1e-4)
    halves = [jnp.asarray(part).astype(jnp.bfloat16) for part in (POINTS, CENTROIDS)]
    products = [np.asarray(part, np.float64) for part in halves]
    wrong = np.abs(products[0] @ products[1].T - POINTS.astype(np.float64) @ CENTROIDS.T)
    assert np.all(wrong.max(1) <= error)
    scores = np.sort(-0.5 * distances(POINTS, CENTROIDS), axis=1)
    assert np.mean(scores[:, -1] - scores[:, -2] <= 2 * error) < 0.25


@pytest.mark.accelerator
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

    def counting(points_td, columns, plan, j, best):
        jax.debug.callback(lambda j: counted.append(int(j)), j)
        return original(points_td, columns, plan, j, best)

    monkeypatch.setattr(module, "_compare", counting)
    active = plan(600, active=True)
    points, centroids = jnp.asarray(POINTS), jnp.asarray(CENTROIDS)
    nothing = module.unknown(len(POINTS))
    first = module.assign_pass(points, centroids, nothing, centroids, active)
    jax.effects_barrier()
    plain_work, counted[:] = len(counted), []
    nudged = centroids.at[5].multiply(0.5)
    second = module.assign_pass(points, nudged, first, centroids, active)
    jax.effects_barrier()
    assert len(counted) < plain_work
    monkeypatch.undo()
    fresh = module.assign_pass(points, nudged, nothing, nudged, plan(600))
    np.testing.assert_array_equal(second.labels, fresh.labels)
    np.testing.assert_array_equal(second.scores, fresh.scores)


@pytest.mark.accelerator
def test_chunks_give_the_labels_of_the_whole():
    result = kmeans(POINTS, 600, seed=0, iterations=3)
    used = np.asarray(result.counts) > 0
    edges = [0, 1, 1300, len(POINTS)]
    parts = [assign(POINTS[a:b], result.centroids, used=used) for a, b in itertools.pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(parts), result.labels)


@pytest.mark.accelerator
def test_place_does_not_change_a_points_scores():
    order = np.random.default_rng(0).permutation(len(POINTS))
    for low_precision in (False, True):
        run = [
            module.assign_pass(
                jnp.asarray(points),
                jnp.asarray(CENTROIDS),
                module.unknown(len(POINTS)),
                jnp.asarray(CENTROIDS),
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
