"""The unit of preprocessing: what one task reads, as a function of the input alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of one input.

    Attributes:
        path: absolute path of a file, or a dataset's name.
        commit: of a dataset of the hub, which all tasks are to read.
        start, stop: bytes of a text file, row groups of a parquet file, rows of a dataset.
        num_bytes: how much text that is, about.
    """

    path: str
    start: int
    stop: int
    num_bytes: int
    commit: str | None = None


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Neighbouring pieces that one task packs into one shard of each split.

    Attributes:
        index: place in the corpus; shards are named and rows numbered by it.
        is_new: whether it is trained on; the text of others gives held-out rows only.
        format: what reads the pieces: one of FILE_FORMATS, samples, datasets, builtin or dummy.
        dataset_format: what their rows are: text, or one of `tokendiff.data.chats.FORMATS`.
    """

    index: int
    format: str
    pieces: tuple[Piece, ...]
    text_column: str
    sample_by: str
    dataset_config_name: str | None
    dataset_split: str
    is_new: bool = True
    dataset_format: str = "text"


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


def even_pieces(pieces: Iterable[Piece], max_bytes: int) -> list[Piece]:
    """Pieces in order, those of every file that takes several partitions cut anew into as few
    parts of one size as `max_bytes` allows: full ones and a rest would keep one core busy and leave
    the others waiting.
    """
    even: list[Piece] = []
    for path, neighbours in groupby(pieces, key=lambda piece: piece.path):
        of_file = list(neighbours)
        num_parts = -(-sum(piece.num_bytes for piece in of_file) // max_bytes)
        # What is no file has no path, and one that cannot be cut is a single piece.
        if not path or len(of_file) == 1 or num_parts <= 1:
            even += of_file
        elif all(piece.stop == piece.start + 1 for piece in of_file):
            even += _equal_runs(of_file, max_bytes)
        else:
            even += _equal_cuts(of_file, num_parts)
    return even


def _equal_cuts(of_file: Sequence[Piece], num_parts: int) -> list[Piece]:
    """A file that may be cut anywhere."""
    whole = _joined(of_file)
    length = whole.stop - whole.start
    cuts = sorted({whole.start + length * part // num_parts for part in range(num_parts + 1)})
    return [
        replace(whole, start=start, stop=stop, num_bytes=whole.num_bytes * (stop - start) // length)
        for start, stop in pairwise(cuts)
    ]


def _equal_runs(of_file: Sequence[Piece], max_bytes: int) -> list[Piece]:
    """A file whose pieces, say row groups, stay whole: as few runs as `max_bytes` allows, the
    largest of them as small as that number allows.
    """
    num_runs = len(group_pieces(of_file, max_bytes))
    largest = max(piece.num_bytes for piece in of_file)
    low, high = largest, max(max_bytes, largest)
    while low < high:
        middle = (low + high) // 2
        if len(group_pieces(of_file, middle)) <= num_runs:
            high = middle
        else:
            low = middle + 1
    return [_joined(run) for run in group_pieces(of_file, low)]


def _joined(neighbours: Sequence[Piece]) -> Piece:
    num_bytes = sum(piece.num_bytes for piece in neighbours)
    return replace(neighbours[0], stop=neighbours[-1].stop, num_bytes=num_bytes)
