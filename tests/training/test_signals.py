"""Signals at any moment of a process's life: documented codes, and nothing lost."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import random_signals

from protoclip_jax import signals

ROOT = Path(__file__).parents[2]
MOMENTS = 8


@pytest.fixture
def compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))


def await_python(process: int) -> None:
    """Waits until a process hears signals: before its first line, its codes are the system's."""
    heard = 1 << (signal.SIGTERM - 1)
    for _ in range(3000):
        status = Path(f"/proc/{process}/status").read_text().splitlines()
        caught = next(line.split()[1] for line in status if line.startswith("SigCgt"))
        if int(caught, 16) & heard:
            return
        time.sleep(0.01)
    raise AssertionError("the process never heard signals")


@pytest.mark.slow
def test_signals_from_the_first_second_to_the_last(tmp_path, compiled_once):
    """To the whole group, as Ctrl-C in a terminal: workers start, programs compile, files close."""
    pairs, chance = random_signals.written(tmp_path / "data"), random.Random(0)
    whole = random_signals.Run(tmp_path / "whole", pairs, 6, count=1)
    for seconds in (600, 120):  # the second time nothing is compiled, as in the runs below
        whole.end()
        begin = time.monotonic()
        if seconds == 120:
            whole = random_signals.Run(tmp_path / "again", pairs, 6, count=1)
        whole.start()
        assert whole.processes[0].wait(seconds) == 0, whole.tail()
    lasts = time.monotonic() - begin
    moments = [lasts * (number + chance.random()) / MOMENTS for number in range(MOMENTS)]
    chance.shuffle(moments)
    codes, run = [0], None
    for number, moment in enumerate(moments):
        if codes[-1] == 0:
            run = random_signals.Run(tmp_path / f"run{number}", pairs, 6, count=1)
        run.start()
        process = run.processes[0]
        await_python(process.pid)
        while process.poll() is None and time.monotonic() - run.began < moment:
            time.sleep(0.005)
        started = psutil.Process(process.pid).children() if process.poll() is None else []
        if process.poll() is None:
            os.killpg(process.pid, signals.NUMBERS[number % 2])
        codes.append(process.wait(90))
        assert codes[-1] in (0, signals.LEFT, signals.INTERRUPTED), run.tail()
        assert "Traceback" not in run.tail(), run.tail()
        assert not psutil.wait_procs(started, timeout=10)[1], "a worker stays behind"
        if codes[-1] == 0:
            assert not random_signals.differing(whole.state(), run.state())
    assert signals.LEFT in codes
    if codes[-1]:
        run.start()
        assert run.processes[0].wait(300) == 0, run.tail()
        assert not random_signals.differing(whole.state(), run.state())


@pytest.mark.slow
def test_a_signal_while_a_program_compiles(tmp_path, monkeypatch):
    """What it breaks off there does not crash when Python is taken down."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    pairs = random_signals.written(tmp_path / "data")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")  # it takes its time
    for seconds in (2.0, 4.0):
        run = random_signals.Run(tmp_path / f"run{seconds}", pairs, 6, count=1)
        run.start()
        (process,), end = run.processes, time.monotonic() + 200
        while "compiling the warmup step" not in run.tail() and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == signals.LEFT, run.tail()
        assert "stopped before the first step" in run.tail()


@pytest.mark.slow
def test_two_processes_under_random_signals(tmp_path):
    """The short form of `python tests/random_signals.py`."""
    command = [sys.executable, str(ROOT / "tests" / "random_signals.py")]
    options = ["--minutes=1.5", "--seed=1", "--episodes=8", f"--folder={tmp_path}"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout + result.stderr


PROGRAM = """
import os, signal, sys, threading, time
from protoclip_jax import signals
signals.PATIENCE = signals.SHORT = 0.3
signals.install()
kind = sys.argv[1]
me = lambda number: os.kill(os.getpid(), number)
def stuck(number=None):  # as in the compiler: no handler of Python runs
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.NUMBERS)
    if number:
        threading.Timer(0.1, me, [number]).start()
    time.sleep(20)
if kind == "early":
    me(signal.SIGTERM)
elif kind == "raised":
    try:
        with signals.raised():
            me(signal.SIGTERM)
    except signals.Stopped as error:
        sys.exit(error.code)
elif kind == "swallowed":
    with signals.raised():
        try:
            me(signal.SIGINT)
        except KeyboardInterrupt:
            pass
        time.sleep(20)
elif kind == "stuck":
    with signals.raised():
        stuck(signal.SIGTERM)
elif kind == "unsaved":
    with signals.heard_by(lambda number: None, lambda: False):
        threading.Timer(0.1, me, [signal.SIGTERM]).start()
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            time.sleep(0.1)
    sys.exit(3)
elif kind == "over":
    with signals.raised():
        signals.over(2)
    me(signal.SIGINT)
    time.sleep(20)
elif kind == "late":
    class Late:
        def __del__(self):  # when the interpreter goes
            me(signal.SIGINT)
    import builtins
    builtins.late = Late()
    sys.exit(4)
elif kind == "broken off":
    class BrokenOff:
        def __del__(self):  # as what the compiler has half done, when the interpreter goes
            os.abort()
    import builtins
    builtins.broken_off = BrokenOff()
    try:
        with signals.raised():
            me(signal.SIGTERM)
    except signals.Stopped as error:
        print("whole", end="")
        signals.over(error.code)
        sys.exit(error.code)
elif kind == "program":
    sys.exit(signals.program(lambda: (me(signal.SIGINT), time.sleep(20))))
elif kind == "program that ends":
    sys.exit(signals.program(lambda: 7))
elif kind == "child":
    with signals.blocked():
        import subprocess
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(1); print('whole')"])
    child.send_signal(signal.SIGINT)
    child.send_signal(signal.SIGTERM)
    sys.exit(child.wait())
"""


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("early", 75),
        ("raised", 75),
        ("swallowed", 130),
        ("stuck", 75),
        ("unsaved", 3),
        ("over", 2),
        ("late", 4),
        ("broken off", 75),
        ("program", 130),
        ("program that ends", 7),
        ("child", 0),
    ],
)
def test_codes_of_a_program(kind, code):
    """Each takes a tenth of a second or two: only the standard library is imported."""
    command = [sys.executable, "-c", PROGRAM, kind]
    result = subprocess.run(command, cwd=ROOT, timeout=15, capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert kind not in ("broken off", "child") or "whole" in result.stdout


def test_nothing_is_installed_in_a_library():
    before = [signal.getsignal(number) for number in signals.NUMBERS]
    heard = []
    with signals.heard_by(heard.append):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert heard == [signal.SIGTERM, signal.SIGINT]
    assert [signal.getsignal(number) for number in signals.NUMBERS] == before
