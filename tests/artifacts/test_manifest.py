"""What a manifest vouches for."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokendiff.artifacts.manifest import (
    claim_folder,
    commit,
    fingerprint,
    is_committed,
    remove_committed,
    verify,
    write_atomically,
)
from tokendiff.errors import CorruptFileError, InputError


def test_a_manifest_does_not_vouch_for_what_a_killed_writer_left(tmp_path: Path) -> None:
    write_atomically(tmp_path / "part", b"rows")
    alone = commit(tmp_path, kind="toy").files
    for left in (".MANIFEST.json.0123abcd.tmp", "deep/.part.89abcdef.tmp"):
        (tmp_path / left).parent.mkdir(exist_ok=True)
        (tmp_path / left).write_bytes(b"half a fi")
    mine = {".hidden.tmp", "part.0123abcd.tmp"}  # names that no writer of ours has
    for name in mine:
        (tmp_path / name).write_bytes(b"")
    assert commit(tmp_path, kind="toy").files.keys() == alone.keys() | mine
    assert list((tmp_path / "deep").iterdir()) == []
    verify(tmp_path)


def test_a_full_disk_is_told_with_the_file_that_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_atomically(tmp_path / "part", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/part'$"):
        write_atomically(tmp_path / "part", b"new")
    assert (tmp_path / "part").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


def test_a_fingerprint_is_that_of_the_text_whatever_the_order() -> None:
    """Keys of stages and of what was committed long ago are made of it."""
    text = '{"a":[1,2.5,null],"b":"\u00e9"}'
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert fingerprint({"b": "\u00e9", "a": [1, 2.5, None]}) == expected
    assert fingerprint({"a": [1, 2.5, None], "b": "\u00e9"}) == expected


def test_a_manifest_vouches_for_what_was_written_and_not_for_what_became_of_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "part").write_bytes(b"sows")
    commit(tmp_path, kind="toy", known_sha256={"part": hashlib.sha256(b"rows").hexdigest()})
    with pytest.raises(CorruptFileError, match=r"part does not match its MANIFEST \(sha256"):
        verify(tmp_path)


def test_a_result_whose_deletion_is_cut_off_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        remove_committed(tmp_path, committed(tmp_path / "final"))
    assert (tmp_path / "final" / "deep" / "part").exists()
    assert not is_committed(tmp_path / "final")


def committed(folder: Path) -> Path:
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "part").write_bytes(b"rows")
    (folder / "run").mkdir()
    (folder / "run" / "log.jsonl").write_bytes(b"{}")
    commit(folder, kind="toy", metadata={"rows": 1})
    return folder


def rewritten(folder: Path, **changes: Any) -> None:
    """A manifest with other fields, whose digest is theirs."""
    body = json.loads((folder / "MANIFEST.json").read_text())
    del body["digest"]
    body |= changes
    (folder / "MANIFEST.json").write_text(json.dumps({**body, "digest": fingerprint(body)}))


def part_of(**changes: Any) -> dict[str, Any]:
    digest = "2b6b1d2ae4e8a5ba8f9b2a4f7a5bde6d12e9f7e7a4b77a6b1a1ed5b7f1f7e0aa"
    return {"deep/part": {"size": 4, "sha256": digest, **changes}}


FAULTS: list[tuple[Callable[[Path], Any], str, bool]] = [
    (
        lambda folder: (folder / "deep" / "part").unlink(),
        "deep/part is missing, though its MANIFEST lists it",
        True,
    ),
    (
        lambda folder: (folder / "deep" / "part").write_bytes(b"row"),
        r"deep/part does not match its MANIFEST \(3 bytes, expected 4\)",
        True,
    ),
    (
        lambda folder: (folder / "deep" / "part").write_bytes(b"sows"),
        r"deep/part does not match its MANIFEST \(sha256 [0-9a-f]{12}\.\.\., expected",
        False,
    ),
    (
        lambda folder: (folder / "MANIFEST.json").write_text(
            (folder / "MANIFEST.json").read_text().replace('"rows": 1', '"rows": 2')
        ),
        "its digest does not fit its content",
        True,
    ),
    (
        lambda folder: (folder / "MANIFEST.json").write_text("[" * 100_000),
        r"MANIFEST\.json: not a manifest \(.*delete the folder to make it again",
        True,
    ),
    (lambda folder: rewritten(folder, kind="other"), "holds 'other', expected 'toy'", True),
    (
        lambda folder: rewritten(folder, files=part_of(size=True)),
        "size or sha256 of 'deep/part' is not valid",
        True,
    ),
    (
        lambda folder: rewritten(folder, files=part_of(sha256="2B" * 32)),
        "size or sha256 of 'deep/part' is not valid",
        True,
    ),
]


@pytest.mark.parametrize(("damage", "said", "without_hashes"), FAULTS)
def test_what_differs_from_a_manifest_is_named(
    tmp_path: Path, damage: Callable[[Path], Any], said: str, without_hashes: bool
) -> None:
    folder = committed(tmp_path / "result")
    (folder / "run" / "log.jsonl").write_bytes(b"what a run writes later is its own")
    assert verify(folder, kind="toy").files.keys() == {"deep/part"}
    assert verify(folder, kind="toy", hashes=False).metadata == {"rows": 1}
    damage(folder)
    with pytest.raises(CorruptFileError, match=said):
        verify(folder, kind="toy")
    if without_hashes:
        with pytest.raises(CorruptFileError, match=said):
            verify(folder, kind="toy", hashes=False)
    else:
        verify(folder, kind="toy", hashes=False)


def test_a_folder_is_claimed_by_one_kind_of_result(tmp_path: Path) -> None:
    folder = tmp_path / "result"
    mark = claim_folder(folder, kind="toy")
    (folder / "part").write_bytes(b"rows")
    assert claim_folder(folder, kind="toy") == mark  # what is there is an attempt's own
    with pytest.raises(InputError, match=r"holds other files \(part\); choose a folder"):
        claim_folder(folder, kind="other")
    mark.unlink()
    with pytest.raises(InputError, match=r"holds other files \(part\); choose a folder"):
        claim_folder(folder, kind="toy")
    commit(folder, kind="toy")
    claim_folder(folder, kind="toy")
    with pytest.raises(InputError, match="holds toy; choose another output_dir"):
        claim_folder(folder, kind="other")
