"""Small things that tests are made of: a tokenizer, packed shards, a model; all made here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokendiff.manifest import commit, is_committed


def letter_tokenizer(size: int = 16) -> Any:
    """[PAD] [MASK] [EOS] [UNK] and one token per letter, split character by character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[MASK]", "[EOS]", "[UNK]"]
    letters = [chr(ord("a") + index) for index in range(size - len(specials))]
    vocabulary = {token: index for index, token in enumerate(specials + letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        mask_token="[MASK]",
        eos_token="[EOS]",
        unk_token="[UNK]",
    )


def token_folder(
    folder: Path,
    *,
    files: Sequence[Sequence[Sequence[int]]],
    max_length: int,
    tokenizer: Any,
    heldout: Sequence[Sequence[int]] = (),
    row_group_rows: int = 16,
) -> Path:
    """A committed folder in the layout of jobs.preprocess, without running it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    splits: dict[str, Any] = {}
    for split, parts in (("train", files), ("heldout", [heldout] if heldout else [])):
        (folder / split).mkdir(parents=True)
        entries = []
        for part, rows in enumerate(parts):
            name = f"{split}/part-{part:05d}.parquet"
            first = (part << 32) + ((1 << 62) if split == "heldout" else 0)
            table = pa.table(
                {
                    "row_id": pa.array(range(first, first + len(rows)), pa.int64()),
                    "tokens": pa.array(rows, pa.list_(pa.int32())),
                    "document_lengths": pa.array(
                        [[len(row)] for row in rows], pa.list_(pa.int32())
                    ),
                    "num_bytes": pa.array([len(row) for row in rows], pa.int32()),
                }
            )
            pq.write_table(
                table, folder / name, row_group_size=row_group_rows, write_page_checksum=True
            )
            groups = [
                min(row_group_rows, len(rows) - at) for at in range(0, len(rows), row_group_rows)
            ]
            entries.append({"path": name, "row_groups": groups})
        splits[split] = {"rows": sum(map(len, parts)), "files": entries}
    tokenizer.save_pretrained(folder / "tokenizer")
    commit(folder, kind="tokens", metadata={"max_length": max_length, "splits": splits})
    assert is_committed(folder)
    return folder


def random_rows(count: int, length: int, *, vocab_size: int = 16, seed: int = 0) -> list[list[int]]:
    """Rows of a noisy cycle over the letters, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, vocab_size - 4, size=(count, 1))
    jumps = (rng.random((count, length)) < 0.1).cumsum(1)
    return (4 + (start + np.arange(length) + 3 * jumps) % (vocab_size - 4)).tolist()


class TableDenoiser:
    """The exact x_theta of an enumerated language, in the two parts that samplers and losses call.

    Hidden states are ln p(x_0^i = v | what is unmasked), so `head` is the identity.

    Args:
        probabilities: [V] * L table of a language of L tokens over V ids, the mask id among them
            at probability 0.
    """

    def __init__(self, probabilities: Tensor, mask_token_id: int) -> None:
        self.probabilities = probabilities.double()
        self.mask_token_id = mask_token_id
        self.num_encoded_rows = 0

    def encode(self, tokens: Tensor, is_valid: Tensor) -> Tensor:
        self.num_encoded_rows += len(tokens)
        return torch.stack([self._row(row) for row in tokens.tolist()])

    def head(self, hidden: Tensor) -> Tensor:
        return hidden

    def _row(self, row: list[int]) -> Tensor:
        table = self.probabilities
        for axis, token in enumerate(row):
            if token != self.mask_token_id:
                kept = torch.zeros(table.shape[axis], dtype=torch.float64)
                kept[token] = 1.0
                shape = [1] * table.ndim
                shape[axis] = -1
                table = table * kept.view(shape)
        marginals = [
            table.sum([other for other in range(table.ndim) if other != axis])
            for axis in range(table.ndim)
        ]
        return torch.stack([(marginal / marginal.sum()).log() for marginal in marginals])
