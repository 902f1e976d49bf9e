"""What each benchmark makes of given times: every share and ratio the right way round."""

import json

import jax
import numpy as np
import pytest
from tiny_run import small_config, tiny_models  # noqa: F401 (a fixture)

from protoclip_jax.benchmark import check_episode, episode, faiss_peer, kmeans, step, timing
from protoclip_jax.benchmark import input as input_benchmark
from protoclip_jax.benchmark.__main__ import main
from protoclip_jax.benchmark.check_plan import Settings
from protoclip_jax.benchmark.timing import Seconds
from protoclip_jax.episodes import kmeans_assignment
from protoclip_jax.training.phases import phase_of

TIMES = {
    "ours": Seconds(wall=2.0, cpu=8.0),
    "matmul": Seconds(wall=0.5, cpu=1.0),
    "copy": Seconds(wall=0.25, cpu=0.3),
    "faiss": Seconds(wall=5.0, cpu=24.0),
}
TINY = {
    "model.name": "test-vit",
    "model.projection_hidden": 8,
    "model.projection_width": 8,
    "episode.size": 64,
    "episode.prototypes": 8,
    "optimizer.batch": 16,
    "optimizer.warmup_steps": 1,
}


def test_kmeans_beside_matmul_memory_and_faiss(monkeypatch):
    def alternating(contenders, repeats):
        assert repeats == 2
        for call in contenders.values():
            call()
        return {name: TIMES[name] for name in contenders}

    size = n, d, k = (400, 8, 16)
    points, start = kmeans.problem(size)
    worse = start[::-1] + np.float32(0.1)
    monkeypatch.setattr(timing, "alternating", alternating)
    monkeypatch.setattr(faiss_peer, "train", lambda *_: worse)
    monkeypatch.setattr(kmeans, "_COPY_CPU", 2**20)
    found = kmeans.measure(size, "float32", 3, 2, "the peer's module")
    assert (found["n"], found["d"], found["k"], found["repeats"]) == (n, d, k, 2)
    assert (found["wall_seconds"], found["cpu_seconds"]) == (2.0, 8.0)
    assert (found["faiss_wall_seconds"], found["faiss_cpu_seconds"]) == (5.0, 24.0)
    # How many times as fast as faiss; how large our objective is beside faiss's.
    assert found["speedup_wall_seconds"] == pytest.approx(2.5)
    assert found["speedup_cpu_seconds"] == pytest.approx(3.0)
    assert found["faiss_objective"] == pytest.approx(kmeans.objective(points, worse))
    ratio = found["objective"] / found["faiss_objective"]
    assert found["objective_ratio"] == pytest.approx(ratio)
    assert ratio < 1
    rows = kmeans_assignment.plan(
        k, platform=jax.default_backend(), low_precision=False, active=False
    ).rows
    tiles = -(-n // rows)
    comparisons = found["iterations"] + 1
    share = comparisons * n / (rows * tiles) * TIMES["matmul"].of(jax.default_backend())
    assert found["matmul_share"] == pytest.approx(share / TIMES["ours"].of(jax.default_backend()))
    assert found["matmul_gflops"] == pytest.approx(2e-9 * rows * tiles * d * k / 0.5)
    if jax.default_backend() == "cpu":
        assert found["copy_gb_per_second"] == pytest.approx(2 * 3 * 2**20 / 0.25 / 1e9)
    scores = 2 * 4 * n * k * comparisons / 2.0 / 1e9
    assert found["bandwidth_share"] == pytest.approx(scores / found["copy_gb_per_second"])


def test_step_beside_matmul_peak_and_peer(monkeypatch):
    times = {"ours": Seconds(4.0, 16.0), "matmul": Seconds(2.0, 3.0), "peer": Seconds(10.0, 8.0)}
    config = small_config("emoji_text/train", num_devices=8)
    runner = object.__new__(step.Runner)
    runner.config, runner.operations, runner.compile_seconds = config, 6e9, 1.5
    monkeypatch.setattr(step, "_times", lambda *_: (times, 0.5))
    monkeypatch.setattr(step, "peak_of_all", lambda: 12e9)
    monkeypatch.setattr(step.Runner, "dispatch_ms", lambda self: None)
    found = step.timed(runner, phase_of(config, 1), None, 1, 2)
    assert (found["step_ms"], found["cpu_ms"]) == (2000, 8000)
    assert found["pairs_per_second"] == config.optimizer.batch / 2
    assert (found["gflop"], found["gflops"], found["peak_gflops"]) == (6, 3, 12)
    assert found["peak_use"] == 0.25
    assert found["flop_use"] == pytest.approx(3 / found["matmul_gflops"])
    if jax.default_backend() == "cpu":  # two products of 2048 x 2048 in two seconds
        assert found["matmul_gflops"] == pytest.approx(2 * 2 * 2048**3 / 2 / 1e9)
    assert (found["peer_step_ms"], found["peer_cpu_ms"]) == (5000, 4000)
    assert (found["speedup"], found["speedup_cpu"]) == (2.5, 0.5)
    assert (found["compile_seconds"], found["loss"]) == (1.5, 0.5)


PARTS = {
    "clip": {"train": 2.0},
    "offline": {
        "sample": 0.1, "extract": 0.5, "cluster": 0.3, "back-translate": 0.1, "train": 2.5,
    },
    "online": {
        "sample": 0.05, "extract": 0.2, "cluster": 0.1, "back-translate": 0.05, "train": 2.2,
    },
}  # fmt: skip


@pytest.mark.usefixtures("tiny_models")
def test_an_episode_costs_so_many_times_clips(monkeypatch, capsys):
    calls = []

    class Run:
        def __init__(self, config, workdir):
            self.name = workdir.name
            assert (config.model.projection is None) == (self.name == "clip")
            assert (config.episode.online is not None) == (self.name == "online")

        def __call__(self):
            calls.append(self.name)
            return Seconds(1.0, 1.0)

        def medians(self):
            return PARTS[self.name]

        def close(self):
            calls.append("closed")

    monkeypatch.setattr(episode, "EpisodeRun", Run)
    overrides = [f"--config.{name}={value}" for name, value in TINY.items()]
    command = ["episode", "--repeats=2", "--online=0.5", *overrides]
    assert main([*command, "--json"]) == 0
    names = list(PARTS)
    # Each compiles first; then they take turns.
    assert calls == names * 3 + ["closed"] * 3
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["seconds"] == PARTS
    assert numbers["offline_cost_ratio"] == pytest.approx(1.75)
    assert numbers["online_cost_ratio"] == pytest.approx(1.3)
    assert main(command) == 0
    printed = capsys.readouterr().out
    (row,) = [line for line in printed.splitlines() if line.startswith("cost, times CLIP's")]
    assert row.split()[-3:] == ["1.00", "1.75", "1.30"]
    assert "extraction takes 25% of" in printed


EPISODES = [
    ({"extract": 4.0, "train": 8.0}, {"seconds/input_wait": 4.0}),
    ({"extract": 2.0, "train": 5.0}, {"seconds/input_wait": 1.0}),
]


def test_check_reports_the_second_episode(monkeypatch):
    asked, saved = [], []

    def episodes(config, folder):
        asked.append(config)
        yield from EPISODES

    monkeypatch.setattr(input_benchmark, "write_pictures", lambda folder, count: [])
    monkeypatch.setattr(input_benchmark, "episodes_on_images", episodes)
    found = check_episode.run(
        Settings("", small=True, profile=False, seconds=60.0),
        lambda numbers: saved.append(dict(numbers)),
    )
    assert found["pairs"] == asked[0].episode.size == 64
    assert found["workers"] == asked[0].data.workers > 0
    assert found["seconds"] == EPISODES[1][0]
    assert found["extracted_per_second"] == 32
    assert found["trained_per_second"] == 12.8
    assert found["input_wait_share"] == 0.2
    assert found["episodes"] == 2
    assert [numbers["episodes"] for numbers in saved] == [1, 2]


def test_training_waits_a_share_of_the_last_episode(monkeypatch, tmp_path):
    asked = []

    def episodes(config, folder):
        asked.append(config)
        yield from EPISODES

    monkeypatch.setattr(input_benchmark, "episodes_on_images", episodes)
    config = small_config("pairs.tsv", num_devices=8, optimizer__batch=16)
    found = input_benchmark.training_wait(config, tmp_path, 70)
    assert asked[0].episode.size == 64  # whole batches of the 70 images
    assert asked[0].model.projection is None
    assert found == {
        "batch": 16,
        "workers": asked[0].data.workers,
        "images_per_second": 12.8,
        "input_wait_share": 0.2,
    }
