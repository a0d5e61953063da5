"""Which shards a split of token data has and which row groups are in them, as arrays: of ten
million row groups the rows of each are 40 MB, which processes of one node share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokendiff.artifacts.manifest import Manifest

_DIGEST_BYTES = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardIndex:
    """
    Attributes:
        paths: [shards] bytes, relative to the folder of the data.
        digests: [shards, 32] uint8, sha256.
        group_stops: [shards] int64, row groups of the shards up to this one.
        row_group_sizes: [row groups] int32, rows of each, in the order of the shards.
        num_bytes: of all shards.
    """

    paths: np.ndarray
    digests: np.ndarray
    group_stops: np.ndarray
    row_group_sizes: np.ndarray
    num_bytes: int

    @classmethod
    def of(cls, manifest: Manifest, split: str) -> "ShardIndex":
        found = manifest.metadata["splits"].get(split, {})
        files: Sequence[Mapping[str, Any]] = found.get("files", [])
        paths = [file["path"] for file in files]
        digests = b"".join(bytes.fromhex(manifest.files[path]["sha256"]) for path in paths)
        counts, sizes = _row_groups(files, found.get("row_group_rows"))
        return cls(
            paths=np.asarray([path.encode() for path in paths], dtype=np.bytes_),
            digests=np.frombuffer(digests, dtype=np.uint8).reshape(-1, _DIGEST_BYTES),
            group_stops=np.cumsum(counts, dtype=np.int64),
            row_group_sizes=sizes,
            num_bytes=sum(manifest.files[path]["size"] for path in paths),
        )

    @property
    def names(self) -> list[str]:
        return [path.decode() for path in self.paths.tolist()]

    def find(self, group: int) -> tuple[str, str, int]:
        """Path and sha256 of the shard that holds a row group, and which of its own that is."""
        shard = int(np.searchsorted(self.group_stops, group, side="right"))
        first = int(self.group_stops[shard - 1]) if shard else 0
        return self.paths[shard].decode(), self.digests[shard].tobytes().hex(), group - first


def _row_groups(
    files: Sequence[Mapping[str, Any]], row_group_rows: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Row groups of each shard, and the rows of each of them.

    Args:
        files: each with its `rows`, or as manifests had it once with those of its `row_groups`.
        row_group_rows: rows of a full one, as all of a shard are but the last.
    """
    if row_group_rows is None:
        counts = [len(file["row_groups"]) for file in files]
        sizes = [rows for file in files for rows in file["row_groups"]]
        return np.asarray(counts, dtype=np.int64), np.asarray(sizes, dtype=np.int32)
    rows = np.asarray([file["rows"] for file in files], dtype=np.int64)
    counts_of_full = -(-rows // row_group_rows)
    of_all = np.full(int(counts_of_full.sum()), row_group_rows, dtype=np.int32)
    rest = rows - (counts_of_full - 1) * row_group_rows
    has_rows = rows > 0
    of_all[(np.cumsum(counts_of_full) - 1)[has_rows]] = rest[has_rows]
    return counts_of_full, of_all
