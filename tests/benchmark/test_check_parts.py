"""The parts of `check`, one by one: goals, numbers against the CPU's, tests, devices."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest

from protoclip_jax.benchmark import (
    check,
    check_kmeans,
    check_phases,
    check_plan,
    check_runner,
    check_table,
    check_tests,
    goals,
    machine,
)


def test_goals_are_those_of_an_h100():
    assert {goal.part: (goal.value, goal.at_most) for goal in goals.GOALS} == {
        "kmeans": (250, True),
        "step-RN50": (2500, False),
        "step-ViT-B-32": (8900, False),
        "step-ViT-B-16": (3200, False),
    }
    assert {goal.part for goal in goals.GOALS} <= {part.name for part in check_plan.PARTS}


@pytest.mark.parametrize(
    ("part", "value", "kind", "small", "missed"),
    [
        ("kmeans", 251.0, "NVIDIA H100 80GB HBM3", False, True),
        ("kmeans", 249.0, "NVIDIA H100 80GB HBM3", False, False),
        ("step-RN50", 2499.0, "NVIDIA H200", False, True),
        ("step-RN50", 2501.0, "NVIDIA H200", False, False),
        ("step-RN50", 1.0, "NVIDIA A100-SXM4-40GB", False, False),
        ("step-RN50", 1.0, "NVIDIA H100 PCIe", True, False),
        ("episode", 1.0, "NVIDIA H100 PCIe", False, False),
    ],
)
def test_who_misses_a_goal(part, value, kind, small, missed):
    names = {"ms_for_20": value, "pairs_per_second_per_device": value}
    assert goals.missed(part, names, kind, small) is missed


def outcome(numbers: dict, status="done", reason=None, seconds=1.0) -> check_runner.Outcome:
    return check_runner.Outcome(status, seconds, numbers, reason)


def test_missed_goals_are_named_and_are_no_failure():
    found = {
        "devices": outcome({"device": "NVIDIA H100 80GB HBM3"}),
        "kmeans": outcome({"ms_for_20": 500.0}),
        "step-RN50": outcome({"pairs_per_second_per_device": 3000.0}),
        "step-ViT-B-32": outcome({"search": {}}, "timed out", "ended after 75 s"),
    }
    numbers = check.assembled(found, False, 6.0, 100.0)
    reached = {one["part"]: (one["reached"], one["missed"]) for one in numbers["goals"]}
    assert reached == {
        "kmeans": (0.5, True),
        "step-RN50": (1.2, False),
        "step-ViT-B-32": (None, False),
        "step-ViT-B-16": (None, False),
    }
    assert numbers["failed"] == ["step-ViT-B-32"]
    text = check_table._goals(numbers["goals"], False)
    assert "500    250  50%, MISSED" in text
    assert "3,000  2,500         120%" in text


@pytest.mark.parametrize(("goal", "taken"), [(1e-9, True), (1e9, False)])
def test_a_missed_goal_is_profiled(monkeypatch, goal, taken):
    monkeypatch.setattr(check_kmeans, "SMALL", (60, 8, 7))
    monkeypatch.setattr(goals, "held", lambda kind, small: True)
    monkeypatch.setattr(goals, "GOALS", (goals.Goal("kmeans", "ms_for_20", "", goal, True),))
    saved = []
    found = check_kmeans.run(check_plan.Settings("", True, False, 60.0), saved.append)
    assert ("profile" in found) is taken
    assert saved[0]["ms_for_20"] == pytest.approx(
        1e3 * found["wall_seconds"] * 20 / found["iterations"]
    )
    if taken:
        assert found["profile"]["top"]


# Numbers against the CPU's.


STEPS = [
    {"phase": "warmup", "loss/total": 5.0, "loss/clip": 5.0, "grad_norm": 10.0},
    {"phase": "warmup", "loss/total": 4.0, "loss/clip": 4.0, "grad_norm": 8.0},
    {"phase": "prototype", "loss/total": 12.0, "loss/clip": 4.0, "grad_norm": 2.0},
]
BOUNDS = {
    "first loss": 1e-3,
    "first gradient norm": 2e-3,
    "later losses": 1e-2,
    "losses of clusters": 3e-2,
}


def changed(number: int, term: str, factor: float) -> list[dict]:
    steps = [dict(one) for one in STEPS]
    steps[number][term] *= factor
    return steps


@pytest.mark.parametrize(
    ("number", "term", "factor", "wrong"),
    [
        (0, "loss/clip", 1 + 0.9e-3, None),
        (0, "loss/clip", 1 + 1.1e-3, "first loss"),
        (0, "loss/total", 1 - 1.1e-3, "first loss"),
        (0, "grad_norm", 1 + 1.9e-3, None),
        (0, "grad_norm", 1 - 2.1e-3, "first gradient norm"),
        (1, "grad_norm", 3.0, None),
        (1, "loss/total", 1 + 0.9e-2, None),
        (2, "loss/clip", 1 - 1.1e-2, "later losses"),
        (1, "loss/total", 1 + 1.1e-2, "later losses"),
        (2, "loss/total", 1 + 2.9e-2, None),
        (2, "loss/total", 1 - 3.1e-2, "losses of clusters"),
        (2, "loss/total", np.nan, "losses of clusters"),
    ],
)
def test_deviations(number, term, factor, wrong):
    found = check_phases.compared(changed(number, term, factor), STEPS, BOUNDS)
    outside = [name for name, one in found["deviations"].items() if not one["within"]]
    assert outside == ([wrong] if wrong else [])
    if wrong:
        one = found["deviations"][wrong]
        assert (one["step"], one["term"]) == (number + 1, term)
        assert one["deviation"] == pytest.approx(abs(factor - 1)) or np.isnan(factor)
    far = 0.0 if term == "grad_norm" else abs(factor - 1)
    assert found["phases"][STEPS[number]["phase"]] == pytest.approx(far) or np.isnan(factor)


def test_other_steps_and_terms_are_not_compared():
    for steps in (STEPS[:2], [*STEPS, STEPS[0]], [*STEPS[:2], STEPS[2] | {"loss/external": 1.0}]):
        with pytest.raises(check_plan.PartFailure, match=f"{len(steps)} steps"):
            check_phases.compared(steps, STEPS, BOUNDS)


def test_a_number_that_is_missing_from_the_log_is_infinitely_far():
    assert check_phases.deviation(None, 3.0) == np.inf
    assert check_phases.deviation(2.0, 4.0) == check_phases.deviation(6.0, 4.0) == 0.5


def test_recorded_numbers_are_three_phases_of_a_cpu():
    recorded = json.loads(check_phases.RECORDED.read_text())
    assert recorded["machine"]["platform"] == "cpu"
    assert recorded["settings"] == check_phases.SETTINGS
    phases = [one["phase"] for one in recorded["steps"]]
    assert phases == ["warmup"] * 5 + ["prototype"] * 5 + ["locked"] * 5
    for one in recorded["steps"]:
        terms = {"loss/total", "loss/clip", "grad_norm", "phase"}
        if one["phase"] == "prototype":
            terms |= {"loss/prototype", "loss/external"}
            parts = one["loss/clip"] + one["loss/prototype"] + one["loss/external"]
            assert one["loss/total"] == pytest.approx(parts, rel=1e-5)
        assert set(one) == terms
    for bounds in check_phases.BOUNDS.values():
        assert set(bounds) == set(BOUNDS)
    for name, bound in check_phases.BOUNDS["float32"].items():
        assert bound < check_phases.BOUNDS["bfloat16"][name]


def test_wrong_numbers_fail_the_part_and_are_kept(monkeypatch):
    recorded = json.loads(check_phases.RECORDED.read_text())["steps"]
    steps = [dict(one) for one in recorded]
    steps[7]["loss/prototype"] *= 1.03
    monkeypatch.setattr(check_phases, "trained", lambda dtype: steps)
    saved = []
    settings = check_plan.Settings("bfloat16", True, False, 60.0)
    message = r"losses of clusters: 3\.0e-02 of loss/prototype at step 8, more than 2e-02"
    with pytest.raises(check_plan.PartFailure, match=message):
        check_phases.run(settings, saved.append)
    assert saved[-1]["phases"]["prototype"] == pytest.approx(0.03)
    steps[7]["loss/prototype"] /= 1.03
    assert check_phases.run(settings, saved.append)["phases"]["prototype"] < 1e-9


# The tests' output.


PYTEST = """\
collecting ... collected 4 items
tests/a/test_x.py::test_one PASSED                             [ 20%]
tests/a/test_x.py::test_two[a b] FAILED                        [ 40%]
tests/a/test_x.py::test_three SKIPPED (no reason)              [ 60%]
tests/a/test_y.py::test_four ERROR                             [ 80%]
tests/a/test_y.py::test_five PASSED                            [100%]
___________ test_two[a b] ___________
E   assert 1 == 2
FAILED tests/a/test_x.py::test_two[a b] - assert 1 == 2
ERROR tests/a/test_y.py::test_four - RuntimeError: no device
"""


def test_outcomes_are_counted_as_they_come(capsys):
    saved = []
    lines = PYTEST.splitlines(keepends=True)
    found = check_tests.follow(lines, lambda numbers: saved.append(json.dumps(numbers)))
    assert (found["passed"], found["skipped"]) == (2, 1)
    assert found["failed"] == {
        "tests/a/test_x.py::test_two[a b]": "assert 1 == 2",
        "tests/a/test_y.py::test_four": "RuntimeError: no device",
    }
    assert json.loads(saved[1])["passed"] == 1
    assert capsys.readouterr().out == PYTEST  # for the log


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("def test_it(): assert 3 == 4", r"1 of 1 fail: .*test_it.*: assert 3 == 4"),
        ("def test_it(): pass", None),
        ("import nowhere", "exit code 2"),
        ("", "exit code 5"),
    ],
)
def test_failing_tests_fail_the_part(tmp_path, monkeypatch, test, message):
    (tmp_path / "test_planted.py").write_text(test)
    command = ("-m", "pytest", "-vv", "--color=no", "--tb=short", "-rfE", "-p", "no:cacheprovider")
    monkeypatch.setattr(check_tests, "COMMAND", command)
    monkeypatch.setattr(check_tests, "ROOT", tmp_path)
    monkeypatch.setattr(check_tests, "SMALL", ("test_planted.py",))
    settings = check_plan.Settings("", True, False, 60.0)
    if message is None:
        assert check_tests.run(settings, lambda numbers: None)["passed"] == 1
    else:
        with pytest.raises(check_plan.PartFailure, match=message):
            check_tests.run(settings, lambda numbers: None)


# Devices.


def test_driver_is_what_nvidia_smi_tells(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text('#!/bin/sh\necho "NVIDIA H100, 580.1, 81559 MiB"\necho "$1" >&2\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert machine.driver() == ["NVIDIA H100, 580.1, 81559 MiB"]
    fake.write_text("#!/bin/sh\nexit 9\n")  # as in a container without the driver's library
    assert machine.driver() is None
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert machine.driver() is None


@pytest.mark.parametrize(
    ("stats", "shown"),
    [(None, None), ({}, None), ({"bytes_limit": 73_500_000_000, "peak_bytes_in_use": 5}, 73.5)],
)
def test_memory_of_a_device(monkeypatch, stats, shown):
    devices = [SimpleNamespace(memory_stats=lambda: stats, device_kind=f"kind {i}") for i in "aab"]
    monkeypatch.setattr(machine.jax, "local_devices", lambda: devices)
    found = machine.devices()
    assert found["device_gb"] == shown
    assert found["kinds"] == {"kind a": 2, "kind b": 1}
