"""A folder counts once its MANIFEST.json stands in it: sizes and sha256 of every file, written
last.

Every folder that one stage hands to another (token shards, checkpoints, samples, reports) is
committed this way, so that a killed writer leaves nothing that a reader could take for finished.
"""

import hashlib
import json
import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokendiff.errors import CorruptFileError, InputError

MANIFEST_NAME = "MANIFEST.json"
# A run's own log and tracking state, which go on being written after the result is committed.
RECORD_FOLDER = "run"
_READ_BYTES = 1 << 20
_HASHED_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a committed folder holds.

    `files` maps a path relative to the folder to `{"size": bytes, "sha256": hex}`; `metadata` is
    the writer's own (counts, the config it ran with), plain JSON.
    """

    kind: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """Hex sha256 of a JSON value, the same for equal values whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_identity(path: Path) -> list[Any]:
    """What changes when a file's content does: name, size, and sha256, or time of change if large.

    The sha256 stays the same when a file is copied, as it is with every job that is submitted; a
    corpus that is too large for that is too large to be hashed at every start as well.
    """
    stat = path.stat()
    if stat.st_size <= _HASHED_BYTES:
        return [path.name, stat.st_size, sha256_of(path)]
    return [path.name, stat.st_size, stat.st_mtime_ns]


def write_atomically(path: Path, data: bytes) -> None:
    """Write so that `path` holds its old content or all of `data`, even through a power cut."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def commit(
    folder: Path,
    *,
    kind: str,
    metadata: dict[str, Any] | None = None,
    known_sha256: dict[str, str] | None = None,
) -> Manifest:
    """Write the manifest of every file now under `folder`, but for those under `run/`.

    Args:
        kind: what the folder is: "tokens", "checkpoint", "samples", ...
        known_sha256: digests (by relative path) that the writer computed already; the others are
            read.
    """
    known = known_sha256 or {}
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name == MANIFEST_NAME or name.startswith(f"{RECORD_FOLDER}/"):
            continue
        digest = known.get(name) or sha256_of(path)
        files[name] = {"size": path.stat().st_size, "sha256": digest}
    manifest = Manifest(kind=kind, files=files, metadata=metadata or {})
    body = {"format": 1, "kind": kind, "metadata": manifest.metadata, "files": files}
    text = json.dumps({**body, "digest": fingerprint(body)}, indent=1)
    write_atomically(folder / MANIFEST_NAME, text.encode())
    return manifest


def claim_folder(folder: Path, *, kind: str) -> Path:
    """Make a folder ready to receive a result, unless something else is in it.

    Returns:
        The mark of an unfinished attempt, by which the next attempt knows that what it finds is its
        own; to be removed once the folder is committed.

    Raises:
        InputError: the folder holds another kind of result, or files that no attempt of ours left.
    """
    mark = folder / RECORD_FOLDER / f"{kind}.unfinished"
    if is_committed(folder):
        if (there := load_manifest(folder).kind) != kind:
            raise InputError(f"output_dir {folder} holds {there}; choose another output_dir")
    else:
        others = sorted(path.name for path in folder.glob("*") if path.name != RECORD_FOLDER)
        if others and not mark.exists():
            raise InputError(
                f"output_dir {folder} holds other files ({', '.join(others[:3])}); "
                "choose a folder that is empty or does not exist"
            )
    mark.parent.mkdir(parents=True, exist_ok=True)
    if not mark.exists():
        mark.touch()
    return mark


def is_committed(folder: Path) -> bool:
    return (folder / MANIFEST_NAME).is_file()


def load_manifest(folder: Path, *, kind: str | None = None) -> Manifest:
    """Read a manifest.

    Raises:
        FileNotFoundError: the folder was never committed.
        CorruptFileError: the manifest is not readable, or is of another kind than `kind`.
    """
    path = folder / MANIFEST_NAME
    try:
        raw = json.loads(path.read_text())
        digest = raw.pop("digest")
        manifest = Manifest(kind=raw["kind"], files=raw["files"], metadata=raw["metadata"])
        if digest != fingerprint(raw):
            raise ValueError("its digest does not fit its content")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(
            f"{path}: not a manifest ({error}); delete the folder to make it again"
        ) from error
    if kind is not None and manifest.kind != kind:
        raise CorruptFileError(f"{folder} holds {manifest.kind!r}, expected {kind!r}")
    return manifest


def verify(folder: Path, *, kind: str | None = None, hashes: bool = True) -> Manifest:
    """Check a committed folder against its manifest.

    Args:
        hashes: compare sha256 too (reads every byte); False compares presence and size only.

    Raises:
        CorruptFileError: naming the first file that is missing or differs.
        FileNotFoundError: the folder was never committed.
    """
    manifest = load_manifest(folder, kind=kind)
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CorruptFileError(f"{folder}: {name} is missing, though its MANIFEST lists it")
        size = path.stat().st_size
        if size != expected["size"]:
            raise CorruptFileError(
                f"{folder}: {name} does not match its MANIFEST ({size} bytes, expected "
                f"{expected['size']})"
            )
        if hashes and (digest := sha256_of(path)) != expected["sha256"]:
            raise CorruptFileError(
                f"{folder}: {name} does not match its MANIFEST "
                f"(sha256 {digest[:12]}..., expected {expected['sha256'][:12]}...)"
            )
    return manifest
