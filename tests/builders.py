"""Small things that tests are made of: a tokenizer, packed shards, a model; all made here."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tokendiff.artifacts.manifest import commit, is_committed
from tokendiff.diffusion.kernels import ForwardKernel

if TYPE_CHECKING:
    from tokendiff.config.generate import GenerateConfig
    from tokendiff.data.prompts import GenerationRow


def objective_configs() -> list[Any]:
    """The config class of every objective there is."""
    from tokendiff.config.loader import models_in
    from tokendiff.config.train import TrainConfig

    return list(models_in(TrainConfig.model_fields["objective"].annotation))


def objective_names() -> list[str]:
    return [model.model_fields["name"].default for model in objective_configs()]


def load_model(
    model: type[Any], path: Path | None, overrides: Sequence[str] = (), flags: Any = None
) -> Any:
    """`load_config` for a config of another class."""
    from tokendiff.config import loader

    return loader._load(model, path, overrides, flags)[1]


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
    runs_of: Callable[[Sequence[int]], list[int]] = lambda row: [len(row)],
) -> Path:
    """A committed folder in the layout of jobs.preprocess, without running it.

    Args:
        runs_of: lengths of the documents in a row; by default a row is one.
    """
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
                        [runs_of(row) for row in rows], pa.list_(pa.int32())
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


def save_ref(repository: Path, ref: str, commit: str) -> None:
    """Let a branch or tag stand for a commit, in the cache that the client of a hub keeps."""
    path = repository / "refs" / ref
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(commit)


class TableDenoiser:
    """The exact x_theta of an enumerated language under masking, in the two parts that samplers and
    losses call.

    Hidden states are ln p(x_0^i = v | what is unmasked), so `head` is the identity.

    Args:
        probabilities: [V] * L table of a language of L tokens over V ids, the mask id among them
            at probability 0.
    """

    is_time_conditioned = False

    def __init__(self, probabilities: Tensor, mask_token_id: int) -> None:
        self.probabilities = probabilities.double()
        self.mask_token_id = mask_token_id
        self.num_encoded_rows = 0
        self._known_rows: dict[tuple[int, ...], Tensor] = {}

    def encode(
        self, tokens: Tensor, is_valid: Tensor, time: Tensor, document: Tensor | None = None
    ) -> Tensor:
        self.num_encoded_rows += len(tokens)
        return torch.stack([self._row(tuple(row)) for row in tokens.tolist()])

    def head(self, hidden: Tensor) -> Tensor:
        return hidden

    def _row(self, row: tuple[int, ...]) -> Tensor:
        if row not in self._known_rows:
            self._known_rows[row] = self._marginals(row)
        return self._known_rows[row]

    def _marginals(self, row: tuple[int, ...]) -> Tensor:
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


class ExactDenoiser:
    """The exact x_theta of an enumerated language under any noise, at any time.

    Hidden states are ln p(x_0^i = v | x_t without position i), or, as a posterior,
    ln p(x_0^i = v | x_t); `head` is the identity.

    Args:
        probabilities: [V] * L table of a language of L tokens over V ids.
        noising: from a time to the [V, V] table q_t(z | x), x the row and z the column.
        prediction: loo | posterior.
    """

    is_time_conditioned = True

    def __init__(
        self,
        probabilities: np.ndarray,
        noising: Callable[[float], np.ndarray],
        *,
        prediction: str = "loo",
    ) -> None:
        self.probabilities = probabilities
        self.noising = noising
        self.is_posterior = prediction == "posterior"
        self._tables: dict[float, Tensor] = {}

    def encode(
        self, tokens: Tensor, is_valid: Tensor, time: Tensor, document: Tensor | None = None
    ) -> Tensor:
        hidden = torch.empty(*tokens.shape, self.probabilities.shape[0], dtype=torch.float64)
        for t in time.unique().tolist():
            if t not in self._tables:
                self._tables[t] = self._table(t)
            rows = time == t
            hidden[rows] = self._tables[t][tuple(tokens[rows].unbind(1))]
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        return hidden

    def _table(self, t: float) -> Tensor:
        """[V] * L + [L, V]: the hidden states of every row that there is."""
        q, table = self.noising(t), self.probabilities
        length, size = table.ndim, table.shape[0]
        result = np.empty((*table.shape, length, size))
        for row in np.ndindex(*table.shape):
            for position in range(length):
                joint = table
                for other in range(length):
                    if other != position or self.is_posterior:
                        shape = [1] * length
                        shape[other] = -1
                        joint = joint * q[:, row[other]].reshape(shape)
                others = tuple(other for other in range(length) if other != position)
                result[(*row, position)] = joint.sum(axis=others)
        # Rows that cannot occur have no distribution; any will do.
        total = result.sum(-1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            return torch.from_numpy(np.log(np.where(total > 0, result / total, 1 / size)))


class PairDenoiser:
    """`ExactDenoiser` of a language of two tokens, for many rows at many times at once.

    Args:
        probabilities: [V, V].
        kernel: whose q_t(z | x) the noise follows.
        prediction: loo | posterior.
    """

    is_time_conditioned = True

    def __init__(
        self, probabilities: np.ndarray, kernel: ForwardKernel, *, prediction: str = "loo"
    ) -> None:
        self.table = torch.tensor(probabilities, dtype=torch.float64)
        self.kernel = kernel
        self.is_posterior = prediction == "posterior"

    def encode(
        self, tokens: Tensor, is_valid: Tensor, time: Tensor, document: Tensor | None = None
    ) -> Tensor:
        one_hot = torch.eye(len(self.table), dtype=torch.float64).expand(len(tokens), -1, -1)
        q = self.kernel.marginal(one_hot, time)
        first, second = (
            q.gather(2, z[:, None, None].expand(-1, q.shape[1], 1))[..., 0] for z in tokens.T
        )
        beliefs = [second @ self.table.T, first @ self.table]
        if self.is_posterior:
            beliefs = [beliefs[0] * first, beliefs[1] * second]
        return torch.stack(beliefs, dim=1).log()

    def head(self, hidden: Tensor) -> Tensor:
        return hidden


class AnswerDenoiser:
    """The exact x_theta of the first and the last of three tokens under any noise, the one between
    them being given.

    Args:
        probabilities: [V, V, V].
        kernel: whose q_t(z | x) the noise of the two follows.
    """

    is_time_conditioned = True

    def __init__(self, probabilities: np.ndarray, kernel: ForwardKernel) -> None:
        self.table = torch.tensor(probabilities, dtype=torch.float64)
        self.kernel = kernel

    def encode(
        self, tokens: Tensor, is_valid: Tensor, time: Tensor, document: Tensor | None = None
    ) -> Tensor:
        one_hot = torch.eye(len(self.table), dtype=torch.float64).expand(len(tokens), -1, -1)
        q = self.kernel.marginal(one_hot, time)
        first, last = (
            q.gather(2, tokens[:, at, None, None].expand(-1, q.shape[1], 1))[..., 0]
            for at in (0, 2)
        )
        given = self.table[:, tokens[:, 1]].transpose(0, 1)  # [B, V, V]
        beliefs = [
            torch.einsum("bij,bj->bi", given, last),
            torch.einsum("bij,bi->bj", given, first),
        ]
        beliefs = [belief / belief.sum(-1, keepdim=True) for belief in beliefs]
        # Of what is given nobody asks.
        nothing = torch.full_like(beliefs[0], torch.nan)
        return torch.stack([beliefs[0], nothing, beliefs[1]], dim=1).log()

    def head(self, hidden: Tensor) -> Tensor:
        return hidden


def tiny_causal(
    model_type: str = "qwen3", *, vocab_size: int = 48, seed: int = 0, **changes: Any
) -> Any:
    """A transformers causal LM with new weights, large enough that its greedy text is not one token
    over and over; float64, in eval mode.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.4,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if model_type in ("qwen3", "gemma2"):
        fields["head_dim"] = 8
    if model_type == "gpt2":  # other names for the same, and no others
        names = ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id")
        fields = {name: fields[name] for name in names}
        fields |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    config = AutoConfig.for_model(model_type, **{**fields, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()


def generation_rows(config: "GenerateConfig") -> "list[GenerationRow]":
    """All rows of a config. Raises InputError where a prompt is none."""
    from tokendiff.data.prompt_index import PromptIndex

    index = PromptIndex.of(config)
    rows = []
    for item in index.rows(0, index.num_rows):
        if item.error is not None:
            raise item.error
        rows.append(item.row)
    return rows
