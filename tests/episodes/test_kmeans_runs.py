"""Whole runs of k-means: devices, options, rows that are not finite, limits, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from protoclip_jax.episodes import kmeans as module
from protoclip_jax.episodes.kmeans import assign, kmeans
from protoclip_jax.episodes.kmeans_update import split_largest

RNG = np.random.default_rng(0)
CENTRES = RNG.normal(size=(40, 16))
POINTS = (CENTRES[RNG.integers(0, 40, 2500)] + 0.4 * RNG.normal(size=(2500, 16))).astype(np.float32)
FAST = {"precision": "float32"}


def mesh(devices: int):
    shape = (devices // 2, 2) if devices > 1 else (1, 1)
    axes = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh(shape, ("data", "fsdp"), axes, devices=jax.devices()[:devices])


def same(left, right):
    for name, a, b in zip(left._fields, left, right, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def objective(points, result, weights=1.0):
    centroids = np.asarray(result.centroids, np.float64)[np.asarray(result.labels)]
    return np.sum(weights * np.sum((points.astype(np.float64) - centroids) ** 2, axis=1))


@pytest.mark.parametrize("precision", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_same_bits_on_1_2_and_8_devices(precision):
    points = POINTS[:2496]
    settings = {"seed": 4, "iterations": 6, "active": True, "precision": precision}
    alone = kmeans(points, 200, **settings)
    same(alone, kmeans(points, 200, **settings))
    if precision == "float32":
        same(alone, kmeans(points, 200, mesh=mesh(2), **settings))
    many = mesh(8)
    sharded = jax.device_put(points, NamedSharding(many, PartitionSpec(("data", "fsdp"))))
    same(alone, kmeans(sharded, 200, mesh=many, **settings))


@pytest.mark.accelerator
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_same_bits_from_run_to_run(precision):
    """Where threads add in any order, sums of floats would differ."""
    settings = {"seed": 4, "iterations": 6, "active": True, "precision": precision}
    runs = [kmeans(POINTS[:2496], 200, **settings) for _ in range(3)]
    assert len(np.unique(runs[0].labels)) > 100
    for run in runs[1:]:
        same(run, runs[0])


def test_modalities_in_one_call_equal_separate_ones():
    both = np.stack([POINTS, POINTS[::-1] * 2])
    initial = both[:, :50]
    together = kmeans(both, 50, seed=0, initial=initial, **FAST)
    for index in range(2):
        alone = kmeans(both[index], 50, seed=0, initial=initial[index], **FAST)
        same(alone, jax.tree.map(lambda leaf, i=index: leaf[i], together))


def test_result_is_consistent():
    result = kmeans(POINTS, 100, seed=0, **FAST)
    labels, counts = np.asarray(result.labels), np.asarray(result.counts)
    np.testing.assert_array_equal(np.bincount(labels, minlength=100), counts)
    np.testing.assert_array_equal(assign(POINTS, result.centroids), labels)
    np.testing.assert_allclose(result.objective, objective(POINTS, result), rtol=1e-5)
    assert int(result.nonfinite) == 0
    assert 1 < int(result.iterations) < 20
    # At a fixed point every centroid is the mean of its members.
    sums = np.zeros((100, 16))
    np.add.at(sums, labels, POINTS)
    np.testing.assert_allclose(result.centroids, sums / counts[:, None], atol=2e-6)


def test_stops_when_nothing_changes():
    early = kmeans(POINTS, 100, seed=0, iterations=60, **FAST)
    late = kmeans(POINTS, 100, seed=0, iterations=61, **FAST)
    assert int(early.iterations) < 60
    same(early, late)


@pytest.mark.accelerator
@pytest.mark.parametrize(
    ("k", "options"),
    [(100, {}), pytest.param(600, {}, marks=pytest.mark.slow), (600, {"spherical": True})],
)
def test_bfloat16_gives_the_bits_of_float32(k, options):
    results = [kmeans(POINTS, k, seed=2, precision=p, **options) for p in ("float32", "bfloat16")]
    same(*results)
    np.testing.assert_array_equal(assign(POINTS, results[1].centroids), results[1].labels)


def test_redos_keep_the_best():
    objectives = []
    for redos in (1, 3):
        result = kmeans(POINTS, 100, seed=1, redos=redos, seeding="random", **FAST)
        objectives.append(float(result.objective))
    # The first redo is the single run.
    assert objectives[1] <= objectives[0]
    several = [
        float(kmeans(POINTS, 100, seed=s, redos=3, seeding="random", **FAST).objective)
        for s in range(6)
    ]
    single = [
        float(kmeans(POINTS, 100, seed=s, redos=1, seeding="random", **FAST).objective)
        for s in range(6)
    ]
    assert np.mean(several) < np.mean(single)


def test_d2_start_is_better_than_a_random_one():
    means = {}
    for seeding in ("d2", "random"):
        runs = [
            kmeans(POINTS, 100, seed=s, iterations=1, seeding=seeding, **FAST) for s in range(5)
        ]
        means[seeding] = np.mean([float(run.objective) for run in runs])
    assert means["d2"] < 0.97 * means["random"]


def test_seeds_and_starts():
    start = kmeans(POINTS, 100, seed=7, iterations=0, seeding="random", **FAST)
    rows = {row.tobytes() for row in POINTS}
    chosen = [row.tobytes() for row in np.asarray(start.centroids)]
    assert len(set(chosen)) == 100
    assert set(chosen) <= rows
    other = kmeans(POINTS, 100, seed=8, iterations=0, seeding="random", **FAST)
    assert not np.array_equal(start.centroids, other.centroids)


def test_spherical_centroids_have_length_one():
    points = POINTS / np.linalg.norm(POINTS, axis=1, keepdims=True)
    result = kmeans(points, 100, seed=0, spherical=True, **FAST)
    np.testing.assert_allclose(np.linalg.norm(result.centroids, axis=1), 1, atol=1e-6)
    cosine = points.astype(np.float64) @ np.asarray(result.centroids, np.float64).T
    chosen = cosine[np.arange(len(points)), np.asarray(result.labels)]
    assert np.max(cosine.max(1) - chosen) < 1e-5
    plain = kmeans(points, 100, seed=0, **FAST)
    lengths = np.linalg.norm(plain.centroids, axis=1, keepdims=True)
    by_plain = np.sum(points * (np.asarray(plain.centroids) / lengths)[np.asarray(plain.labels)])
    assert chosen.sum() > 0.99 * by_plain


def test_weights_are_repeats():
    weights = np.random.default_rng(1).integers(0, 4, 600)
    points = POINTS[:600]
    initial = points[weights > 0][:30]
    weighted = kmeans(
        points, 30, seed=0, initial=initial, weights=weights.astype(np.float32), **FAST
    )
    repeated = kmeans(np.repeat(points, weights, axis=0), 30, seed=0, initial=initial, **FAST)
    np.testing.assert_allclose(weighted.centroids, repeated.centroids, atol=1e-5)
    np.testing.assert_allclose(weighted.objective, repeated.objective, rtol=1e-5)
    labels = np.asarray(weighted.labels)
    np.testing.assert_array_equal(np.repeat(labels, weights), repeated.labels)
    members = np.bincount(labels[weights > 0], minlength=30)
    np.testing.assert_array_equal(weighted.counts, members)


def test_far_from_the_origin():
    """Differences of 1 at 10,000: products alone would keep no correct digit."""
    near = kmeans(POINTS, 100, seed=0, **FAST)
    far = kmeans(POINTS + np.float32(10000), 100, seed=0, **FAST)
    np.testing.assert_allclose(far.objective, near.objective, rtol=0.05)
    shifted = POINTS + np.float32(10000)
    np.testing.assert_allclose(far.objective, objective(shifted, far), rtol=1e-3)
    for precision in ("float32", "bfloat16"):
        result = kmeans(shifted, 100, seed=0, precision=precision)
        np.testing.assert_array_equal(assign(shifted, result.centroids), result.labels)
        assert float(result.objective) < 1.1 * float(near.objective)


@pytest.mark.accelerator
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_rows_that_are_not_finite_poison_nothing(precision):
    bad = {3: np.nan, 77: np.inf, 1500: -np.inf, 2001: 1e30}
    points = POINTS.copy()
    for row, value in bad.items():
        points[row, row % 16] = value
    result = kmeans(points, 100, seed=0, precision=precision)
    assert int(result.nonfinite) == len(bad)
    assert np.all(np.isfinite(result.centroids))
    assert np.isfinite(result.objective)
    assert int(np.sum(result.counts)) == len(points) - len(bad)
    good = np.delete(np.arange(len(points)), list(bad))
    np.testing.assert_array_equal(
        np.bincount(np.asarray(result.labels)[good], minlength=100), result.counts
    )
    used = np.asarray(result.counts) > 0
    assert np.all(used[np.asarray(result.labels)])
    np.testing.assert_array_equal(assign(points, result.centroids, used=used), result.labels)
    if precision == "bfloat16":
        return
    initial = POINTS[:100] * np.float32(0.9)
    poisoned = kmeans(points, 100, seed=0, initial=initial, **FAST)
    without = kmeans(points[good], 100, seed=0, initial=initial, **FAST)
    np.testing.assert_allclose(poisoned.centroids, without.centroids, atol=1e-6)
    np.testing.assert_allclose(poisoned.objective, without.objective, rtol=1e-6)


def test_nothing_finite_at_all():
    result = kmeans(np.full((30, 4), np.nan, np.float32), 5, seed=0)
    assert int(result.nonfinite) == 30
    assert np.all(np.isfinite(result.centroids))
    assert not np.any(result.counts)
    assert np.all((np.asarray(result.labels) >= 0) & (np.asarray(result.labels) < 5))


def test_all_points_identical():
    points = np.full((300, 8), 0.3, np.float32)
    result = kmeans(points, 10, seed=0, seeding="random")
    assert np.all(np.isfinite(result.centroids))
    assert int(np.sum(np.asarray(result.counts) > 0)) == 1
    np.testing.assert_allclose(result.objective, 0, atol=1e-9)


def test_split_copies_the_largest():
    yes = jnp.asarray(True)
    centroids = np.arange(12, dtype=np.float32).reshape(6, 2) + 1
    counts = np.array([5, 0, 9, 1, 0, 9], np.int32)
    split = np.asarray(split_largest(jnp.asarray(centroids), jnp.asarray(counts), 1 / 1024, yes))
    up, down = np.float32([1 + 1 / 1024, 1 - 1 / 1024]), np.float32([1 - 1 / 1024, 1 + 1 / 1024])
    np.testing.assert_array_equal(split[1], centroids[2] * up)
    np.testing.assert_array_equal(split[2], centroids[2] * down)
    np.testing.assert_array_equal(split[4], centroids[5] * up)
    np.testing.assert_array_equal(split[5], centroids[5] * down)
    np.testing.assert_array_equal(split[[0, 3]], centroids[[0, 3]])
    alone = jnp.asarray([1, 0, 1, 1, 0, 1], jnp.int32)
    np.testing.assert_array_equal(split_largest(jnp.asarray(centroids), alone, 0.1, yes), centroids)


# Three far groups, of which the start gives one centroid to the last two and one to none.
GROUPS = np.repeat(np.float32([[-4, 1], [3, 1], [5, 1]]), (10, 20, 20), axis=0)
FAR_START = np.float32([[-4, 1], [4, 1], [100, 1]])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_split_cluster_finds_members(precision):
    """The halves are pushed apart far enough to differ in the format of the products."""
    points = GROUPS + np.float32(0.1) * RNG.normal(size=GROUPS.shape).astype(np.float32)
    result = kmeans(points, 3, seed=0, initial=FAR_START, precision=precision)
    np.testing.assert_array_equal(np.sort(result.counts), [10, 20, 20])
    np.testing.assert_allclose(np.sort(result.centroids[:, 0]), [-4, 3, 5], atol=0.1)


def test_no_split_after_the_last_update():
    """The donor would be left beside the mean of its members, the copy without any."""
    result = kmeans(GROUPS, 3, seed=0, initial=FAR_START, iterations=1, **FAST)
    np.testing.assert_array_equal(result.centroids, FAR_START)
    np.testing.assert_array_equal(result.counts, [10, 40, 0])


def test_memory_is_bounded_by_tiles(monkeypatch):
    n, k, memory = 40_000, 4000, []
    compiled = module._run

    def measured(*arguments, **settings):
        analysis = compiled.lower(*arguments, **settings).compile().memory_analysis()
        memory.append(analysis.temp_size_in_bytes)

    monkeypatch.setattr(module, "_run", measured)
    kmeans.__wrapped__(np.zeros((n, 16), np.float32), k, seed=0)
    assert memory[0] < n * k * 4 / 10


def test_errors_name_what_is_wrong():
    points = POINTS[:20]
    for arguments, words in (
        ({"k": 21}, "20 points cannot form 21 clusters"),
        ({"k": 0}, "0 clusters"),
        ({"seeding": "best"}, "seeding is 'best'.*d2, random"),
        ({"empty": "drop"}, "empty is 'drop'"),
        ({"precision": "half"}, "precision is 'half'"),
        ({"redos": 0}, "redos"),
        ({"iterations": -1}, "iterations"),
        ({"initial": points[:3]}, r"initial has shape \(3, 16\)"),
        ({"initial": points[:4], "redos": 2}, "redos is 2"),
        ({"weights": np.ones(3, np.float32)}, r"weights have shape \(3,\)"),
        ({"weights": -np.ones(20, np.float32)}, "0 or above"),
    ):
        with pytest.raises(ValueError, match=words):
            kmeans(points, **({"k": 4, "seed": 0} | arguments))


@pytest.fixture
def unasked():
    """The answer is kept."""
    module.fast_bfloat16.cache_clear()
    yield
    module.fast_bfloat16.cache_clear()


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize(
    ("flags", "fast"),
    [("fpu avx2 avx512f", False), ("fpu avx512_bf16 sse", True), ("amx_bf16", True), (None, False)],
)
def test_dispatch_reads_what_the_chip_has(flags, fast, monkeypatch, tmp_path):
    asked, fast_bfloat16 = [], module.fast_bfloat16

    def cpuinfo(path):
        asked.append(path)
        return tmp_path / "cpuinfo"

    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(module, "Path", cpuinfo)
    assert fast_bfloat16("gpu")
    assert not asked
    assert fast_bfloat16("cpu") == fast
    assert asked == ["/proc/cpuinfo"]
