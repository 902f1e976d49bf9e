"""The bar of a run that goes on where an earlier process stopped."""

import sys

import pytest

from protoclip_jax.training.progress import Progress


@pytest.mark.parametrize("done", [0, 800])
def test_time_left_is_from_the_steps_of_this_process(monkeypatch, done):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(1000)
    bar, now = progress._bar, [100.0]
    monkeypatch.setattr(bar, "_time", lambda: now[0])
    progress.start(done)
    assert bar.n == done
    now[0] += 50  # ten steps in 50 seconds: 5 s each
    progress.step(10)
    shown = bar.format_dict
    assert shown["n"] == done + 10
    assert shown["initial"] == done
    left = (1000 - done - 10) * 5
    minutes, seconds = divmod(left, 60)
    hours, minutes = divmod(minutes, 60)
    assert f"<{f'{hours}:' if hours else ''}{minutes:02}:{seconds:02}" in str(bar)
    progress.close()
