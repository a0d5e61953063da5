"""Models, rows and requests. On a card they have the sizes of published models; on a CPU they are
so small that all of it takes seconds, and their speed says nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.machine import Machine
from benchmarks.recorded_passes import OperationRecorder
from tokendiff.diffusion.interfaces import Request, TokenBatch
from tokendiff.models.causal import CausalModel
from tokendiff.models.causal_denoiser import TransformersCausalDenoiser
from tokendiff.models.cuda_graphs import Recorder
from tokendiff.models.denoiser import TransformersDenoiser, attend_both_ways
from tokendiff.models.dflash.decoder import DraftedModel
from tokendiff.models.dflash.model import DFlashDraftModel
from tokendiff.models.dflash.planning import new_draft_config

MASK, EOS = 3, 2  # ids, in every model here


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a model of the layout of Qwen3.

    Attributes:
        spread: standard deviation of the first weights; None is Qwen3's own.
    """

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    spread: float | None = None

    def config(self) -> Any:
        from transformers import Qwen3Config

        fields = {name: value for name, value in vars(self).items() if name not in _NOT_FIELDS}
        if self.spread is not None:
            fields["initializer_range"] = self.spread
        return Qwen3Config(
            **fields,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )


_NOT_FIELDS = ("name", "spread")
# The published shapes.
QWEN3_06B = Shape(
    name="Qwen3-0.6B",
    vocab_size=151_936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
)
QWEN3_17B = replace(QWEN3_06B, name="Qwen3-1.7B", hidden_size=2048, intermediate_size=6144)
# Of BERT-base's width, with gated layers.
BERT_BASE = Shape(
    name="BERT-base",
    vocab_size=30_522,
    hidden_size=768,
    intermediate_size=1536,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=12,
    head_dim=64,
)
# What is proven is proven with this one, on a card too: large enough that greedy text is not one
# token over and over, small enough for a reference in float64 on the CPU.
PROVEN = Shape(
    name="small",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    spread=0.3,
)
# On a CPU in place of the published ones.
TOY = replace(PROVEN, name="toy", vocab_size=256, spread=None)


def published(machine: Machine) -> tuple[Shape, ...]:
    return (QWEN3_06B, QWEN3_17B) if machine.is_cuda else (TOY,)


def causal_lm(shape: Shape, device: Any, dtype: torch.dtype, *, both_ways: bool = False) -> Any:
    """A transformers model with new weights, made where it will be. They are those of the CPU on
    every device for what is proven, so that devices can be compared.
    """
    from transformers import AutoModelForCausalLM

    config = shape.config()
    if both_ways:
        attend_both_ways(config)
    where, first = _first(shape, device, dtype)
    with _drawn(where, seed=0):
        model = AutoModelForCausalLM.from_config(config, dtype=first)
    return model.to(device=device, dtype=dtype).eval()


@contextmanager
def _drawn(where: torch.device, *, seed: int) -> Iterator[None]:
    """In this block weights are made there from the seed, and other draws stay what they were."""
    with torch.random.fork_rng(devices=[]), where:
        torch.manual_seed(seed)
        yield


def _first(shape: Shape, device: Any, dtype: torch.dtype) -> tuple[torch.device, torch.dtype]:
    """Where, and in which dtype, the weights of a model are drawn."""
    is_proven = shape is PROVEN
    return torch.device("cpu" if is_proven else device), torch.float32 if is_proven else dtype


def whole_row_denoiser(shape: Shape, device: Any, dtype: torch.dtype) -> TransformersDenoiser:
    model = causal_lm(shape, device, dtype, both_ways=True)
    return TransformersDenoiser(model, vocab_size=shape.vocab_size)


def encoder(shape: Shape, device: Any, dtype: torch.dtype) -> TransformersDenoiser:
    """Of ModernBERT's layers."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    names = ("vocab_size", "hidden_size", "intermediate_size")
    config = ModernBertConfig(
        **{name: getattr(shape, name) for name in names},
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        max_position_embeddings=512,
        layer_types=["full_attention"] * shape.num_hidden_layers,
        pad_token_id=0,
        eos_token_id=EOS,
        bos_token_id=1,
        cls_token_id=1,
        sep_token_id=EOS,
    )
    with _drawn(torch.device(device), seed=0):
        model: Any = ModernBertForMaskedLM(config)
    return TransformersDenoiser(model.to(dtype), vocab_size=shape.vocab_size)


def causal_denoiser(
    shape: Shape, device: Any, dtype: torch.dtype, **options: Any
) -> TransformersCausalDenoiser:
    model = causal_lm(shape, device, dtype)
    return TransformersCausalDenoiser(model, vocab_size=shape.vocab_size, **options)


def decoder(shape: Shape, device: Any, dtype: torch.dtype) -> CausalModel:
    return CausalModel(causal_lm(shape, device, dtype), vocab_size=shape.vocab_size)


def replay_passes(model: Any, machine: Machine) -> Recorder:
    """Let a decoder or a denoiser replay its passes: CUDA graphs on a card."""
    recorder = Recorder.on(machine.device) or OperationRecorder()
    getattr(model, "target", model).replay_by(recorder)
    return recorder


def new_draft(shape: Shape, device: Any, dtype: torch.dtype, *, block_size: int) -> Any:
    """A draft of as many layers as it reads, two where the target is small."""
    config = new_draft_config(
        shape.config(),
        target_model_id=shape.name,
        num_layers=1 if shape.num_hidden_layers < 8 else 5,
        block_size=block_size,
        mask_token_id=MASK,
    )
    with _drawn(_first(shape, device, dtype)[0], seed=1):
        draft: Any = DFlashDraftModel(config)
    return draft.to(device=device, dtype=dtype).eval()


def drafted(target: CausalModel, shape: Shape, *, block_size: int = 8) -> DraftedModel:
    dtype = target.model.dtype
    draft = new_draft(shape, target.device, dtype, block_size=block_size)
    return DraftedModel(target, draft)


def batch_of(
    num_rows: int, length: int, vocab_size: int, *, is_packed: bool, device: Any = "cpu"
) -> TokenBatch:
    """Rows of random tokens without the mask. Packed ones hold three documents, of which the last
    ends before the row does, but in the first row.
    """
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(MASK + 1, vocab_size, (num_rows, length), generator=generator)
    is_start = torch.zeros(num_rows, length, dtype=torch.bool)
    is_start[:, 0] = True
    lengths = torch.full((num_rows,), length)
    if is_packed:
        for row in range(num_rows):
            is_start[row, length // 4 + row] = True
            is_start[row, length // 2 + 2 * row] = True
        lengths[1:] = length - 3
    columns = (x.to(device) for x in (tokens, lengths, is_start))
    return TokenBatch.of_rows(*columns, isolates_documents=is_packed)


def requests_of(lengths: list[int], vocab_size: int) -> list[Request]:
    """A prompt of random tokens for each length."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for row, length in enumerate(lengths):
        ids: Tensor = torch.randint(MASK + 1, vocab_size, (length,), generator=generator)
        found.append(Request(id=row, prompt=tuple(ids.tolist())))
    return found
