"""Stores that list late, refuse or are down: nothing is left out of a manifest, errors name what
they are about.
"""

import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow import fs

from benchmarks.faults.fake_s3 import BUCKET, Failing, FakeS3
from pipelines.attempts import may_pass
from tokendiff.artifacts import locations
from tokendiff.artifacts.checkpoint import KIND, find_checkpoint
from tokendiff.artifacts.locations import RemotePath, files_under, open_binary
from tokendiff.artifacts.manifest import commit, publish, sha256_of, verify
from tokendiff.artifacts.store_errors import naming_store
from tokendiff.cluster.preprocess import _check_files
from tokendiff.config.preprocess import PreprocessConfig
from tokendiff.data.files import find_files, parquet_columns, read_lines
from tokendiff.data.partition import Piece
from tokendiff.data.prompt_index import PromptFile, prompt_paths
from tokendiff.data.sources import trained_on
from tokendiff.errors import CorruptFileError, InputError


@pytest.fixture
def late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RemotePath]:
    """A folder behind a store whose listings show nothing that these tests do."""
    with FakeS3.started(tmp_path / "store", Failing(lists_after=600.0)) as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(locations, "_changes", {})
        locations._filesystem.cache_clear()
        yield RemotePath(f"s3://{BUCKET}/out")
        locations._filesystem.cache_clear()


def forget() -> None:
    """From here on as in a process that changed nothing itself."""
    locations._changes.clear()


def test_what_this_process_changed_is_in_a_listing_that_is_behind(late: RemotePath) -> None:
    (late / "a").write_bytes(b"one")
    (late / "deep" / "b").write_bytes(b"two")
    (late / "a").write_bytes(b"three")
    (late / "gone").write_bytes(b"")
    (late / "gone").unlink()
    assert files_under(late) == {"a": 5, "deep/b": 3}
    assert sorted(commit(late, kind="toy").files) == ["a", "deep/b"]
    forget()
    assert files_under(late) == {}  # so it was not the store that knew


def test_a_file_that_the_store_does_not_list_any_more_is_asked_for(late: RemotePath) -> None:
    (late / "a").write_bytes(b"one")
    (late / "b").write_bytes(b"two")
    # Another process deletes one of them.
    locations._resolve(late.uri)[0].delete_file(f"{BUCKET}/out/a")
    assert files_under(late) == {"b": 3}


def test_what_other_processes_wrote_is_asked_for_by_name(late: RemotePath, tmp_path: Path) -> None:
    for name in ("train/part-0", "train/part-1"):
        (late / name).write_bytes(name.encode())
    known = {name: sha256_of(late / name) for name in ("train/part-0", "train/part-1")}
    forget()
    _check_files(late, known)
    with pytest.raises(InputError, match="not the same on every node"):
        _check_files(late, {**known, "train/part-2": "0" * 64})
    forget()
    manifest = commit(late, kind="toy", known_sha256=known)
    assert {name: entry["sha256"] for name, entry in manifest.files.items()} == known
    forget()
    assert verify(late) == manifest
    (late / "train/part-1").unlink()
    with pytest.raises(CorruptFileError, match="part-1 is missing"):
        verify(late)
    # Replaced by a local folder that has less.
    local = tmp_path / "local"
    local.mkdir()
    (local / "c").write_text("c")
    commit(local, kind="toy")
    publish(local, late)
    assert verify(late).files.keys() == {"c"}


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("AWS Error SERVICE_UNAVAILABLE during GetObject operation: ", ConnectionError),
        ("AWS Error NETWORK_CONNECTION during UploadPart operation: curlCode: 52", ConnectionError),
        ("AWS Error ACCESS_DENIED during HeadObject operation: ", PermissionError),
        ("AWS Error UNKNOWN (HTTP status 412) during PutObject operation", OSError),
    ],
)
def test_errors_in_mid_reading_name_the_object(
    monkeypatch: pytest.MonkeyPatch, words: str, kind: type[OSError]
) -> None:
    class Broken:
        def readinto(self, buffer: Any) -> int:
            raise OSError(f"{words}\nRequest ID: 1")

        def close(self) -> None:
            pass

    class Files:
        def open_input_file(self, path: str) -> Broken:
            return Broken()

    monkeypatch.setattr(locations, "_resolve", lambda uri: (Files(), uri))
    with pytest.raises(OSError, match="s3://b/x: AWS Error") as raised:
        RemotePath("s3://b/x").read_bytes()
    assert type(raised.value) is kind
    assert "Request ID" not in str(raised.value)
    # What else fails while the file is open is not the store's.
    with pytest.raises(OSError, match=r"^disk$"), open_binary(RemotePath("s3://b/x")):
        raise OSError("disk")


class Unanswered(Exception):
    """As the client of a store behind an fsspec package raises it: a class of its own."""

    response = SimpleNamespace(status_code=503)


