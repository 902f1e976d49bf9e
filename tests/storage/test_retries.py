"""What may pass is tried again, for a bounded time; what will not is told at once."""

import aiohttp
import gcsfs.retry
import pytest
import requests
from google.api_core import exceptions as google_exceptions
from google.auth import exceptions as auth_exceptions
from pair_files import picture, write_list

from protoclip_jax.data.decoding import NO_ACCESS, UnreadableImage
from protoclip_jax.data.sources import open_source
from protoclip_jax.storage import objects, retries
from protoclip_jax.storage.retries import Unreachable, retried

CLIENT_TRIES = gcsfs.core.GCSFileSystem.retries


class Failing:
    """Fails some times, then answers."""

    def __init__(self, error: Exception, times: int):
        self.error, self.left, self.calls = error, times, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise self.error
        return "answer"


PASSING = [
    TimeoutError(),
    ConnectionResetError("reset by peer"),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientPayloadError("not all was read"),
    requests.exceptions.ConnectionError("no route"),
    gcsfs.retry.HttpError({"code": 503, "message": "busy"}),
    gcsfs.retry.HttpError({"code": "429", "message": "slow down"}),
    google_exceptions.ServiceUnavailable("busy"),
    auth_exceptions.TransportError("no answer"),
]
LASTING = [
    gcsfs.retry.HttpError({"code": 400, "message": "no"}),
    gcsfs.retry.HttpError({"code": 401, "message": "who"}),
    OSError("Forbidden: b/o/x\nnot yours"),
    google_exceptions.Forbidden("not yours"),
    auth_exceptions.DefaultCredentialsError("none were found"),
]


@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
def test_what_may_pass_is_tried_again(no_waiting, error):
    action = Failing(error, 3)
    assert retried("gs://b/x", action) == "answer"
    assert action.calls == 4
    assert len(no_waiting.waits) == 3


@pytest.mark.parametrize("error", LASTING, ids=lambda error: type(error).__name__)
def test_what_will_not_pass_is_told_at_once(no_waiting, error):
    action = Failing(error, 1)
    with pytest.raises(OSError, match=r"^gs://b/x: ") as caught:
        retried("gs://b/x", action)
    assert not isinstance(caught.value, Unreachable)
    assert "\n" not in str(caught.value)
    assert action.calls == 1


@pytest.mark.parametrize("error", [FileNotFoundError("x"), IsADirectoryError("x")])
def test_what_is_not_there_is_asked_for_once(no_waiting, error):
    action = Failing(error, 1)
    with pytest.raises(type(error)):
        retried("gs://b/x", action)
    assert action.calls == 1


def test_a_fault_of_the_program_is_no_outage(no_waiting):
    with pytest.raises(TypeError):
        retried("gs://b/x", Failing(TypeError("wrong"), 1))
    assert not no_waiting.waits


def test_waits_grow_and_end_and_the_tries_are_told(no_waiting, caplog):
    action = Failing(TimeoutError("no answer"), 10**6)
    with pytest.raises(Unreachable, match=r"^gs://b/x: .*tried (\d+) times in \d+ s\)$") as caught:
        retried("gs://b/x", action)
    assert f"tried {action.calls} times" in str(caught.value)
    assert no_waiting.now <= retries.PATIENCE
    assert no_waiting.now > retries.PATIENCE / 2
    assert max(no_waiting.waits) <= 30
    assert no_waiting.waits[0] < 2
    # A line a minute, however many threads and tries there are.
    assert 3 <= len(caplog.records) <= 6


def test_reads_of_a_busy_server_succeed(bucket, tmp_path, no_waiting):
    """The client tries each request a few times; beyond that we do."""
    write_list(tmp_path / "data", 2)
    source = open_source(f"{bucket.put(tmp_path / 'data')}/pairs.tsv")
    before = len(bucket.requests("1.jpg"))
    with bucket.faults({"contains": "1.jpg", "count": CLIENT_TRIES + 2, "status": 503}):
        assert source.read(1)[0] == picture(1)
    assert len(bucket.requests("1.jpg")) == before + CLIENT_TRIES + 3
    assert len(no_waiting.waits) == 1


def test_a_missing_object_is_asked_for_once(bucket, no_waiting):
    with pytest.raises(FileNotFoundError, match=r"gs://.*/none.jpg does not exist"):
        objects.read(f"{bucket.url}/none.jpg")
    assert len(bucket.requests("none.jpg")) == 1
    assert not no_waiting.waits


def test_an_outage_makes_no_picture_unreadable(bucket, tmp_path, no_waiting):
    """Else an outage would train other pairs than those that were drawn."""
    write_list(tmp_path / "data", 2)
    source = open_source(f"{bucket.put(tmp_path / 'data')}/pairs.tsv")
    with bucket.faults({"contains": "1.jpg", "status": 403}):
        with pytest.raises(UnreadableImage) as caught:
            source.read(1)
        assert caught.value.reason == NO_ACCESS
    with (
        bucket.faults({"contains": "1.jpg", "status": 503}),
        pytest.raises(Unreachable, match=r"1\.jpg: HttpError 503.*\(tried"),
    ):
        source.read(1)


def test_writes_are_tried_again_too(bucket, no_waiting):
    before = len(bucket.requests("/upload/"))
    with bucket.faults({"contains": "/upload/", "count": CLIENT_TRIES + 1, "status": 503}):
        objects.write(f"{bucket.url}/x.txt", b"content")
    assert len(bucket.requests("/upload/")) == before + CLIENT_TRIES + 2
    assert objects.read(f"{bucket.url}/x.txt") == b"content"
