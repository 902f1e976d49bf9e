"""Sources under gs://, through etils.epath; a local folder plays the bucket."""

import fsspec
import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from pair_files import caption, picture, write_list, write_shards

from protoclip_jax.data.decoding import MISSING, UnreadableImage
from protoclip_jax.data.sources import open_source, where


class Bucket(DirFileSystem):
    """gs:// paths below a local folder."""

    protocol = "gs"

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("gs://") if isinstance(path, str) else path


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    system = Bucket(str(tmp_path / "storage"), fsspec.filesystem("file"))
    found = backend.fsspec_backend._get_filesystem
    monkeypatch.setattr(
        backend._FileSystemSpecBackend,
        "_get_filesystem",
        lambda self, name: system if name == "gcs" else found(name),
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "storage" / "bucket"


def test_a_list_and_its_pictures(bucket):
    write_list(bucket, 4, {2: "missing", 3: "empty"})
    source = open_source("gs://bucket/pairs.tsv")
    assert source.name == "gs://bucket/pairs.tsv"
    assert where(source, 1) == "gs://bucket/1.jpg"
    assert source.read(1) == (picture(1), caption(1))
    for row, reason in ((2, MISSING), (3, "empty file")):
        with pytest.raises(UnreadableImage) as caught:
            source.read(row)
        assert caught.value.reason == reason


def test_a_local_list_of_remote_pictures(bucket, tmp_path):
    write_list(bucket, 2)
    local = tmp_path / "pairs.tsv"
    local.write_text("filepath\ttitle\ngs://bucket/1.jpg\ta\n")
    assert open_source(str(local)).read(0) == (picture(1), "a")
    local.write_text("filepath\ttitle\n1.jpg\ta\n")
    assert open_source(str(local), image_root="gs://bucket").read(0) == (picture(1), "a")


@pytest.mark.parametrize("spec", ["", "/00000.tar", "/0*.tar", "/{00000..00001}.tar"])
def test_tars(bucket, spec):
    write_shards(bucket / "shards", 2, 3)
    source = open_source(f"gs://bucket/shards{spec}")
    assert len(source) == (3 if spec == "/00000.tar" else 6)
    for row in range(len(source)):
        assert source.read(row) == (picture(row), caption(row))


def test_what_is_not_there(bucket):
    write_list(bucket, 2)
    with pytest.raises(FileNotFoundError):
        open_source("gs://bucket/other.tsv")
    with pytest.raises(ValueError, match="ArrayRecord sets are read from local folders only"):
        open_source("gs://bucket/set")


def test_without_the_package_for_it():
    with pytest.raises(ValueError, match="pip install gcsfs") as caught:
        open_source("gs://bucket/pairs.tsv")
    assert "\n" not in str(caught.value)


def test_an_unknown_scheme():
    with pytest.raises(ValueError, match="no way to read ftp://"):
        open_source("ftp://bucket/pairs.tsv")