@pytest.mark.parametrize("words", ["AWS Error SLOW_DOWN during GetObject operation", None])
@pytest.mark.parametrize(
    "read",
    [
        lambda: find_files(["s3://b/*.jsonl"]),
        lambda: list(read_lines(Piece(path="s3://b/x.txt", start=0, stop=9, num_bytes=9))),
        lambda: list(read_lines(Piece(path="s3://b/x.txt.gz", start=0, stop=9, num_bytes=9))),
        lambda: parquet_columns("s3://b/x.parquet"),
        lambda: prompt_paths(["s3://b/*.jsonl"]),
        lambda: PromptFile.index("s3://b/x.jsonl"),
        lambda: PromptFile.index("s3://b/x.parquet"),
        lambda: trained_on(
            PreprocessConfig(dataset_name="text", data_files=["x"], new_since="s3://b/x.json")
        ),
    ],
)
def test_text_that_a_store_which_is_down_holds_is_no_bad_input(
    read: Callable[[], Any], words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise Unanswered("503 Server Error") if words is None else OSError(words)

    files = SimpleNamespace(open_input_file=fail, get_file_info=fail)
    monkeypatch.setattr(locations, "_resolve", lambda uri: (files, uri))
    with pytest.raises(ConnectionError, match=f"s3://b/.*{words or '503 Server Error'}") as raised:
        read()
    assert may_pass(raised.value)


# As pyarrow 25 gives them, with the answers of a server; the middle is cut.
GOOGLE = (
    "google::cloud::Status({code}: {how}, with a last message of {what} error_info={{reason=, "
    "domain=, metadata={{gcloud-cpp.retry.on-entry=false, "
    "gcloud-cpp.retry.original-message={what}}}}})"
)
NO_TOKEN = (
    "Could not create a OAuth2 access token to authenticate the request. The underlying error "
    "message was: PerformWork() - CURL error [6]=Could not resolve hostname"
)


@pytest.mark.parametrize(
    ("code", "what", "kind", "told"),
    [
        ("UNAVAILABLE", "busy (really)", ConnectionError, "Google Cloud Error UNAVAILABLE: busy"),
        ("PERMISSION_DENIED", "no", PermissionError, "Google Cloud Error PERMISSION_DENIED: no"),
        ("UNAVAILABLE", NO_TOKEN, PermissionError, "no valid credentials for Google Cloud; run"),
    ],
)
def test_errors_of_googles_store_are_told_in_short(
    code: str,
    what: str,
    kind: type[OSError],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # without a key
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    is_permanent = code == "PERMISSION_DENIED"
    how = "Permanent error" if is_permanent else "Retry policy exhausted"
    words = GOOGLE.format(code=code, how=how, what=what)
    error = PermissionError(errno.EACCES, words) if is_permanent else OSError(words)
    expected = pytest.raises(OSError, match=re.escape(f"gs://b/x: {told}"))
    with expected as raised, naming_store("gs://b/x"):
        raise error
    assert type(raised.value) is kind
    assert "gcloud-cpp" not in str(raised.value)
    assert str(raised.value).count(what) == (0 if what == NO_TOKEN else 1)
    assert may_pass(raised.value) == (kind is ConnectionError)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (NO_TOKEN, ConnectionError),
        (NO_TOKEN.split("PerformWork")[0] + "invalid_grant", PermissionError),
    ],
)
def test_a_key_of_google_that_cannot_be_shown_is_not_a_key_that_is_missing(
    words: str, kind: type[OSError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow's words are the same where the network is away."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    how = "Retry policy exhausted" if kind is ConnectionError else "Permanent error"
    code = "UNAVAILABLE" if kind is ConnectionError else "UNAUTHENTICATED"
    with pytest.raises(OSError, match=r"^gs://b/x: ") as raised, naming_store("gs://b/x"):
        raise OSError(GOOGLE.format(code=code, how=how, what=words))
    assert type(raised.value) is kind
    assert ("no valid credentials" in str(raised.value)) == (kind is PermissionError)
    assert may_pass(raised.value) == (kind is ConnectionError)


def test_googles_client_gives_up_before_a_lease_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself pyarrow asks a server that is busy for a quarter of an hour."""
    opened: list[str] = []

    def from_uri(uri: str) -> tuple[object, str]:
        opened.append(uri)
        return object(), "bucket"

    monkeypatch.setattr(fs, "FileSystem", SimpleNamespace(from_uri=from_uri))
    locations._filesystem.cache_clear()
    try:
        for scheme in ("gs", "gcs", "s3"):
            assert locations._filesystem(scheme, "bucket", os.getpid())[1] == ""
    finally:
        locations._filesystem.cache_clear()
    assert opened == [
        "gs://bucket?retry_limit_seconds=10",
        "gcs://bucket?retry_limit_seconds=10",
        "s3://bucket",
    ]


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("When resolving region: AWS Error NETWORK_CONNECTION: no host", ConnectionError),
        ("Bucket 'bucket' not found", InputError),
    ],
)
def test_a_bucket_whose_region_cannot_be_asked_for_is_not_bad_input(
    monkeypatch: pytest.MonkeyPatch, words: str, kind: type[Exception]
) -> None:
    def from_uri(uri: str) -> None:
        raise OSError(words)

    monkeypatch.setattr(fs, "FileSystem", SimpleNamespace(from_uri=from_uri))
    with pytest.raises(kind, match="s3://unheard-of: ") as raised:
        RemotePath("s3://unheard-of/x").exists()
    assert words in str(raised.value)
    assert may_pass(raised.value) == (kind is ConnectionError)


def test_a_checkpoint_is_found_that_is_not_listed_yet(late: RemotePath) -> None:
    (late / "final" / "weights").write_bytes(b"one")
    assert late.is_dir()
    commit(late / "final", kind=KIND)
    forget()
    assert not late.is_dir()
    for path in (late, late / "final"):
        assert find_checkpoint(path) == late / "final"
    with pytest.raises(InputError, match="no such folder"):
        find_checkpoint(late / "other")
