"""The benchmark command end to end at tiny sizes. Times are reported, never asserted."""

import importlib
import json
import sys

import numpy as np
import pytest

from protoclip_jax.benchmark import kmeans, report, timing
from protoclip_jax.benchmark.__main__ import BENCHMARKS, main

TINY_KMEANS = ("kmeans", "--sizes=400:8:16,90:4:90", "--iterations=3", "--repeats=2")
KMEANS_FIELDS = {"n", "d", "k", "precision", "speedup_cpu_seconds", "objective_ratio"}


@pytest.fixture
def no_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)  # its import then fails


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_run_with_its_own_options(name, monkeypatch, capsys):
    """By its defaults: each of them is one that it takes from the command line."""
    ran = []

    def run(options):
        ran.append(options)
        return report.Report([name], ["x"], [("row", ["1"])], [], {"of": name}, code=3)

    module = importlib.import_module(f"protoclip_jax.benchmark.{name}")
    assert callable(module.run)
    monkeypatch.setattr(module, "run", run)
    assert main([name, "--json"]) == 3
    assert json.loads(capsys.readouterr().out) == {"of": name}
    assert main([name]) == 3
    assert capsys.readouterr().out.splitlines()[0] == name
    assert [options.benchmark for options in ran] == [name, name]


@pytest.mark.usefixtures("no_faiss")
def test_kmeans_without_faiss_says_what_to_install(capsys):
    assert main(TINY_KMEANS) == 0
    printed = capsys.readouterr().out
    assert "400 x 8, K 16" in printed
    assert "share of a matmul" in printed
    assert "pip install faiss-cpu" in printed
    assert "times faster" not in printed


@pytest.mark.usefixtures("no_faiss")
def test_kmeans_numbers_without_faiss_are_null(capsys):
    assert main((*TINY_KMEANS, "--json", "--precision=bfloat16")) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first.keys() >= KMEANS_FIELDS
    assert (first["n"], first["d"], first["k"]) == (400, 8, 16)
    assert first["precision"] == "bfloat16"
    assert first["speedup_cpu_seconds"] is None
    assert first["objective_ratio"] is None
    # As many clusters as points; ours moves points around their mean and back.
    assert second["objective"] == pytest.approx(0, abs=1e-10)
    assert first["machine"]["cores"] >= 1
    # Three updates and the last assignment, every score written and read.
    moved = 2 * 4 * 400 * 16 * (first["iterations"] + 1) / first["wall_seconds"] / 1e9
    assert first["bandwidth_share"] == pytest.approx(moved / first["copy_gb_per_second"])


def test_kmeans_against_faiss(capsys):
    assert main((*TINY_KMEANS, "--json", "--precision=float32")) == 0
    first, second = json.loads(capsys.readouterr().out)
    for case in (first, second):  # how many times as long faiss takes
        for seconds in ("cpu_seconds", "wall_seconds"):
            ratio = case[f"faiss_{seconds}"] / case[seconds]
            assert case[f"speedup_{seconds}"] == pytest.approx(ratio, rel=1e-12)
        assert case["faiss_iterations"] == 3
    ratio = first["objective"] / first["faiss_objective"]
    assert first["objective_ratio"] == pytest.approx(ratio, rel=1e-12)
    # Three equal Lloyd steps in float32 from the same start, judged by the same function.
    assert first["objective_ratio"] == pytest.approx(1, abs=1e-3)
    assert second["objective_ratio"] is None
    assert main(TINY_KMEANS) == 0
    assert "objective / faiss's" in capsys.readouterr().out


@pytest.mark.parametrize(("n", "k"), [(60, 7), (5, 5), (33, 1)])
def test_objective_equals_brute_force(n, k, monkeypatch):
    rng = np.random.default_rng(n)
    points = rng.normal(size=(n, 3)).astype(np.float32)
    centroids = rng.normal(size=(k, 3)).astype(np.float32)
    pairs = points[:, None].astype(np.float64) - centroids.astype(np.float64)
    expected = np.sum(np.min(np.sum(pairs**2, axis=2), axis=1))
    monkeypatch.setattr(kmeans, "_TILE_VALUES", 8 * k)  # several tiles, the last one short
    assert kmeans.objective(points, centroids) == pytest.approx(expected, rel=1e-13)


def test_problem_is_the_same_every_time():
    points, start = kmeans.problem((50, 6, 8))
    again, _ = kmeans.problem((50, 6, 8))
    np.testing.assert_array_equal(points, again)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, rtol=1e-6)
    assert len(np.unique(start, axis=0)) == 8
    assert all((points == row).all(axis=1).any() for row in start)


def test_contenders_take_turns_and_medians_count():
    order = []

    def contender(name, walls):
        times = iter(walls)

        def run():
            order.append(name)
            return timing.Seconds(next(times), 1.0)

        return run

    found = timing.alternating({"a": contender("a", [9, 1, 2]), "b": contender("b", [5, 5, 6])}, 3)
    assert order == ["a", "b"] * 3
    assert found == {"a": (2, 1), "b": (5, 1)}


def test_a_copy_reads_and_writes_what_it_says():
    copied = timing.copy(4096, 3)
    copied()
    np.testing.assert_array_equal(copied.result, np.ones(1024, np.float32))


def test_numbers_have_three_digits():
    shown = [report.number(x) for x in (None, 12, 1234.6, 12.34, 2.0, 0.01234, 99.99, 1e-7)]
    assert shown == ["-", "12", "1,235", "12.3", "2.00", "0.0123", "100", "1e-07"]


def test_table_lines_up():
    rows = [("a label", ["1", "2"]), report.RULE, ("b", ["30,000", "-"])]
    text = report.Report(["what"], ["x", "column"], rows, ["note"], {}).text()
    assert text.splitlines() == [
        "what",
        "",
        "              x  column",
        "-----------------------",
        "a label       1       2",
        "-----------------------",
        "b        30,000       -",
        "",
        "note",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "BENCHMARK"),
        (("kmeens",), "kmeens"),
        (("kmeans", "--sizes=10:4"), "10:4: write points:width:clusters"),
        (("kmeans", "--sizes=10:4:20"), "10 points cannot form 20 clusters"),
        (("kmeans", "--repeats=0"), "a whole number above 0"),
        (("kmeans", "--precision=int8"), "int8"),
        (("kmeans", "--config.seed=1"), "kmeans has no option --config.seed=1"),
        (("step", "--nothing"), "step has no option --nothing"),
        (("step", "--config=nowhere.py"), "no such file"),
        (("step", "--config.epsiode.size=3"), "config.episode.size"),
        (("step", "--phase=lock"), "the recipe has warmup, prototype, locked"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments, message, capsys):
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1, error
