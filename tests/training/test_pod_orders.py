"""Whole runs on meshes in the order of TPU slices: the numbers of one host, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pod_process import orders
from tiny_run import metrics, untimed

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_any_order_of_devices_trains_what_one_host_trains(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "pod_process.py"), str(tmp_path)]
    env = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"}
    env.pop("XLA_FLAGS", None)
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    names = list(orders())
    assert len(names) == 11
    one = np.load(tmp_path / "one.npz")
    lines = [untimed(line) for line in metrics(tmp_path / "one")]
    # The runs do not agree by having nothing to tell.
    assert len(np.unique(one["image"])) > 2
    assert len(lines) > 4
    for name in names[1:]:
        found = np.load(tmp_path / f"{name}.npz")
        assert found.files == one.files
        for key in one.files:
            np.testing.assert_array_equal(found[key], one[key], err_msg=f"{name}: {key}")
        assert [untimed(line) for line in metrics(tmp_path / name)] == lines
