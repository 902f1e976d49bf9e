"""The large presets over many devices: compiled, never allocated.

All presets' shares of eight devices are checked in tests/models/test_sharding.py, in seconds.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("ViT-L-14", 8),
        pytest.param("ViT-L-14", 64, marks=pytest.mark.long),
        *(
            pytest.param(name, devices, marks=pytest.mark.long)
            for name in ("ViT-H-14", "ViT-g-14")
            for devices in (8, 64)
        ),
    ],
)
def test_large_model_is_cut_over_the_devices(name, devices):
    command = [sys.executable, str(ROOT / "tests" / "large_model.py"), name, str(devices)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=3000, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    print(found)
    for part in ("params", "opt_state"):
        share = found[f"{part}_bytes"] / devices
        # What stays whole (norms, biases, positions, the patch convolution) is small.
        assert found[f"{part}_bytes_of_a_device"] < 1.05 * share + 20e6
    # What the compiled step takes, batch included, is what the table promises.
    state = found["params_bytes_of_a_device"] + found["opt_state_bytes_of_a_device"]
    assert found["arguments_of_a_device"] == pytest.approx(state, rel=0.02)
    # Devices exchange weights (once forward, once backward) and gradients. Activations stay where
    # they are, but for the gradient of the token embedding, which is cut by features.
    exchanges = found["exchanges"]
    assert exchanges["all-to-all"] <= 1
    assert exchanges["collective-permute"] == 0
    assert exchanges["all-gather"] <= 2 * found["cut_arrays"] + 8
