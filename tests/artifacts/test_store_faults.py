"""Stores that list late, refuse or are down: nothing is left out of a manifest, errors name what
they are about.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults.fake_s3 import BUCKET, Failing, FakeS3
from tokendiff.artifacts import locations
from tokendiff.artifacts.checkpoint import KIND, find_checkpoint
from tokendiff.artifacts.locations import RemotePath, files_under, open_binary
from tokendiff.artifacts.manifest import commit, publish, sha256_of, verify
from tokendiff.cluster.preprocess import _check_files
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
