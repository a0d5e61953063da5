"""Folders and files that are local or behind a URI: s3://, gs://, or what fsspec knows.

A `Location` is a `Path` or a `RemotePath`, which has the few methods of a path that the project
uses. An object store has no rename, so a result is committed there by the order of its files: the
manifest comes last, and goes first when a folder is replaced. What must be read in place (weights,
shards) is copied once per machine into `TOKENDIFF_CACHE`, under the hash of its content.

Credentials and endpoints are the environment's (AWS_PROFILE, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS, ...): none stands in a URI, a config or a manifest.
"""

import contextlib
import functools
import io
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tokendiff.artifacts.store_errors import is_store_down, naming_store, words_of_store
from tokendiff.errors import CorruptFileError, InputError, naming

CACHE_VARIABLE = "TOKENDIFF_CACHE"
_URI = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_ARROW_SCHEMES = ("s3", "gs", "gcs")
_WEB_SCHEMES = ("http", "https")
_CACHED_PART_OF_DISK = 0.25
_BUFFER_BYTES = 1 << 20
_THREADS = 8
# Google's client would try for a quarter of an hour, in silence, and a lease is renewed in between.
_GOOGLE_OPTIONS = "?retry_limit_seconds=10"
_LISTS_LATE_SECONDS = 60.0
_MOST_CHANGES = 10_000
# URI of a file that this process wrote or deleted -> (when, its size or None), so that a listing
# that is behind is set right.
_changes: dict[str, tuple[float, int | None]] = {}
# URI of a folder -> (what in it is not guarded, what is called before each write to the rest).
_guards: dict[str, tuple[tuple[str, ...], Callable[[], None]]] = {}


@dataclass(frozen=True, order=True)
class RemotePath:
    """A file or folder behind a URI. Like a pure path it may name what is not there.

    It is deliberately not `os.PathLike`: `open` and `shutil` refuse it in place of making a local
    file of a strange name.
    """

    uri: str

    def __post_init__(self) -> None:
        scheme, _, rest = self.uri.partition("://")
        if "?" in rest or "@" in rest.split("/")[0]:
            raise InputError(
                f"{scheme}://...: a URI holds no options and no credentials; they are taken from "
                "the environment (AWS_ENDPOINT_URL, AWS_PROFILE, ...)"
            )
        if scheme.lower() in _WEB_SCHEMES:
            raise InputError(
                f"{self.uri}: folders cannot be read or written at a web address; download what is "
                "there and give its path, or give a store such as s3://BUCKET/PATH"
            )
        if scheme.lower() in _ARROW_SCHEMES and not rest.split("/")[0]:
            raise InputError(f"{self.uri}: names no bucket; write {scheme}://BUCKET/PATH")
        if ".." in rest.split("/"):
            raise InputError(f"{self.uri}: '..' is not allowed in a URI; write the path out")
        object.__setattr__(self, "uri", f"{scheme.lower()}://{rest.rstrip('/')}")

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str | Path) -> "RemotePath":
        below = Path(name).as_posix()
        return self if below == "." else RemotePath(f"{self.uri}/{below}")

    @property
    def name(self) -> str:
        return self.uri.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def parent(self) -> "RemotePath":
        """As of a path: of a bucket, itself."""
        above = self.uri.rpartition("/")[0]
        return self if above.endswith("/") else RemotePath(above)

    def _info(self) -> Any:
        filesystem, path = _resolve(self.uri)
        with naming_store(self.uri):
            return filesystem.get_file_info(path)

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        return bool(self._info().is_file)

    def is_dir(self) -> bool:
        """Whether any file is under it: an object store has no empty folders.

        Looked for level by level: a list of all there is takes a request for each 1,000 files.
        """
        from pyarrow.fs import FileType

        found = list(self._below(recursive=False))
        return (
            any(info.is_file for info in found)
            or any(
                (self / info.base_name).is_dir()
                for info in found
                if info.type == FileType.Directory
            )
            or any(
                (self / name).is_file()
                for name, size in _changes_under(self).items()
                if size is not None
            )
        )

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing to do: folders come with their files."""

    def iterdir(self) -> Iterator["RemotePath"]:
        names = sorted({name.split("/")[0] for name in files_under(self)})
        return (self / name for name in names)

    def read_bytes(self) -> bytes:
        with open_binary(self) as file:
            return file.read()

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes) -> None:
        """The file is replaced as a whole or not at all."""
        filesystem, path = _resolve_to_write(self.uri)
        with naming_store(self.uri):
            if filesystem.type_name.startswith("py::"):  # fsspec ones may want the folder first
                filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            with filesystem.open_output_stream(path, compression=None) as file:
                file.write(data)
        _note_change(self.uri, len(data))

    def unlink(self, *, missing_ok: bool = False) -> None:
        filesystem, path = _resolve_to_write(self.uri)
        try:
            with naming_store(self.uri):
                filesystem.delete_file(path)
            _note_change(self.uri, None)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def _files(self) -> Iterator[Any]:
        """What pyarrow says of every file under it, at any depth."""
        return (info for info in self._below(recursive=True) if info.is_file)

    def _below(self, *, recursive: bool) -> Iterator[Any]:
        from pyarrow.fs import FileSelector

        filesystem, path = _resolve(self.uri)
        found = []
        with naming_store(self.uri), contextlib.suppress(NotADirectoryError):
            found = filesystem.get_file_info(
                FileSelector(path, recursive=recursive, allow_not_found=True)
            )
        return (info for info in found if info.path.startswith(f"{path}/"))


Location = Path | RemotePath


def is_uri(path: str) -> bool:
    return _URI.match(path) is not None


def location(path: "str | Location") -> Location:
    """A path as a user gives it: a URI, or a local path with ~ for the home folder."""
    if isinstance(path, RemotePath):
        return path
    if isinstance(path, str) and path.startswith("file://"):
        return Path(path.removeprefix("file://"))
    if isinstance(path, str) and is_uri(path):
        return RemotePath(path)
    return local_path(path)


def local_path(path: str | Path) -> Path:
    """A path of this machine as a user gives it, with ~ or ~USER for a home folder.

    Raises:
        InputError: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = Path(path).parts[0]
        raise InputError(
            f"{path}: this machine knows no home folder {user}; write the path out, or, where that "
            f"is the name of a folder, ./{path}"
        ) from error


