"""Which checkpoint of an output_dir counts, and which are deleted."""

from pathlib import Path

import pytest

from tokendiff.artifacts import locations
from tokendiff.artifacts.checkpoint import (
    KIND,
    best_step_of,
    checkpoint_name,
    committed_checkpoints,
    find_checkpoint,
    newest_sound_checkpoint,
    remove_old_checkpoints,
)
from tokendiff.artifacts.locations import Location, RemotePath
from tokendiff.artifacts.manifest import commit
from tokendiff.errors import CorruptFileError


@pytest.fixture(params=["here", "behind a URI"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """Checkpoints 2, 4, 8 and 16, of which 16 names 4 as its best."""
    is_here = request.param == "here"
    place: Location = tmp_path if is_here else RemotePath(f"memory://{tmp_path.name}")
    for step in (2, 4, 8, 16):
        folder = place / checkpoint_name(step)
        if isinstance(folder, Path):
            folder.mkdir()
        (folder / "weights").write_bytes(b"abc")
        commit(folder, kind=KIND, metadata={"best_step": 4} if step == 16 else {})
    return place


def steps(out: Location) -> list[str]:
    return [path.name.removeprefix("checkpoint-") for path in committed_checkpoints(out)]


def test_the_newest_counts_with_the_one_that_is_its_best(out: Location) -> None:
    told: list[str] = []
    assert newest_sound_checkpoint(out, warn=told.append) == out / "checkpoint-16"
    (out / "checkpoint-4" / "MANIFEST.json").unlink()
    assert newest_sound_checkpoint(out, warn=told.append) == out / "checkpoint-8"
    (message,) = told
    assert message.endswith("checkpoint-4: is gone; using the previous checkpoint")
    for step in (2, 8, 16):
        (out / f"checkpoint-{step}" / "weights").write_bytes(b"ab")
    assert newest_sound_checkpoint(out, warn=told.append) is None
    assert told[-1] == f"no sound checkpoint is left under {out}; starting from step 0"


def test_what_is_the_best_or_needed_is_kept_and_what_is_later_is_not(out: Location) -> None:
    remove_old_checkpoints(out, newest=16, keep=1, needed=8)
    assert steps(out) == ["4", "8", "16"]
    remove_old_checkpoints(out, newest=8, keep=1)
    assert steps(out) == ["8"]


def test_what_a_killed_writer_left_is_deleted_and_what_is_being_written_is_not(
    tmp_path: Path,
) -> None:
    (tmp_path / ".checkpoint-32.0123abcd.tmp" / "deep").mkdir(parents=True)
    (tmp_path / ".note.0123abcd.tmp").write_text("")
    remove_old_checkpoints(tmp_path, newest=16, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [".note.0123abcd.tmp"]


def test_a_deletion_that_is_cut_off_leaves_nothing_that_counts(
    out: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(locations.shutil, "rmtree", die)
    monkeypatch.setattr(locations, "_in_threads", die)
    with pytest.raises(KeyboardInterrupt):
        remove_old_checkpoints(out, newest=16, keep=3)
    assert steps(out) == ["4", "8", "16"]


def test_another_kind_of_result_is_no_checkpoint(out: Location) -> None:
    commit(out / "checkpoint-16", kind="tokens")
    with pytest.raises(CorruptFileError, match=r"16 holds 'tokens', expected 'checkpoint'"):
        find_checkpoint(out / "checkpoint-16")
    assert newest_sound_checkpoint(out, warn=lambda message: None) == out / "checkpoint-8"


def test_a_relative_path_is_opened_from_any_working_directory(
    out: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(out, Path):
        monkeypatch.chdir(tmp_path)
        assert find_checkpoint("checkpoint-8") == tmp_path / "checkpoint-8"


def test_who_names_no_best_step(tmp_path: Path) -> None:
    assert best_step_of(tmp_path) is None
