"""Our lines on the screen in one form; libraries' in a file."""

import logging
import threading
import warnings

import pytest
from absl import logging as absl_logging

from protoclip_jax.training import messages


@pytest.fixture
def taken():
    """As in a process of its own; undone at the end."""
    root, hook = logging.getLogger(), threading.excepthook
    handlers, verbosity = list(root.handlers), absl_logging.get_verbosity()
    yield messages.take_over()
    logging.captureWarnings(False)
    absl_logging.set_verbosity(verbosity)
    threading.excepthook = hook
    root.handlers[:] = handlers


def test_ours_to_the_screen_theirs_to_the_file(taken, tmp_path, capsys):
    logging.getLogger("jax._src.xla_bridge").warning("before the workdir is known")
    path = tmp_path / "libraries.log"
    assert taken.where() == ""
    taken.keep_in(path)
    logging.getLogger("protoclip_jax.data.unreadable").warning("skipped a pair: row %d", 3)
    absl_logging.error("orbax tells %d lines:\n%s", 2, "one\ntwo")
    absl_logging.info("nobody wants to know")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("a library's own", UserWarning, stacklevel=1)
    thread = threading.Thread(target=lambda: 1 / 0, name="writer")
    thread.start()
    thread.join()
    assert capsys.readouterr().err == "protoclip_jax: warning: skipped a pair: row 3\n"
    text = path.read_text()
    for part in (
        "before the workdir is known",
        "ERROR absl: orbax tells 2 lines:\none\ntwo",
        "a library's own",
        "writer ended:",
        "ZeroDivisionError",
    ):
        assert part in text
    assert "nobody" not in text
    assert taken.where() == f" (the libraries' own words are in {path})"


def test_a_library_that_repeats_itself_fills_no_disk(taken, tmp_path, monkeypatch):
    monkeypatch.setattr(messages, "_MOST", 3)
    taken.keep_in(tmp_path / "libraries.log")
    for _ in range(9):
        logging.getLogger("jax").warning("again")
    assert (tmp_path / "libraries.log").read_text().count("again") == 3


def test_a_disk_that_is_full_of_it_ends_nothing(taken, tmp_path):
    taken.keep_in(tmp_path)  # a folder: nothing can be written
    logging.getLogger("jax").warning("lost")
    assert taken.where() == ""
