"""What changes when the content of a file, a folder or a model does.

Stage keys, the manifests of samples and the registry's digests are made of these values, and
results are found again by them: for the same content they never change.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

from tokendiff.artifacts.locations import Location, changed_ns, files_under, location, size_of
from tokendiff.artifacts.manifest import fingerprint, is_committed, load_manifest, sha256_of
from tokendiff.artifacts.model_folders import is_foreign, local_model

_HASHED_BYTES = 64 << 20
_DOWNLOADS = ".cache/huggingface/"


def file_identity(path: Location) -> list[Any]:
    """An identity of a file that changes with its content: name, size, and sha256, or time of
    change if it is large or remote.

    The sha256 stays the same when a file is copied, as it is with every job that is submitted; a
    corpus that is too large for that is too large to be hashed at every start as well.
    """
    return [path.name, *content_identity(path)]


def content_identity(path: Location) -> list[Any]:
    """`file_identity` without the name: the same for a file that was moved."""
    size, changed = size_of(path), changed_ns(path)
    if size <= _HASHED_BYTES and isinstance(path, Path):
        return [size, _remembered_sha256(path, size, changed)]
    return [size, changed]


@lru_cache(maxsize=1 << 16)
def _remembered_sha256(path: Path, size: int, changed: int) -> str:
    return sha256_of(path)


def identity_of(*names: str | None) -> list[Any]:
    """The content of those of `names` that are on this machine, so that changed text is another
    input.

    What `hf download` keeps beside a folder's files, to go on where it was cut off, is none of it:
    it says when each was downloaded.
    """
    found: list[Any] = []
    for name in names:
        path = location(name) if name else None
        if path is not None and is_committed(path):
            found.append(fingerprint(load_manifest(path).files))
        elif path is not None and path.is_file():
            found.append([file_identity(path)])
        elif path is not None and path.exists():
            files = [file for file in files_under(path) if not file.startswith(_DOWNLOADS)]
            found.append([file_identity(path / file) for file in files])
    return found


def checkpoint_identity(folder: Location) -> str:
    """A digest of the content of a checkpoint that was found or opened."""
    if isinstance(folder, Path) and is_foreign(folder):
        return fingerprint([[path.name, file_identity(path)] for path in _files_in(folder)])
    return fingerprint(load_manifest(folder).files)


def model_identity(name: str | Location, *, by_manifest: bool = True) -> Any:
    """A digest of the content of the model that a name or folder stands for; of a hub name, the
    name.

    Args:
        by_manifest: of a committed folder, what its manifest lists. False: the files that are in
            it, whether it is committed or not; a target is recorded so beside the samples that were
            written for it.
    """
    if by_manifest and is_committed(place := location(name)):
        return checkpoint_identity(place)
    folder = Path(local_model(str(name)))
    if not folder.is_dir():
        return name
    return fingerprint([file_identity(path) for path in _files_in(folder)])


def _files_in(folder: Path) -> list[Path]:
    """The files right in a folder, sorted."""
    return sorted(path for path in folder.iterdir() if path.is_file())
