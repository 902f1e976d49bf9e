"""Files that are written by several at once."""

import importlib.util
import os

from protoclip_jax.storage import atomic


def test_hosts_with_equal_process_ids_write_parts_of_their_own(tmp_path, monkeypatch):
    """As pods over one folder do, each of which is process 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    spec = importlib.util.find_spec(atomic.__name__)
    hosts = [importlib.util.module_from_spec(spec) for _ in range(2)]
    for host in hosts:
        spec.loader.exec_module(host)
    parts = [host.part_of(tmp_path / "index.json") for host in hosts]
    assert parts[0] != parts[1]
    for host, part in zip(hosts, parts, strict=True):
        assert part == host.part_of(tmp_path / "index.json")
        part.write_text("whole")
        host.settle(part, tmp_path / "index.json")
    assert atomic.clear_parts(tmp_path) == 0
    assert (tmp_path / "index.json").read_text() == "whole"
