"""What a checkpoint says of its run: each line of it is changed once, and the run refused."""

import dataclasses

import pytest
from tiny_run import small_config

from protoclip_jax.config import Config, ConfigError, flatten
from protoclip_jax.recipe import from_flat, option_types
from protoclip_jax.training import record

# What may change without another number of the run: pinned, since one more would pass unseen.
HARMLESS = {
    "model.weights",
    "model.rematerialise",
    "data.train",  # where it lies; the fingerprints say whether it is the same
    "data.image_root",
    "data.teacher",
    "data.workers",
    "data.threads",
    "data.keep_gigabytes",
    "data.max_unreadable",
    "optimizer.max_skipped",
    "evaluation.suite",
    "evaluation.every",
    "checkpoint.every",
    "checkpoint.minutes",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "checkpoint.best",
    "log.every",
    "log.progress",
    "log.tensorboard",
    "log.wandb_project",
    "mesh.fsdp",
}
ANOTHER = {bool: lambda old: not old, int: lambda old: (old or 0) + 1}
ANOTHER |= {float: lambda old: (old or 0.0) + 0.25, str: lambda old: f"{old}x"}
OPTIONS = {path: kind for path, kind, _ in option_types()}
PRINTS = {"source": "a", "teacher": "b"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    # Left to us, the form of the image cache may be another (see below).
    return small_config(tmp_path_factory.mktemp("data") / "pairs.tsv", data__keep="pixels")


def changed(config: Config, path: str, value) -> Config:
    return from_flat(flatten(dataclasses.asdict(config)) | {path: value})


@pytest.mark.parametrize("path", OPTIONS)
def test_each_option_changed_once(path, config, tmp_path):
    stored = record.meta(config) | PRINTS
    old = stored["recipe"][path]
    wanted = record.meta(changed(config, path, ANOTHER[OPTIONS[path]](old))) | PRINTS
    record.check_resumable(tmp_path, stored, record.meta(config) | PRINTS)
    for one, other in ((stored, wanted), (wanted, stored)):
        if path in HARMLESS:
            record.check_resumable(tmp_path, one, other)
            continue
        with pytest.raises(ConfigError, match="holds another run") as caught:
            record.check_resumable(tmp_path, one, other)
        lines = str(caught.value).splitlines()[1:]
        assert [line.split(":")[0] for line in lines] == [f"  {path}"]


def test_what_may_change_are_options():
    assert not HARMLESS - OPTIONS.keys()


@pytest.mark.parametrize("path", [path for path in OPTIONS if path not in HARMLESS])
def test_an_option_that_one_of_them_does_not_know_is_refused(path, config, tmp_path):
    whole = record.meta(config) | PRINTS
    less = {"recipe": {name: x for name, x in whole["recipe"].items() if name != path}} | PRINTS
    missing = f"\n  {path}: stored"
    if whole["recipe"][path] is not None:  # none, and no such option, are the same run
        with pytest.raises(ConfigError, match=missing):
            record.check_resumable(tmp_path, less, whole)


@pytest.mark.parametrize("name", ["source", "teacher", "a later version's"])
@pytest.mark.parametrize("value", ["other", None])
def test_each_fingerprint_changed_once(name, value, config, tmp_path):
    stored = record.meta(config) | PRINTS
    other = stored | {name: value}
    for one, two in ((stored, other), (other, stored)):
        if one.get(name) == two.get(name):
            continue
        with pytest.raises(ConfigError, match=f"\n  {name}: stored"):
            record.check_resumable(tmp_path, one, two)


def test_only_the_form_that_is_left_to_us_may_change(config, tmp_path):
    automatic, jpeg = (changed(config, "data.keep", form) for form in ("auto", "jpeg"))
    ours, theirs = (record.meta(one) | PRINTS for one in (automatic, jpeg))
    record.check_resumable(tmp_path, theirs | {record.IMAGE_CACHE: "jpeg"}, ours)
    assert record.cache_form(theirs | {record.IMAGE_CACHE: "pixels"}) == "pixels"
    assert record.cache_form(theirs) == "jpeg"
    with pytest.raises(ConfigError, match=r"data\.keep: stored"):
        record.check_resumable(tmp_path, ours, theirs)


def test_processes_compare_every_option_but_a_hosts_own(config):
    own = {"data.workers", "data.threads", "data.train", "data.teacher", "data.image_root"}
    found = record.identity(config)
    options = {name.removeprefix("config.") for name in found if name.startswith("config.")}
    assert options == OPTIONS.keys() - own
    assert len(found["code"]) > 8
    assert found["jax"]
