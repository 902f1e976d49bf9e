"""Downloading with the real img2dataset from a local server that also fails in the usual ways.

Needs img2dataset: `pip install img2dataset` here, on the PATH, or in an environment whose
interpreter IMG2DATASET_PYTHON names. What does not need it is tested without.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from pair_files import caption, picture

import protoclip_jax.prepare.download as download
from protoclip_jax.data.sources import open_source
from protoclip_jax.prepare import img2dataset
from protoclip_jax.prepare.__main__ import main
from protoclip_jax.storage.lock import locked

PYTHON = os.environ.get("IMG2DATASET_PYTHON")
FOUND = PYTHON or importlib.util.find_spec("img2dataset") or shutil.which("img2dataset")
needs_img2dataset = pytest.mark.skipif(
    not FOUND, reason="img2dataset is not installed, and IMG2DATASET_PYTHON names no environment"
)
ROOT = Path(__file__).parents[2]


class Handler(BaseHTTPRequestHandler):
    """/ok/7 is a picture; /404, /html, /cut and /short what goes wrong on the web."""

    def do_GET(self):
        kind, _, number = self.path.strip("/").partition("/")
        if kind == "404":
            self.send_error(404)
            return
        if kind == "slow":
            time.sleep(0.02)
        body = picture(int(number), (60, 50))
        length = len(body)
        if kind in ("cut", "short"):
            body = body[: length // 2]
        if kind == "html":
            body = b"<html><body>This picture is gone</body></html>"
        self.send_response(200)
        # A connection that breaks promises more than comes.
        self.send_header("Content-Length", str(length if kind == "short" else len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def write_links(path: Path, server: str, kinds: list[str], form: str = "cc3m") -> str:
    rows = []
    for number, kind in enumerate(kinds):
        cells = [caption(number), f"{server}/{kind}/{number}"]
        rows.append("\t".join(cells if form == "cc3m" else cells[::-1]))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def command(path: str, out: Path, *options: str) -> list[str]:
    python = ["--img2dataset-python", PYTHON] if PYTHON else []
    defaults = ["--processes", "1", "--threads", "4", "--retries", "0"]
    return ["download", path, "--out", str(out), *defaults, *python, *options]


def pictures_in(out: Path) -> dict[int, str]:
    """Line in the list and caption of every picture; fails where one is there twice."""
    found = {}
    for tar in sorted(out.glob("*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive:
                if member.name.endswith(".json"):
                    meta = json.load(archive.extractfile(member))
                    assert meta["line"] not in found
                    found[meta["line"]] = meta["caption"]
    return found


def assert_all_rows(out: Path, kinds: list[str]) -> None:
    report = json.loads((out / "download" / "report.json").read_text())
    good = [number for number, kind in enumerate(kinds) if kind in ("ok", "slow")]
    assert report["rows"] == len(kinds)
    assert report["pictures"] == len(good)
    assert report["pictures"] + sum(report["failed"].values()) == len(kinds)
    assert report["failed"].get("HTTP Error 404: Not Found", 0) == kinds.count("404")
    assert report["open"] == 0
    assert pictures_in(out) == {number + 1: caption(number) for number in good}
    source = open_source(str(out))
    assert len(source) == len(good)
    assert {source.caption(row) for row in range(len(source))} == {caption(n) for n in good}


@needs_img2dataset
def test_every_link_is_a_picture_or_counted_by_reason(tmp_path, server, capsys):
    kinds = ["ok", "404", "html", "cut", "short", "ok"] * 3
    path = write_links(tmp_path / "cc.tsv", server, kinds)
    out = tmp_path / "out"
    assert main(command(path, out, "--shard-rows", "10")) == 0
    said = capsys.readouterr().out
    assert "Conceptual Captions' order: no header" in said
    assert "18 rows = 6 pictures + 12 failed + 0 that are no link" in said
    assert "HTTP Error 404: Not Found: 3" in said
    assert "Image decoding error: 6" in said  # html and cut files
    assert "IncompleteRead" in said  # connections that broke
    assert_all_rows(out, kinds)
    # The files are those of the server, byte for byte.
    source = open_source(str(out))
    number = int(source.caption(0).split()[2].strip(","))
    assert source.read(0)[0] == picture(number, (60, 50))
    # Again: nothing to do. Another side: refused, both are named.
    before = {tar: tar.stat().st_mtime_ns for tar in out.glob("*.tar")}
    assert main(command(path, out, "--shard-rows", "10")) == 0
    assert before == {tar: tar.stat().st_mtime_ns for tar in out.glob("*.tar")}
    assert main(command(path, out, "--shard-rows", "10", "--side", "20")) == 2
    assert "side 0, and this is 20" in capsys.readouterr().err
    # What it made, `convert` takes.
    target = str(tmp_path / "set")
    assert main(["convert", str(out), "--out", target, "--side", "20", "--workers", "1"]) == 0
    assert len(open_source(target)) == 6


def kill_and_resume(tmp_path: Path, server: str, count: int, kills: int, seed: int) -> None:
    """SIGKILL at random moments, the same command again, until it comes to its end."""
    kinds = [("slow", "slow", "404", "slow", "html")[number % 5] for number in range(count)]
    path = write_links(tmp_path / "cc12m.tsv", server, kinds, form="cc12m")
    out = tmp_path / "out"
    full = [sys.executable, "-m", "protoclip_jax.prepare"]
    full += command(path, out, "--shard-rows", "10")
    rng = np.random.default_rng(seed)
    killed = 0
    for turn in range(kills + 1):
        run = subprocess.Popen(
            full, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        if turn < kills:
            done = len(list(out.glob("*.tar")))
            while run.poll() is None and len(list(out.glob("*.tar"))) == done:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.6) if turn else 0)  # the first time it does not end
            # Ours alone, or all of it, as when a machine goes down.
            group = out / "download" / "group"
            if rng.integers(2) and group.exists():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(group.read_text()), signal.SIGKILL)
            run.send_signal(signal.SIGKILL)
            killed += run.wait() == -signal.SIGKILL
            run.stdout.close()
        else:
            said = run.communicate(timeout=300)[0]
            assert run.returncode == 0, said
    assert killed
    assert_all_rows(out, kinds)


@needs_img2dataset
def test_killed_and_resumed(tmp_path, server):
    kill_and_resume(tmp_path, server, count=60, kills=1, seed=0)


@needs_img2dataset
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_and_resumed_many_times(tmp_path, server, seed):
    kill_and_resume(tmp_path, server, count=300, kills=6, seed=seed + 1)


def test_without_img2dataset_it_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    path = write_links(tmp_path / "cc.tsv", "http://x", ["ok"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(["download", path, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert "pip install img2dataset" in said
    assert "\n" not in said
    assert not (tmp_path / "out").exists()
    assert main(["download", path, "--out", "x", "--img2dataset-python", "no-such-python"]) == 2


# What a run of img2dataset leaves, without img2dataset: a program that plays it.

FAKE = """
import json, sys
from pathlib import Path
import pyarrow.parquet as pq
options = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
out, size = Path(options["output_folder"]), int(options["number_sample_per_shard"])
shard = 0
for path in sorted(Path(options["url_list"]).glob("*.parquet")):
    rows = pq.read_table(path).to_pylist()
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        target = out / f"{shard:05}_stats.json"
        print("shard", shard, [row["line"] for row in part], target.exists())
        if not target.exists() and "skip" not in part[0]["caption"]:
            status = {"success": len(part) - 1, "<urlopen error [Errno 7] timed out>": 1}
            target.write_text(json.dumps({"count": len(part), "status_dict": status}))
        shard += 1
