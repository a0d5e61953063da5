"""The unit of preprocessing: what one task reads, as a function of the input alone."""

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of one input.

    Attributes:
        path: absolute path of a file, or a dataset's name.
        start, stop: bytes of a text file, row groups of a parquet file, rows of a dataset.
        num_bytes: how much text that is, about.
    """

    path: str
    start: int
    stop: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Neighbouring pieces that one task packs into one shard of each split.

    Attributes:
        index: place in the corpus; shards are named and rows numbered by it.
        is_new: whether it is trained on; the text of others gives held-out rows only.
        format: what reads the pieces: one of FILE_FORMATS, samples, datasets, builtin or dummy.
    """

    index: int
    format: str
    pieces: tuple[Piece, ...]
    text_column: str
    sample_by: str
    dataset_config_name: str | None
    dataset_split: str
    is_new: bool = True


def group_pieces(pieces: Iterable[Piece], max_bytes: int) -> list[tuple[Piece, ...]]:
    """Gather neighbours, in order, up to `max_bytes` a group; a larger piece is a group of its own.

    Pieces that continue one another become one, so that a group is small however fine they are.
    """
    groups: list[list[Piece]] = []
    size = 0
    for piece in pieces:
        if not groups or size + piece.num_bytes > max_bytes:
            groups.append([])
            size = 0
        group = groups[-1]
        size += piece.num_bytes
        if group and group[-1].path == piece.path and group[-1].stop == piece.start:
            joined_bytes = group[-1].num_bytes + piece.num_bytes
            group[-1] = replace(group[-1], stop=piece.stop, num_bytes=joined_bytes)
        else:
            group.append(piece)
    return [tuple(group) for group in groups]
