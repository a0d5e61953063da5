"""Only a process that was killed leaves a note; a full disk ends nothing."""

import contextlib
import errno
import os
import signal
from pathlib import Path

import pytest

from tokendiff.artifacts.last_notes import LastNote, take_note, take_notes, without_notes
from tokendiff.artifacts.locations import RemotePath


def test_what_a_killed_process_was_at_is_found_once(tmp_path: Path) -> None:
    if (pid := os.fork()) == 0:
        last = LastNote(tmp_path, "worker-1").__enter__()
        last.write("step 12, worker 1: rows 1 to 99" + ", 7" * 500)
        last.write("step 13, worker 1: row 7")  # shorter: nothing of the longer one is left
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert take_notes(tmp_path) == ["step 13, worker 1: row 7"]
    assert take_notes(tmp_path) == []
    assert take_note(tmp_path, "worker-1") == ""


def test_who_ends_by_an_error_or_between_steps_leaves_none(tmp_path: Path) -> None:
    with contextlib.suppress(ValueError), LastNote(tmp_path, "a") as last:
        last.write("step 1")
        raise ValueError
    assert not list((tmp_path / "run").iterdir())
    last = LastNote(tmp_path, "b").__enter__()
    last.write("step 1")
    last.write("")
    assert take_notes(tmp_path) == []
    LastNote(tmp_path, "c").__enter__().write("step 2")
    assert len(list((tmp_path / "run").iterdir())) == 1
    with contextlib.suppress(ValueError), without_notes(tmp_path):
        raise ValueError
    assert not list((tmp_path / "run").iterdir())


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "run").write_bytes(b"")
    with LastNote(tmp_path, "a") as last:
        last.write("step 1")
    with LastNote(tmp_path / "other", "a") as last:
        last.write("\N{SNOWMAN}" * 1000)  # cut in the middle of one
        assert take_note(tmp_path / "other", "a").startswith("\N{SNOWMAN}")
        monkeypatch.setattr(os, "pwrite", full)
        last.write("step 2")


def test_behind_a_uri_there_are_none(tmp_path: Path) -> None:
    folder = RemotePath(f"memory://{tmp_path.name}")
    with LastNote(folder, "a") as last, without_notes(folder):
        last.write("step 1")
    assert (take_notes(folder), take_note(folder, "a")) == ([], "")
    assert not folder.exists()
