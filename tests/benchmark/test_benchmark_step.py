"""`step` at a tiny size, what it feeds the step with, and its peer's process."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny_run import SMALL, small_config, tiny_models  # noqa: F401 (a fixture)

from protoclip_jax.benchmark import host, step, synthetic, torch_peer
from protoclip_jax.benchmark.__main__ import main
from protoclip_jax.episodes.kmeans import Clusters
from protoclip_jax.episodes.prototypes import build_prototypes
from protoclip_jax.models.presets import preset
from protoclip_jax.training import state
from protoclip_jax.training.phases import phase_of

pytestmark = pytest.mark.usefixtures("tiny_models")

# Stands for torch_step.py: the same answers, at once.
FAKE_PEER = """
import json, sys
print("a library says hello")
print(json.dumps({"versions": "a fake"}), flush=True)
for line in sys.stdin:
    wanted = json.loads(line)
    print(json.dumps({"wall": wanted["steps"] * 1.0, "cpu": 2.0 + wanted["locked"]}), flush=True)
"""


@pytest.fixture
def fake_host(monkeypatch):
    """A state of few arrays, for RN50's compile for seconds."""
    monkeypatch.setattr(host, "MODEL", "test-vit")


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Writes what runs in the place of torch_step.py."""

    def write(text: str) -> None:
        path = tmp_path / "peer.py"
        path.write_text(text)
        monkeypatch.setattr(torch_peer, "SCRIPT", path)

    return write


def arguments(*more: str) -> list[str]:
    overrides = [f"--config.{name}={value}" for name, value in SMALL.items()]
    return ["step", *overrides, "--repeats=1", "--steps=1", *more]


def peer_config():
    return small_config("emoji_text/train", num_devices=8)


@pytest.mark.usefixtures("fake_host")
def test_step_of_phases_beside_a_peer(script, capsys, monkeypatch):
    script(FAKE_PEER)
    monkeypatch.setattr(step, "peak_flops", lambda device: 3e12)
    assert (
        main(arguments("--json", "--phase=prototype,locked", f"--peer_python={sys.executable}"))
        == 0
    )
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["host_ms"] > 0.01
    arrays = jax.tree.leaves(host.train_state(peer_config(), "test-vit"))
    assert numbers["host_arrays"] == len(arrays)
    assert numbers["peer"] == "a fake"
    assert [case["phase"] for case in numbers["phases"]] == ["prototype", "locked"]
    for case in numbers["phases"]:
        assert case["pairs_per_second"] == pytest.approx(8e3 / case["step_ms"])
        assert case["gflops"] == pytest.approx(1e3 * case["gflop"] / case["step_ms"])
        assert case["flop_use"] == pytest.approx(case["gflops"] / case["matmul_gflops"])
        assert case["peak_gflops"] == 8 * 3e3  # of eight devices
        assert case["peak_use"] == pytest.approx(case["gflops"] / case["peak_gflops"])
        assert np.isfinite(case["loss"])
        assert case["speedup"] == pytest.approx(case["peer_step_ms"] / case["step_ms"])
        assert case["speedup_cpu"] == pytest.approx(case["peer_cpu_ms"] / case["cpu_ms"])
        assert case["peer_step_ms"] == 1000
        assert case["peer_cpu_ms"] == (3000 if case["phase"] == "locked" else 2000)
    flops = {case["phase"]: case["gflop"] for case in numbers["phases"]}
    assert flops["locked"] < flops["prototype"]  # no backward through the image tower


def test_phases_are_the_recipes_by_their_first_episode():
    settings = {"episode__count": 9, "episode__warmup": 3, "episode__locked": 2}
    config = small_config("emoji_text/train", num_devices=8, **settings)
    found = step.chosen_phases(config, None)
    names = {episode: phase.name for episode, phase in found.items()}
    assert names == {0: "warmup", 3: "prototype", 7: "locked"}
    assert list(step.chosen_phases(config, "locked")) == [7]


@pytest.mark.usefixtures("fake_host")
def test_peer_that_fails_on_the_way_leaves_our_table(script, capsys):
    script("print('{\"versions\": \"x\"}', flush=True)\ninput()\nraise SystemExit('out of memory')")
    assert main(arguments("--phase=warmup", f"--peer_python={sys.executable}")) == 0
    printed = capsys.readouterr().out
    assert "test-vit in float32, batch 8" in printed
    assert "FLOP use" in printed
    assert "from phase warmup on: it ended: out of memory" in printed


def test_peer_is_ended(script):
    script(FAKE_PEER)
    with torch_peer.start(sys.executable, peer_config(), preset("test-vit"), 1) as peer:
        assert peer.run(3, False) == (3, 2)
        number = peer._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_peer_that_hangs_is_given_up_and_killed(script, monkeypatch):
    script("import time\ntime.sleep(60)")
    monkeypatch.setattr(torch_peer, "START_SECONDS", 0.2)
    monkeypatch.setattr(torch_peer, "END_SECONDS", 0.2)
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(torch_peer.subprocess, "Popen", Recorded)
    with pytest.raises(torch_peer.PeerError, match="no answer within"):
        torch_peer.start(sys.executable, peer_config(), preset("test-vit"), 1)
    assert [process.returncode for process in started] == [-signal.SIGKILL]


@pytest.mark.parametrize(
    ("python", "message"), [("none", "none"), ("/nowhere/python", "/nowhere/python: No such file")]
)
def test_peer_that_is_not_there_is_told(python, message):
    with pytest.raises(torch_peer.PeerError, match=message):
        torch_peer.start(python, peer_config(), preset("test-vit"), 1)


@pytest.mark.parametrize("online", ["none", "0.5"])
def test_prototypes_are_those_of_an_episode(online):
    config = small_config(
        "emoji_text/train",
        num_devices=8,
        episode__online=online,
        episode__external_prototypes=5,
        objective__external=1,
        data__teacher="emoji_text",
    )
    n, k, d = config.episode.size, config.episode.prototypes, config.model.projection_width

    def clusters(k, d):
        return Clusters(
            np.zeros((k, d), np.float32), np.zeros(n, np.int32), np.zeros(k, np.int32), 0.0, 0, 0
        )

    features = np.zeros((n, d), np.float32)
    real = build_prototypes(
        features, features, clusters(k, d), clusters(k, d), np.zeros(n, np.int32), 5
    )
    mesh = state.make_mesh()
    phase = phase_of(config, config.episode.warmup)
    made = synthetic.prototypes(config, phase, mesh)
    batch = synthetic.batch(config, state.model_of(config), phase, mesh)
    if config.episode.online is not None:
        assert made["external"].pop("centroids").shape == (5, batch["teacher"].shape[1])
    assert jax.tree.structure(made) == jax.tree.structure(real)
    for ours, theirs in zip(jax.tree.leaves(made), jax.tree.leaves(real), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert {
        name: (int(x.min()) >= 0, x.shape) for name, x in batch["labels"].items()
    } == dict.fromkeys(("image", "text", "external"), (True, (config.optimizer.batch,)))


def test_host_state_has_the_arrays_of_rn50():
    config = peer_config()
    like = host.train_state(config)
    params = len(jax.tree.leaves(like["params"]))
    assert params > 300
    assert len(jax.tree.leaves(like)) > 3 * params  # with both moments and batch statistics


def test_peer_settings_are_open_clips():
    model = preset("RN50")
    found = torch_peer.settings(peer_config(), model, 2)
    assert found["vision_cfg"] == {
        "layers": (3, 4, 6, 3),
        "head_width": 64,
        "width": 64,
        "image_size": 224,
    }
    assert torch_peer.settings(peer_config(), preset("ViT-B-32"), 2)["vision_cfg"] == {
        "layers": 12,
        "head_width": 64,
        "patch_size": 32,
        "width": 768,
        "image_size": 224,
    }
    json.dumps(found)