if "crash" in rows[0]["caption"]:
    sys.exit("out of luck")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    program = tmp_path / "fake_img2dataset.py"
    program.write_text(FAKE)
    monkeypatch.setattr(img2dataset, "command", lambda python: [sys.executable, str(program)])
    return tmp_path / "out"


def links_of(tmp_path, captions):
    path = tmp_path / "list.tsv"
    path.write_text("".join(f"{text}\thttp://x/{i}\n" for i, text in enumerate(captions)))
    return str(path)


def shards_of(out: Path) -> list[str]:
    log = (out / "download" / "log.txt").read_text().splitlines()
    return [line for line in log if line.startswith("shard")]


def test_shards_are_blocks_of_the_list_in_files_of_bounded_size(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(download, "_LIST_ROWS", 7)
    monkeypatch.setattr(download, "_BATCH", 2)
    path = links_of(tmp_path, [f"text {i}" for i in range(17)])
    assert main(["download", path, "--out", str(fake), "--shard-rows", "3"]) == 0
    assert shards_of(fake) == [
        f"shard {number} {list(range(first, min(first + 3, 18)))} False"
        for number, first in enumerate(range(1, 18, 3))
    ]
    assert len(list((fake / "download" / "links").glob("*.parquet"))) == 3


def test_a_half_written_status_file_is_done_again(tmp_path, fake, capsys):
    path = links_of(tmp_path, [f"text {i}" for i in range(9)])
    arguments = ["download", path, "--out", str(fake), "--shard-rows", "3"]
    assert main(arguments) == 0
    (fake / "00001_stats.json").write_text('{"count": 3, "succ')
    (fake / "00002_stats.json").write_text("")
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "goes on: 1 of 3 shards are there" in said
    assert said.count("9 rows = 6 pictures + 3 failed") == 2
    assert "urlopen error [Errno N] timed out: 3" in said


DAMAGED = pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"5", b"\xff"])


