"""A bar on a terminal; plain lines, few of them, in a log."""

import sys

import pytest

from protoclip_jax.data import bar
from protoclip_jax.data.bar import counted, spoken


def test_a_log_gets_few_plain_lines_with_the_time_left(capsys, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(bar.time, "monotonic", lambda: now)
    with counted(11_000, "pair", done=1000, what="index") as shown:
        for _ in range(10_000):
            now += 1
            shown.update()
    assert shown.n == 11_000
    text = capsys.readouterr().err
    assert "\r" not in text
    lines = text.splitlines()
    # After 10 s, then 20, 40 ... up to 600.
    assert lines[:2] == [
        "  index: 1,010 of 11,000 pairs (9%), 2.8 h left",
        "  index: 1,030 of 11,000 pairs (9%), 2.8 h left",
    ]
    assert len(lines) == 6 + (10_000 - 630) // 600
    assert lines[-1].startswith("  index: 10,630 of 11,000 pairs")


def test_a_short_or_hidden_work_says_nothing(capsys):
    for shown in (True, False):
        with counted(10, "pair", shown=shown) as work:
            work.update(10)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with counted(10, "pair", done=5) as work:
        work.update(5)
    assert "10/10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89.0, "89 s"), (100.0, "2 min"), (6e3, "1.7 h")]
)
def test_times(seconds, text):
    assert spoken(seconds) == text
