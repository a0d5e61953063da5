"""A folder counts once its MANIFEST.json stands in it: sizes and sha256 of every file, written
last.

Every folder that one stage hands to another (token shards, checkpoints, samples, reports) is
committed this way, so that a killed writer leaves nothing that a reader could take for finished.
A folder may be remote (`tokendiff.artifacts.locations`).
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokendiff.artifacts.locations import (
    Location,
    files_under,
    local_folder,
    open_binary,
    remove,
    size_of,
    upload,
)
from tokendiff.errors import CorruptFileError, InputError, naming

MANIFEST_NAME = "MANIFEST.json"
# A run's own log and tracking state, which go on being written after the result is committed.
RECORD_FOLDER = "run"
# In the metadata: the commits of models and datasets of the hub, by the field that names one.
COMMITS = "commits"
_READ_BYTES = 1 << 20
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # as `write_atomically` names them
_MAX_LAID_OUT = 1000


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a committed folder holds.

    `files` maps a path relative to the folder to `{"size": bytes, "sha256": hex}`; `metadata` is
    the writer's own (counts, the config it ran with), plain JSON.
    """

    kind: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


def sha256_of(path: Location) -> str:
    digest = hashlib.sha256()
    with open_binary(path) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """Hex sha256 of a JSON value, the same for equal values whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_atomically(path: Location, data: bytes) -> None:
    """Write so that `path` holds its old content or all of `data`, even through a power cut."""
    if not isinstance(path, Path):
        path.write_bytes(data)
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_temporary(path: str) -> bool:
    """Whether a file has the name of one that is being written, or was when its writer died."""
    return _TEMPORARY.fullmatch(path.rpartition("/")[2]) is not None


def commit(
    folder: Location,
    *,
    kind: str,
    metadata: dict[str, Any] | None = None,
    known_sha256: dict[str, str] | None = None,
) -> Manifest:
    """Write the manifest of every file now under `folder`, but for those under `run/`.

    Temporary files, which a writer that was killed in an earlier attempt left, are deleted.

    Args:
        kind: what the folder is: "tokens", "checkpoint", "samples", ...
        known_sha256: digests (by relative path) that the writer computed already; the others are
            read.
    """
    known = known_sha256 or {}
    files = {}
    there = files_under(folder)
    # Written by another process a moment ago, and a listing may be behind.
    there |= {name: size_of(folder / name) for name in sorted(known.keys() - there.keys())}
    for name, size in there.items():
        if name == MANIFEST_NAME or name.startswith(f"{RECORD_FOLDER}/"):
            continue
        if is_temporary(name):
            (folder / name).unlink(missing_ok=True)
            continue
        digest = known.get(name) or sha256_of(folder / name)
        files[name] = {"size": size, "sha256": digest}
    manifest = Manifest(kind=kind, files=files, metadata=metadata or {})
    body = {"format": 1, "kind": kind, "metadata": manifest.metadata, "files": files}
    # Laid out for people, where there are few enough to look at.
    indent = 1 if len(files) <= _MAX_LAID_OUT else None
    text = json.dumps({**body, "digest": fingerprint(body)}, indent=indent)
    write_atomically(folder / MANIFEST_NAME, text.encode())
    return manifest


def claim_folder(folder: Location, *, kind: str) -> Location:
    """Make a folder ready to receive a result, unless something else is in it.

    Returns:
        The mark of an unfinished attempt, by which the next attempt knows that what it finds is its
        own; to be removed once the folder is committed.

    Raises:
        InputError: the folder holds another kind of result, or files that no attempt of ours left.
    """
    check_claim(folder, kind=kind)
    mark = _mark_of(folder, kind)
    mark.parent.mkdir(parents=True, exist_ok=True)
    if not mark.exists():
        mark.write_bytes(b"")
    return mark


def check_claim(folder: Location, *, kind: str) -> None:
    """Raise what `claim_folder` would; nothing is written."""
    if is_committed(folder):
        if (there := load_manifest(folder).kind) != kind:
            raise InputError(f"output_dir {folder} holds {there}; choose another output_dir")
    else:
        there_already = folder.iterdir() if folder.is_dir() else ()
        others = sorted(path.name for path in there_already if path.name != RECORD_FOLDER)
        if others and not _mark_of(folder, kind).exists():
            raise InputError(
                f"output_dir {folder} holds other files ({', '.join(others[:3])}); "
                "choose a folder that is empty or does not exist"
            )


def noted_in_claim(folder: Location, *, kind: str) -> str:
    """What an attempt has written into the mark that `claim_folder` gave it; "" where none has."""
    try:
        return _mark_of(folder, kind).read_text()
    except FileNotFoundError:
        return ""


def _mark_of(folder: Location, kind: str) -> Location:
    return folder / RECORD_FOLDER / f"{kind}.unfinished"


def remove_committed(folder: Location, result_folder: Location) -> None:
    """Delete a folder; from the first moment on, its result no longer counts."""
    (result_folder / MANIFEST_NAME).unlink(missing_ok=True)
    if not isinstance(folder, Path):
        remove(folder)
    elif folder.exists():
        shutil.rmtree(folder)


def is_committed(folder: Location) -> bool:
    return (folder / MANIFEST_NAME).is_file()


def load_manifest(folder: Location, *, kind: str | None = None) -> Manifest:
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
        for name, entry in manifest.files.items():
            _check_entry(name, entry)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFileError(
            f"{path}: not a manifest ({error}); delete the folder to make it again"
        ) from error
    if kind is not None and manifest.kind != kind:
        raise CorruptFileError(f"{folder} holds {manifest.kind!r}, expected {kind!r}")
    return manifest


def _check_entry(name: str, entry: Any) -> None:
    """Raise ValueError where a name leads out of the folder, or the rest is no size and sha256."""
    parts = name.split("/")
    if "\0" in name or "\\" in name or not {"", ".", ".."}.isdisjoint(parts):
        raise ValueError(f"{name!r:.80} is not the name of a file in the folder")
    if type(entry["size"]) is not int or not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
        raise ValueError(f"the size or sha256 of {name!r:.80} is not valid")


def verify(folder: Location, *, kind: str | None = None, hashes: bool = True) -> Manifest:
    """Check a committed folder against its manifest.

    Args:
        hashes: compare sha256 too (reads every byte); False compares presence and size only.

    Raises:
        CorruptFileError: naming the first file that is missing or differs.
        FileNotFoundError: the folder was never committed.
    """
    manifest = load_manifest(folder, kind=kind)
    sizes = files_under(folder)
    for name, expected in manifest.files.items():
        size = sizes.get(name)
        if size is None and not isinstance(folder, Path) and (folder / name).is_file():
            size = size_of(folder / name)  # the listing is behind
        if size is None:
            raise CorruptFileError(f"{folder}: {name} is missing, though its MANIFEST lists it")
        if size != expected["size"]:
            raise CorruptFileError(
                f"{folder}: {name} does not match its MANIFEST ({size} bytes, expected "
                f"{expected['size']})"
            )
        if hashes and (digest := sha256_of(folder / name)) != expected["sha256"]:
            raise CorruptFileError(
                f"{folder}: {name} does not match its MANIFEST "
                f"(sha256 {digest[:12]}..., expected {expected['sha256'][:12]}...)"
            )
    return manifest


def publish(source: Path, target: Location) -> None:
    """Copy a committed folder in place of the result that `target` holds; `run/` there stays.

    At no time does a manifest there vouch for a mixture of the two.
    """
    assert not isinstance(target, Path), "a local result is built beside its place and renamed"
    (target / MANIFEST_NAME).unlink(missing_ok=True)
    names = [name for name in files_under(source) if name != MANIFEST_NAME]
    upload(source, target, names)
    for name in files_under(target).keys() - set(names):
        if not name.startswith(f"{RECORD_FOLDER}/"):
            (target / name).unlink(missing_ok=True)
    upload(source, target, [MANIFEST_NAME])


@contextmanager
def built_for(target: Location) -> Iterator[Path]:
    """A folder to build and commit a result in: `target` itself, or one that is published there."""
    if isinstance(target, Path):
        yield target
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        publish(Path(folder), target)


def fetch(folder: Location, *, under: str = "") -> Path:
    """A committed folder on this machine, checked against its manifest: itself if it is local.

    Args:
        under: fetch only the files whose names begin with this.

    Raises:
        FileNotFoundError: the folder was never committed.
        CorruptFileError: a file does not match the manifest.
    """
    if isinstance(folder, Path):
        return folder
    manifest = load_manifest(folder)
    wanted = {name: e for name, e in manifest.files.items() if name.startswith(under)}
    digest = fingerprint([folder.uri, manifest.metadata, wanted])
    copy = local_folder(folder, wanted, digest=digest)
    if not under and not is_committed(copy):
        write_atomically(copy / MANIFEST_NAME, (folder / MANIFEST_NAME).read_bytes())
    return copy