def files_under(folder: Location) -> dict[str, int]:
    """Size of every file at any depth, by its path relative to `folder`, in sorted order.

    Stores whose listings are behind are asked by name for what this process changed of late.
    """
    if isinstance(folder, Path):
        found = dict(_sizes_under(folder)) if folder.is_dir() else {}
    else:
        _, base = _resolve(folder.uri)
        found = {info.path.removeprefix(f"{base}/"): info.size for info in folder._files()}
        for name, size in _changes_under(folder).items():
            if found.get(name) == size:
                continue
            info = (folder / name)._info()
            if info.is_file:
                found[name] = info.size
            else:
                found.pop(name, None)
    return dict(sorted(found.items()))


def _note_change(uri: str, size: int | None) -> None:
    now = time.monotonic()
    if len(_changes) >= _MOST_CHANGES:
        for other, (when, _) in list(_changes.items()):
            if when < now - _LISTS_LATE_SECONDS:
                _changes.pop(other, None)
    _changes[uri] = (now, size)


def _changes_under(folder: RemotePath) -> dict[str, int | None]:
    since, start = time.monotonic() - _LISTS_LATE_SECONDS, f"{folder.uri}/"
    return {
        uri.removeprefix(start): size
        for uri, (when, size) in list(_changes.items())
        if when >= since and uri.startswith(start)
    }


def _sizes_under(folder: Path | str, prefix: str = "") -> Iterator[tuple[str, int]]:
    # By names: a Path for each of a hundred thousand shards takes seconds.
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _sizes_under(entry.path, f"{prefix}{entry.name}/")
            elif entry.is_file():
                try:
                    size = entry.stat().st_size
                except FileNotFoundError:  # another thread has renamed a temporary file meanwhile
                    continue
                yield prefix + entry.name, size


def folders_in(folder: Location) -> list[Location]:
    """The folders right under `folder`, sorted by name; none where it is not there."""
    if isinstance(folder, Path):
        return sorted(path for path in folder.glob("*") if path.is_dir())
    from pyarrow.fs import FileSelector, FileType

    filesystem, path = _resolve(folder.uri)
    with naming_store(folder.uri):
        found = filesystem.get_file_info(FileSelector(path, allow_not_found=True))
    names = [info.base_name for info in found if info.type == FileType.Directory]
    return [folder / name for name in sorted(names)]


