"""What processes compare before the first step; the processes are lists here."""

import jax
import pytest
from etils import epath
from tiny_run import small_config

from protoclip_jax import distributed, versions
from protoclip_jax.config import ConfigError
from protoclip_jax.distributed import cluster
from protoclip_jax.training import agreement, record


def others(monkeypatch, *entries: dict):
    """Makes this process 0 of several; the others give this one's entries with changes."""
    monkeypatch.setattr(
        distributed, "exchange", lambda mine: [mine, *(mine | changes for changes in entries)]
    )


def test_equal_processes_agree(monkeypatch):
    others(monkeypatch, {"host": "b"}, {"host": "c"})
    agreement.compare("they differ", {"a": 1, "b": None})


def test_a_difference_names_who_has_what(monkeypatch):
    changed = {"host": "b", "entries": {"a": 2, "b": "x"}}
    others(monkeypatch, changed, {"host": "c"})
    with pytest.raises(ConfigError) as told:
        agreement.compare("they differ", {"a": 1, "b": "x"})
    text = str(told.value)
    assert text.startswith("they differ:\n  a: processes 0, 2 have 1; process 1 has 2\n")
    assert "1 is on b, 2 is on c" in text
    assert "b:" not in text.replace("on b", "")


def test_an_entry_that_one_process_lacks_is_a_difference():
    with pytest.raises(ConfigError, match='new: process 0 has "y"; process 1 has null'):
        agreement.refuse_differences("x", [{"a": 1, "new": "y"}, {"a": 1}])


def test_many_processes_are_not_all_listed():
    with pytest.raises(ConfigError) as told:
        agreement.refuse_differences("x", [{"a": 0}, *[{"a": 1}] * 100])
    assert "processes 1, 2, 3, 4, 5, 6, 7, 8, ... have 1" in str(told.value)
    assert len(str(told.value)) < 200


def test_devices_are_told_and_unequal_ones_refused(monkeypatch):
    local = len(jax.local_devices())
    monkeypatch.setattr(cluster, "gpus_of_node", lambda: 0)
    assert agreement.devices() == f"{local} x cpu"
    others(monkeypatch, {"host": "b"}, {"host": "b"})
    assert agreement.devices() == f"{local} x cpu: 3 processes on 2 host(s), {local} devices each"
    others(monkeypatch, {"host": "b", "devices": "1 x cpu"})
    wanted = f'process 0 has "{local} x cpu"; process 1 has "1 x cpu"'
    with pytest.raises(ConfigError, match=wanted):
        agreement.devices()


def test_gpus_without_use_are_told_with_the_reason(monkeypatch):
    monkeypatch.setattr(cluster, "gpus_of_node", lambda: 8)
    assert "8 of 8 GPUs of" in agreement.devices()
    assert "JAX found no GPU" in agreement.devices()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:2])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    line = agreement.devices().splitlines()[1]
    assert line.startswith("warning: 6 of 8 GPUs of")
    assert line.endswith("CUDA_VISIBLE_DEVICES=0,1")
    # Four processes of two devices use them all.
    others(monkeypatch, {}, {}, {})
    assert len(agreement.devices().splitlines()) == 1


def test_identity_is_recipe_versions_and_code(tmp_path):
    pairs = tmp_path / "pairs.tsv"
    one = record.identity(small_config(pairs))
    assert one == record.identity(small_config(pairs))
    assert len(one["code"]) == 12
    assert one["jax"] == jax.__version__
    other = record.identity(small_config(pairs, optimizer__beta1=0.5, data__workers=3))
    assert {name for name in one if one[name] != other[name]} == {"config.optimizer.beta1"}
    # The same pairs may lie elsewhere on another host: their fingerprint is compared.
    assert one == record.identity(small_config(tmp_path / "elsewhere.tsv"))


def test_code_of_another_checkout_is_another_code(tmp_path, monkeypatch):
    package = tmp_path / "protoclip_jax"
    package.mkdir()
    (package / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(versions, "__file__", str(package / "versions.py"))
    first = versions.code_hash()
    (package / "a.py").write_text("x = 2\n")
    second = versions.code_hash()
    (package / "a.py").rename(package / "b.py")
    assert len({first, second, versions.code_hash()}) == 3


def test_workdir_of_one_process_needs_no_marks(tmp_path):
    agreement.same_folder(epath.Path(tmp_path))
    assert not list(tmp_path.iterdir())