@DAMAGED
def test_damaged_settings_are_one_line(tmp_path, fake, capsys, content):
    arguments = ["download", links_of(tmp_path, ["a", "b"]), "--out", str(fake)]
    (fake / "download").mkdir(parents=True)
    (fake / "download" / "settings.json").write_bytes(content)
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert "download/settings.json is damaged" in said
    assert "choose another --out" in said


@DAMAGED
def test_damaged_counts_of_links_are_made_again(tmp_path, monkeypatch, content):
    monkeypatch.setattr(img2dataset, "command", lambda python: ["true"])
    path = links_of(tmp_path, [f"text {i}" for i in range(3)])
    out = tmp_path / "out"
    arguments = ["download", path, "--out", str(out), "--shard-rows", "3"]
    main(arguments)
    links = out / "download" / "links.json"
    before = links.read_text()
    links.write_bytes(content)
    main(arguments)
    assert links.read_text() == before


def test_shards_that_failed_are_said_and_done_again(tmp_path, fake, capsys):
    path = links_of(tmp_path, ["skip", "b", "c", "d"])
    assert main(["download", path, "--out", str(fake), "--shard-rows", "2"]) == 1
    said = capsys.readouterr().out
    assert (
        "4 rows = 1 pictures + 1 failed + 0 that are no link with a caption + 2 not tried" in said
    )
    assert "1 of 2 shards are not finished: run the command again" in said


def test_an_error_of_img2dataset_is_one_line(tmp_path, fake, capsys):
    path = links_of(tmp_path, ["crash"])
    assert main(["download", path, "--out", str(fake)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "ended with code 1: out of luck" in said
    assert "log.txt" in said


def holder_of(out: Path) -> subprocess.Popen:
    """A process that a killed run left: it has the log's lock, and does not end by itself."""
    (out / "download").mkdir(parents=True)
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a+'); "
        "fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(out / "download" / "log.txt")],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert holder.stdout.readline() == b"held\n"
    return holder


def test_what_a_killed_run_left_is_ended(tmp_path, fake):
    with holder_of(fake) as holder:
        (fake / "download" / "group").write_text(str(holder.pid))
        assert main(["download", links_of(tmp_path, ["a"]), "--out", str(fake)]) == 0
        assert holder.wait() == -signal.SIGKILL


def test_two_at_once_are_refused(tmp_path, fake, monkeypatch, capsys):
    path = links_of(tmp_path, ["a"])
    monkeypatch.setattr(download, "_PATIENCE", 0.2)
    with holder_of(fake) as holder:
        assert main(["download", path, "--out", str(fake)]) == 2
        assert "still at work" in capsys.readouterr().err
        holder.kill()
    with locked(fake / "download"):
        assert main(["download", path, "--out", str(fake)]) == 2
    assert f"is in use by process {os.getpid()} on" in capsys.readouterr().err


def test_another_list_and_folders_of_others_are_refused(tmp_path, fake, capsys):
    arguments = ["--out", str(fake), "--shard-rows", "3"]
    assert main(["download", links_of(tmp_path, ["a", "b"]), *arguments]) == 0
    assert main(["download", links_of(tmp_path, ["a", "x"]), *arguments]) == 2
    assert "was begun with list" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    other = str(tmp_path / "other")
    assert main(["download", links_of(tmp_path, ["a"]), "--out", other]) == 2
    assert "holds other files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("success", "success"),
        ("HTTP Error 403: Forbidden", "HTTP Error 403: Forbidden"),
        ("<urlopen error [Errno -2] Name or service not known>",
         "urlopen error [Errno -N] Name or service not known"),
        ("IncompleteRead(10 bytes read, 20 more expected)",
         "IncompleteRead(N bytes read, N more expected"),
        ("hostname 'a.example' doesn't match 'b'", "hostname '...' doesn't match '...'"),
    ],
)  # fmt: skip
def test_reasons_lose_what_differs_from_link_to_link(text, reason):
    assert img2dataset.reason(text) == reason


def test_rows_that_img2dataset_loses_are_counted():
    stats = {0: {"count": 5, "status_dict": {"success": 3, "HTTP Error 404: Not Found": 1}}}
    assert img2dataset.outcomes(stats) == {
        "success": 3, "HTTP Error 404: Not Found": 1, img2dataset.LOST: 1
    }  # fmt: skip