def size_of(path: Location) -> int:
    """Bytes of a file."""
    return path.stat().st_size if isinstance(path, Path) else int(path._info().size)


def changed_ns(path: Location) -> int:
    """When a file was last changed, in nanoseconds since the epoch."""
    return path.stat().st_mtime_ns if isinstance(path, Path) else int(path._info().mtime_ns or 0)


@contextmanager
def open_binary(path: Location, *, buffer_bytes: int = _BUFFER_BYTES) -> Iterator[IO[bytes]]:
    """A file for reading, at any place in it; a remote one is read in ranges, never as a whole."""
    if isinstance(path, Path):
        with open(path, "rb", buffering=buffer_bytes) as file:
            yield file
        return
    filesystem, inner = _resolve(path.uri)
    with naming_store(path.uri):
        raw = filesystem.open_input_file(inner)
    with io.BufferedReader(_NamedFile(raw, path.uri), buffer_bytes) as file:
        yield file


class _NamedFile(io.RawIOBase):
    """A file of pyarrow's whose errors name its URI."""

    def __init__(self, file: Any, uri: str) -> None:
        self._file, self._uri = file, uri

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with naming_store(self._uri):
            return int(self._file.readinto(buffer))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with naming_store(self._uri):
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def glob_files(pattern: str) -> list[str]:
    """URIs of the files that a URI with the wildcards * ? [...] ** matches, sorted."""
    from fsspec.utils import glob_translate

    if RemotePath(pattern).is_file():
        return [RemotePath(pattern).uri]
    fixed = re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]
    folder = RemotePath(fixed)
    wanted = re.compile(glob_translate(RemotePath(pattern).uri.removeprefix(f"{folder.uri}/")))
    return [f"{folder.uri}/{name}" for name in files_under(folder) if wanted.fullmatch(name)]


def remove(folder: Location, *, first: str | None = None) -> None:
    """Delete a folder, which need not be there, the file `first` before all others."""
    if first is not None:
        (folder / first).unlink(missing_ok=True)
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    _in_threads(lambda name: (folder / name).unlink(missing_ok=True), files_under(folder))
    filesystem, path = _resolve_to_write(folder.uri)
    if filesystem.type_name.startswith("py::"):  # fsspec ones may have folders without files
        with naming_store(folder.uri), contextlib.suppress(FileNotFoundError):
            filesystem.delete_dir(path)


def upload(source: Path, target: RemotePath, names: Iterable[str]) -> None:
    """Copy files, named relative to the two folders, several at a time."""
    _in_threads(lambda name: upload_file(source / name, target / name), names)


def upload_file(source: Path, target: RemotePath) -> None:
    filesystem, path = _resolve_to_write(target.uri)
    with naming_store(target.uri), open(source, "rb") as file:
        if filesystem.type_name.startswith("py::"):
            filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        with filesystem.open_output_stream(path, compression=None) as stream:
            shutil.copyfileobj(file, stream, _BUFFER_BYTES)
        _note_change(target.uri, os.fstat(file.fileno()).st_size)


@contextmanager
def guarded_writes(
    folder: RemotePath, *, but_to: Sequence[RemotePath], check: Callable[[], None]
) -> Iterator[None]:
    """In this block whatever in this process would write or delete under `folder`, or goes on with
    many files there, calls `check` first and gets what that raises; not under `but_to`.
    """
    _guards[folder.uri] = (tuple(f"{each.uri}/" for each in but_to), check)
    try:
        yield
    finally:
        _guards.pop(folder.uri, None)


