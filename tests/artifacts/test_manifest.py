"""What a manifest vouches for."""

from pathlib import Path

from tokendiff.artifacts.manifest import commit, verify, write_atomically


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
