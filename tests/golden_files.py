"""Where the golden numbers lie, and how they are compared.

`PROTOCLIP_GOLDEN` in the environment replaces the folder, so that another set of the same form
(other seeds) runs through the same tests.
"""

import json
import os
from pathlib import Path

import numpy as np

GOLDEN = Path(os.environ.get("PROTOCLIP_GOLDEN", Path(__file__).parent / "golden"))


def golden(name: str, prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays of `<name>.npz` whose key starts with `prefix`, by the rest of the key."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key[len(prefix) :]: file[key] for key in file.files if key.startswith(prefix)}


def golden_json(name: str):
    """The content of `<name>.json`."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def assert_close_to_max(actual, expected, tolerance: float, what: str = "") -> None:
    """`max|x - y| <= tolerance * max(1e-3, max|y|)`: the golden README's "rel-to-max"."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, golden {expected.shape}"
    worst = float(np.max(np.abs(actual - expected), initial=0.0))
    bound = tolerance * max(1e-3, float(np.max(np.abs(expected), initial=0.0)))
    assert worst <= bound, f"{what}: off by {worst:.3e}, allowed {bound:.3e}"


def assert_norms_close(actual, expected, tolerance: float, names: list[str], skip=()) -> None:
    """Compares vectors of norms entry by entry (`tolerance * max(1e-3, |y|)`), without `skip`."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert len(names) == len(actual) == len(expected)
    keep = np.array([not any(part in name for part in skip) for name in names])
    bad = keep & (np.abs(actual - expected) > tolerance * np.maximum(1e-3, np.abs(expected)))
    lines = [f"{names[i]}: {actual[i]:.6g}, golden {expected[i]:.6g}" for i in np.flatnonzero(bad)]
    assert not lines, "\n".join(lines)
