"""Faults reported in public (tests/cases/KM-*): too few points, repeats, empty clusters, seeds."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from protoclip_jax.episodes.kmeans import kmeans
from protoclip_jax.episodes.prototypes import build_prototypes

CASES = Path(__file__).parent.parent / "cases"


def case(name):
    folder = CASES / name
    return json.loads((folder / "case.json").read_text()), np.load(folder / "x.npy")


def test_km_01_fewer_points_than_clusters():
    spec, points = case("KM-01")
    with pytest.raises(ValueError, match=rf"{len(points)} points.*{spec['k']} clusters"):
        kmeans(points, spec["k"], seed=0)


@pytest.mark.parametrize(("seeding", "empty"), [("d2", "split"), ("random", "keep")])
def test_km_03_fewer_distinct_points_than_clusters(seeding, empty):
    spec, points = case("KM-03")
    result = kmeans(points, spec["k"], seed=0, seeding=seeding, empty=empty)
    used = np.flatnonzero(np.asarray(result.counts))
    assert 1 <= len(used) <= spec["distinct"]
    if seeding == "d2":
        assert len(used) == spec["distinct"]
    assert np.all(np.isfinite(result.centroids))
    assert int(np.sum(result.counts)) == len(points)
    assert set(np.unique(result.labels)) == set(used)
    prototypes = build_prototypes(points, -points, result, result)
    for name in ("text_in_image", "image_in_text"):
        means = np.asarray(prototypes[name])
        assert np.all(np.isfinite(means))
        assert not np.any(np.delete(means, used, axis=0))
    np.testing.assert_array_equal(prototypes["text"]["counts"] > 0, np.asarray(result.counts) > 0)


@pytest.mark.parametrize("empty", ["split", "keep"])
def test_km_05_cluster_goes_empty(empty):
    spec, points = case("KM-05")
    initial = np.load(CASES / "KM-05" / spec["init"]).astype(np.float32)
    points = points.astype(np.float32)
    result = kmeans(points, spec["k"], seed=0, initial=initial, empty=empty, precision="float32")
    assert np.all(np.isfinite(result.centroids))
    assert np.isfinite(result.objective)
    far = int(np.argmax(np.linalg.norm(initial - points.mean(0), axis=1)))
    if empty == "keep":
        assert int(result.counts[far]) == 0
        np.testing.assert_allclose(result.centroids[far], initial[far], rtol=1e-6)
    else:  # split, as far as there are different points to split
        distinct = len(np.unique(points, axis=0))
        assert np.count_nonzero(result.counts) == min(spec["k"], distinct)
        assert np.linalg.norm(result.centroids[far] - initial[far]) > 1


DIGEST = """
import hashlib, sys, numpy as np
from protoclip_jax.episodes.kmeans import kmeans
result = kmeans(np.load(sys.argv[1]).astype(np.float32), int(sys.argv[2]), seed=int(sys.argv[3]))
parts = [np.asarray(part).tobytes() for part in (result.labels, result.centroids)]
print(hashlib.sha256(b"".join(parts)).hexdigest())
"""


def test_km_07_same_seed_same_answer_in_two_processes():
    spec, points = case("KM-07")

    def digest(seed):
        result = kmeans(points.astype(np.float32), spec["k"], seed=seed)
        parts = [np.asarray(part).tobytes() for part in (result.labels, result.centroids)]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    root = Path(__file__).parent.parent.parent
    other = subprocess.run(
        [sys.executable, "-c", DIGEST, CASES / "KM-07" / "x.npy", str(spec["k"]), "5"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert digest(5) == digest(5) == other.stdout.strip()
    assert digest(5) != digest(6)
