"""The trace of some steps: begun and ended where it was asked for, or refused."""

import jax
import pytest

from protoclip_jax.config import ConfigError
from protoclip_jax.training.profile import Profile


@pytest.mark.parametrize("steps", ["3", "3:", ":3", "3:3", "5:3", "a:b", "-1:3", "0.5:3", ""])
def test_what_is_no_range_is_refused(steps, tmp_path):
    with pytest.raises(ConfigError, match=f"--profile={steps}: write FIRST:LAST"):
        Profile(steps, tmp_path, 100)


def test_steps_beyond_the_run_are_refused(tmp_path):
    Profile("99:110", tmp_path, 100)
    with pytest.raises(ConfigError, match="--profile=100:110: the run has 100 steps"):
        Profile("100:110", tmp_path, 100)


def test_trace_covers_the_steps_that_were_asked_for(tmp_path, monkeypatch):
    seen, step = [], 0
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: seen.append((step, folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append((step, None)))
    for profile in (Profile("2:4", tmp_path, 6), Profile(None, tmp_path, 6)):
        for step in range(6):
            profile.before(step)
        profile.close()
    assert seen == [(2, str(tmp_path / "profile")), (4, None)]