def to_disk(path: Path) -> None:
    """Return once a file that was written is on the disk, where a power cut leaves it whole."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def cache_folder() -> Path:
    """Where this machine keeps copies of remote files, and `mirror_of` what is written beside
    them; it may be deleted when nothing runs, after the tracking store has everything.
    """
    named = os.environ.get(CACHE_VARIABLE)
    return local_path(named) if named else Path.home() / ".cache" / "tokendiff"


def has_copy(path: Location, *, sha256: str) -> bool:
    """Whether `local_copy` would copy nothing."""
    return isinstance(path, Path) or _copy_of(path, sha256).is_file()


def _copy_of(path: "RemotePath", sha256: str) -> Path:
    return cache_folder() / "files" / sha256[:2] / f"{sha256}{path.suffix}"


def fits_cache(num_bytes: int) -> bool:
    """Whether copies of so many bytes take no more than a quarter of the disk of the cache."""
    folder = cache_folder()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    return num_bytes <= shutil.disk_usage(there).total * _CACHED_PART_OF_DISK


def mirror_of(folder: Location) -> Path:
    """The folder itself; for a remote one, the local folder of what has to be on a disk: logs
    that are written to, locks, and what a tracking store has yet to get.
    """
    if isinstance(folder, Path):
        return folder
    scheme, _, rest = folder.uri.partition("://")
    return cache_folder() / "runs" / scheme / rest


def local_copy(path: Location, *, sha256: str) -> Path:
    """The file on this machine: itself, or a copy that is made once and checked.

    Raises:
        CorruptFileError: what is there has not the content that the hash names.
    """
    if isinstance(path, Path):
        return path
    from filelock import FileLock

    target = _copy_of(path, sha256)
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if not target.is_file():
            _download(path, target, sha256)
    return target


def local_folder(folder: Location, files: dict[str, dict[str, Any]], *, digest: str) -> Path:
    """A folder on this machine: itself, or a copy of its `files` that is made once and checked.

    Args:
        files: `{"sha256": hex}` by relative path, as in a manifest.
        digest: names the content of all of them.
    """
    if isinstance(folder, Path):
        return folder
    from filelock import FileLock

    # The last part keeps its name, which may mean something (checkpoint-400).
    target = cache_folder() / "folders" / digest / folder.name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / ".lock"):
        if not target.is_dir():
            temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
            try:
                _in_threads(
                    lambda name: _download(folder / name, temporary / name, files[name]["sha256"]),
                    files,
                )
                temporary.rename(target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return target


def _download(source: RemotePath, target: Path, sha256: str) -> None:
    import hashlib

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    digest = hashlib.sha256()
    try:
        with open_binary(source) as stream, open(temporary, "wb") as file:
            while block := stream.read(_BUFFER_BYTES):
                digest.update(block)
                with naming(target):
                    file.write(block)
        to_disk(temporary)
        if digest.hexdigest() != sha256:
            raise CorruptFileError(
                f"{source.parent}: {source.name} does not match its MANIFEST "
                f"(sha256 {digest.hexdigest()[:12]}..., expected {sha256[:12]}...)"
            )
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _in_threads(work: Any, names: Iterable[str]) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(work, names))


def _resolve(uri: str) -> tuple[Any, str]:
    """(pyarrow filesystem, path within it)."""
    scheme, _, rest = uri.partition("://")
    filesystem, prefix = _filesystem(scheme, rest.partition("/")[0], os.getpid())
    return filesystem, f"{prefix}{rest}"


def _resolve_to_write(uri: str) -> tuple[Any, str]:
    for folder, (but_to, check) in list(_guards.items()):
        if f"{uri}/".startswith(f"{folder}/") and not f"{uri}/".startswith(but_to):
            check()
    return _resolve(uri)


@functools.lru_cache(maxsize=64)
def _filesystem(scheme: str, bucket: str, pid: int) -> tuple[Any, str]:
    """(pyarrow filesystem of a bucket, what its paths begin with before bucket and key).

    Args:
        pid: a forked process makes its own: connections and threads do not survive a fork.
    """
    from pyarrow import fs

    try:
        if scheme in _ARROW_SCHEMES:
            options = "" if scheme == "s3" else _GOOGLE_OPTIONS
            filesystem, path = fs.FileSystem.from_uri(f"{scheme}://{bucket}{options}")
            return filesystem, path.removesuffix(bucket)
        import fsspec

        handler = fs.FSSpecHandler(fsspec.filesystem(scheme))
        return fs.PyFileSystem(handler), "/" if scheme == "memory" else ""
    except (ImportError, OSError, TypeError, ValueError) as error:
        # S3 is asked in which region the bucket lies.
        if isinstance(error, OSError) and is_store_down(error):
            raise ConnectionError(f"{scheme}://{bucket}: {words_of_store(error)}") from error
        raise InputError(
            f"{scheme}://{bucket}: cannot be opened ({str(error).split(chr(10))[0]}); s3:// and "
            "gs:// work out of the box, others need their fsspec package"
        ) from error


def is_of_store(error: BaseException) -> bool:
    """Whether an error says what became of a URI, as all do that a `RemotePath` raises."""
    return isinstance(error, OSError) and error.errno is None and bool(_URI.match(str(error)))
