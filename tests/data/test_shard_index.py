"""Shards and row groups as arrays: those that the manifest names, in its new form and its old."""

import pickle

import numpy as np
import pytest

from tokendiff.artifacts.manifest import Manifest
from tokendiff.data.shard_index import ShardIndex

ROWS = {"train/a": [16, 16, 3], "train/b": [16], "train/c": [1], "train/d": [16, 16]}
FILES = {name: {"size": 7, "sha256": f"{i + 1:064x}"} for i, name in enumerate(ROWS)}
FORMS = {
    "new": {"row_group_rows": 16, "files": [{"path": p, "rows": sum(r)} for p, r in ROWS.items()]},
    "old": {"files": [{"path": path, "row_groups": rows} for path, rows in ROWS.items()]},
}


@pytest.mark.parametrize("form", FORMS)
def test_each_row_group_is_found_in_its_shard(form: str) -> None:
    manifest = Manifest(kind="tokens", files=FILES, metadata={"splits": {"train": FORMS[form]}})
    index = pickle.loads(pickle.dumps(ShardIndex.of(manifest, "train")))
    assert index.names == list(ROWS)
    assert index.row_group_sizes.tolist() == [rows for groups in ROWS.values() for rows in groups]
    assert index.row_group_sizes.dtype == np.int32
    assert index.num_bytes == 28
    places = [(path, place) for path, groups in ROWS.items() for place in range(len(groups))]
    for group, (path, place) in enumerate(places):
        assert index.find(group) == (path, FILES[path]["sha256"], place)


def test_a_shard_may_have_no_rows() -> None:
    files = [{"path": path, "rows": rows} for path, rows in zip(ROWS, (5, 0, 20, 0), strict=True)]
    splits = {"train": {"row_group_rows": 16, "files": files}}
    index = ShardIndex.of(
        Manifest(kind="tokens", files=FILES, metadata={"splits": splits}), "train"
    )
    assert index.row_group_sizes.tolist() == [5, 16, 4]
    assert [index.find(group)[0] for group in range(3)] == ["train/a", "train/c", "train/c"]


@pytest.mark.parametrize("splits", [{}, {"heldout": {"rows": 0, "files": []}}])
def test_a_split_may_be_empty(splits: dict[str, object]) -> None:
    index = ShardIndex.of(Manifest(kind="tokens", metadata={"splits": splits}), "heldout")
    assert index.names == []
    assert index.row_group_sizes.tolist() == []
