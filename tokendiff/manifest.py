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

from tokendiff.errors import CorruptFileError

MANIFEST_NAME = "MANIFEST.json"
# A run's own log and tracking state, which go on being written after the result is committed.
RECORD_FOLDER = "run"
_READ_BYTES = 1 << 20


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
    text = json.dumps(
        {"format": 1, "kind": kind, "metadata": manifest.metadata, "files": files}, indent=1
    )
    write_atomically(folder / MANIFEST_NAME, text.encode())
    return manifest


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
        manifest = Manifest(kind=raw["kind"], files=raw["files"], metadata=raw["metadata"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
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
