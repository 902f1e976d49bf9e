"""Launch scripts: checked, shown without a cloud, and run here where they can be."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]


def run(*arguments, **environment) -> subprocess.CompletedProcess:
    env = os.environ | environment
    return subprocess.run(
        [str(a) for a in arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
    checker = shutil.which("shellcheck") or Path(sys.executable).with_name("shellcheck")
    result = run(checker, script)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_header_says_what_it_needs(script):
    head = script.read_text().splitlines()[:20]
    assert any(line.startswith("# Needs:") for line in head)


def test_slurm_shows_its_command():
    result = run("bash", LAUNCH / "slurm.sbatch", "--config=a b.py", DRY_RUN="1")
    assert result.returncode == 0
    assert result.stdout.split()[:1] == ["srun"]
    assert r"-m protoclip_jax.main --config=a\ b.py" in result.stdout


def test_tpu_pod_shows_its_commands(tmp_path):
    """With a gcloud that knows no slice, in front of the real one."""
    fake = tmp_path / "gcloud"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    result = run(
        "bash",
        LAUNCH / "tpu_pod.sh",
        "--config=configs/cc3m.py",
        NAME="clip",
        ZONE="z",
        TYPE="v4-32",
        SPOT="1",
        DRY_RUN="1",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    assert result.returncode == 0, result.stderr
    create, copy, install, train = result.stdout.splitlines()[:4]
    assert "tpu-vm create clip --accelerator-type=v4-32" in create
    assert "--spot" in create
    assert "scp" in copy
    assert "worker.sh" in install
    assert "--worker=all" in train
    assert "--distributed" in train
    assert "configs/cc3m.py" in train


def test_tpu_pod_asks_for_what_it_lacks():
    result = run("bash", LAUNCH / "tpu_pod.sh", ZONE="z", TYPE="v4-8")
    assert result.returncode != 0
    assert "NAME" in result.stderr


def test_worker_trains_and_says_how_it_is_called(tmp_path):
    """The part of a pod job that runs on each worker, here."""
    result = run("bash", LAUNCH / "worker.sh")
    assert result.returncode == 2
    assert "worker.sh train" in result.stderr
    environment = str(Path(sys.executable).parents[1])
    result = run(
        "bash", LAUNCH / "worker.sh", "train", "--config=configs/none.py", VENV=environment
    )
    assert result.returncode == 2
    assert "there is no such file" in result.stderr


def test_gke_job_is_consistent():
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with orbax")
    service, job = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
    spec = job["spec"]
    container = spec["template"]["spec"]["containers"][0]
    arguments = container["args"]
    assert f"--num_processes={spec['completions']}" in arguments
    assert spec["parallelism"] == spec["completions"]
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert any(a.startswith("--coordinator=protoclip-0.protoclip:") for a in arguments)
    assert Path(container["command"][1]).name == "worker.sh"


@pytest.mark.slow
def test_local_runs_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"episode.count": 1, "episode.warmup": 1, "episode.locked": 0, "episode.size": 256}
    options |= {"optimizer.warmup_steps": 1, "objective.external": 0, "evaluation.suite": ""}
    options |= {"episode.prototypes": 8}
    result = run(
        "bash",
        LAUNCH / "local.sh",
        2,
        "--config=configs/quickstart.py",
        f"--workdir={tmp_path / 'run'}",
        *(f"--config.{name}={value}" for name, value in options.items()),
        PYTHON=sys.executable,
        PORT=str(port),
        XLA_FLAGS="--xla_force_host_platform_device_count=1",
        JAX_PLATFORMS="cpu",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stderr.count("episode 1/1") == 1
