"""The tokens of each sampler on the device, against those of the same keys in float64 on the CPU.

Where two candidates are nearly alike, rounding decides. A row that differs is a tie if the
reference itself, with each of its logits moved by a tenth of a thousandth of their spread, writes
something else in that row; ties are counted and excused. Else the row is wrong.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers.utils import import_utils

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.mathematics import kernel_of
from benchmarks.gpu.models import (
    MASK,
    PROVEN,
    decoder,
    drafted,
    replay_passes,
    requests_of,
    whole_row_denoiser,
)
from benchmarks.gpu.report import FAILS, HOLDS, Case, Finding
from tokendiff.diffusion.random import RowGenerator
from tokendiff.models import cuda_graphs, ragged_cache
from tokendiff.samplers.ancestral import AncestralSampler
from tokendiff.samplers.autoregressive import AutoregressiveSampler
from tokendiff.samplers.block_refinement import BlockRefinementSampler
from tokendiff.samplers.blockwise import BlockwiseSampler
from tokendiff.samplers.dflash import DFlashSampler
from tokendiff.samplers.first_hitting import FirstHittingSampler
from tokendiff.samplers.remasking import RemaskingSampler
from tokendiff.samplers.sdar import SDARSampler
from tokendiff.samplers.self_speculation import SelfSpeculationSampler

_MOVED = 1e-4  # of the spread of logits
_TRIES = 8  # with other numbers each: a row that is a tie shows it in one of them
_MOST_TIES = 0.25  # of the rows, or too little was compared
_NUM_ROWS, _LENGTH, _NEW = 8, 24, 16
_MOST_BF16_ERROR = 0.05

Texts = list[list[int]]

_STEPS: dict[str, Any] = {"num_inference_steps": 12}
# Of rows of one length, by name; each begins with a prompt.
FIXED: dict[str, Any] = {
    "ancestral, masks": AncestralSampler(kernel=kernel_of("mdlm"), **_STEPS),
    "ancestral, uniform noise": AncestralSampler(kernel=kernel_of("udlm"), **_STEPS),
    "ancestral, hybrid noise": AncestralSampler(kernel=kernel_of("hybrid"), top_p=0.9, **_STEPS),
    "blockwise": BlockwiseSampler(kernel=kernel_of("mdlm"), block_size=8, num_inference_steps=4),
    "blockwise, low confidence, cached": BlockwiseSampler(
        kernel=kernel_of("mdlm"),
        block_size=8,
        num_inference_steps=4,
        remasking_strategy="low_confidence_static",
        cache="dual",
    ),
    "remdm": RemaskingSampler(kernel=kernel_of("mdlm"), eta=0.2, **_STEPS),
    "first_hitting": FirstHittingSampler(kernel=kernel_of("mdlm")),
}
_BLOCKS: dict[str, Any] = {"mask_token_id": MASK, "block_length": 4, "max_new_tokens": _NEW}
# Those that continue prompts.
OPEN_ENDED: dict[str, Any] = {
    "ar": AutoregressiveSampler(max_new_tokens=_NEW),
    "ar, greedy": AutoregressiveSampler(max_new_tokens=_NEW, temperature=0.0),
    "sdar": SDARSampler(confidence_threshold=0.3, **_BLOCKS),
    "sdar, greedy": SDARSampler(
        temperature=0.0, remasking_strategy="low_confidence_static", **_BLOCKS
    ),
    "block_refinement, 2d": BlockRefinementSampler(threshold=0.3, top_k=20, **_BLOCKS),
    "block_refinement, 4d": BlockRefinementSampler(
        attention_mask_mode="4d", threshold=0.3, editing_threshold=0.3, max_post_steps=3, **_BLOCKS
    ),
    "self_speculation": SelfSpeculationSampler(**_BLOCKS),
    "dflash": DFlashSampler(max_new_tokens=_NEW),
}


def cases(machine: Machine) -> Iterator[Case]:
    texts_of = {
        **{name: partial(_fixed, sampler) for name, sampler in FIXED.items()},
        **{name: partial(_open_ended, sampler) for name, sampler in OPEN_ENDED.items()},
    }
    for name, texts in texts_of.items():
        yield Case(
            name=f"tokens of {name}",
            compared="the same keys in float64 on the CPU",
            run=partial(_same_as_reference, texts, machine.device),
            is_proof=True,
        )
    for name, sampler in {**FIXED, **OPEN_ENDED}.items():
        yield Case(
            name=f"tokens of {name}, passes replayed",
            compared="the same keys in float64 on the CPU, no pass replayed",
            run=partial(_replayed, sampler, machine),
            is_proof=True,
        )
    for name in ("ar", "sdar", "dflash"):
        yield Case(
            name=f"tokens of {name}, passes replayed while the cache grows",
            compared="the same keys in float64 on the CPU, no pass replayed",
            run=partial(_replayed, OPEN_ENDED[name], machine, growth=8),
            is_proof=True,
        )
    yield Case(
        name="hidden states under bf16 autocast, passes replayed",
        compared="the same passes, not replayed",
        run=partial(_replayed_under_autocast, machine),
        is_proof=True,
    )
    for name in ("dflash", "self_speculation"):
        yield Case(
            name=f"greedy text of {name}",
            compared="ar on the device",
            run=partial(_as_ar, name, machine.device),
            is_proof=True,
        )
    for where, asks in (("", lambda: True), (" in the midst of it", _is_recording)):
        yield Case(
            name=f"tokens of ar where recording a pass fails{where}",
            compared="the same keys, nothing recorded; memory can be given back",
            run=partial(_not_recorded, machine, asks),
            is_proof=True,
        )


# (device, dtype, what moves the logits) -> the text of each row.
_TextsOf = Callable[[Any, torch.dtype, "Moved | None"], Texts]


class Moved:
    """Adds numbers of a size to logits, the same in each run with one seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def around(self, head: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def moved(hidden: Tensor) -> Tensor:
            logits = head(hidden)
            noise = torch.randn(logits.shape, generator=self._generator, dtype=torch.float64)
            return logits + _MOVED * float(logits.std()) * noise.to(logits)

        return moved


def compared(ours: Texts, expected: Texts, moved: Callable[[int], Texts]) -> Finding:
    """How many rows of texts differ, ties apart.

    Args:
        moved: the reference with its logits moved, by a seed.
    """
    differing = {row for row, text in enumerate(expected) if ours[row] != text}
    ties: set[int] = set()
    for seed in range(_TRIES):
        if differing <= ties:
            break
        texts = moved(seed)
        ties |= {row for row in differing if texts[row] != expected[row]}
    wrong, count = len(differing - ties), len(expected)
    is_enough = len(ties) <= _MOST_TIES * count
    return Finding(
        figure=f"{wrong} of {count} rows differ, {len(ties)} ties beside",
        limit="0 rows",
        verdict=HOLDS if wrong == 0 and is_enough else FAILS,
        values={"wrong": wrong, "ties": len(ties), "rows": count},
    )


def _same_as_reference(texts_of: _TextsOf, device: torch.device) -> Finding:
    expected = texts_of("cpu", torch.float64, None)
    ours = texts_of(device, torch.float32, None)
    return compared(ours, expected, lambda seed: texts_of("cpu", torch.float64, Moved(seed)))


def _replayed(sampler: Any, machine: Machine, *, growth: int | None = None) -> Finding:
    """Twice, so that caches have come and gone.

    Args:
        growth: tokens that a cache grows by, fewer than the texts have.
    """
    is_fixed = sampler in FIXED.values()
    texts_of = partial(_fixed if is_fixed else _open_ended, sampler)
    new = partial(whole_row_denoiser, PROVEN) if is_fixed else partial(decoder_for, sampler)
    model = new(machine.device, torch.float32)
    recorder = replay_passes(model, machine)
    expected = texts_of("cpu", torch.float64, None)
    with (
        mock.patch.object(cuda_graphs, "RECORDED_AT", 2),  # texts are short
        mock.patch.object(cuda_graphs, "_MOST_RECORDINGS", 4),  # so that some make room
        mock.patch.object(ragged_cache, "_GROWTH", growth or ragged_cache._GROWTH),
    ):
        ours = [(rows_by if is_fixed else completions_by)(sampler, model) for _ in range(2)]
    found = compared(
        ours[0] + ours[1],
        2 * expected,
        lambda seed: 2 * texts_of("cpu", torch.float64, Moved(seed)),
    )
    if recorder.is_working and recorder.num_recorded:
        return replace(found, figure=f"{found.figure}; {recorder.num_recorded} passes recorded")
    return replace(found, figure=f"{found.figure}; no pass could be recorded", verdict=FAILS)


@torch.no_grad()
def _replayed_under_autocast(machine: Machine) -> Finding:
    plain, model = (whole_row_denoiser(PROVEN, machine.device, torch.float32) for _ in range(2))
    recorder = replay_passes(model, machine)
    generator, error = torch.Generator().manual_seed(6), 0.0
    for _ in range(3 * cuda_graphs.RECORDED_AT):
        tokens = torch.randint(MASK + 1, PROVEN.vocab_size, (4, _LENGTH), generator=generator)
        given = (tokens, torch.ones_like(tokens).bool(), torch.zeros(4))
        with torch.autocast(machine.device.type, torch.bfloat16):
            expected, found = plain.encode(*given).float(), model.encode(*given).float()
        distance = (found - expected).square().mean(-1).sqrt().max()  # of the states of a position
        error = max(error, float(distance / expected.std()))
    holds = recorder.is_working and recorder.num_recorded == 1 and error <= _MOST_BF16_ERROR
    return Finding(
        figure=f"{error:.1e} of their spread; {recorder.num_recorded} passes recorded",
        limit=f"{_MOST_BF16_ERROR:.0e}",
        verdict=HOLDS if holds else FAILS,
        values={"error": error},
    )


def _is_recording() -> bool:
    return import_utils.is_cuda_stream_capturing()


def _not_recorded(machine: Machine, asks: Callable[[], bool]) -> Finding:
    """A model that asks the device for a number where `asks` says so."""
    sampler = OPEN_ENDED["ar"]
    expected = completions_by(sampler, decoder_for(sampler, machine.device, torch.float32))
    model = decoder_for(sampler, machine.device, torch.float32)
    recorder = replay_passes(model, machine)
    first = model.model.get_input_embeddings()

    def ask(module: Any, given: Any, found: Tensor) -> Tensor:
        return found + 0 * int(given[0].sum()) if asks() else found

    first.register_forward_hook(ask)
    stream = torch.cuda.current_stream(machine.device) if machine.is_cuda else None
    ours = completions_by(sampler, model)
    is_as_before = not machine.is_cuda or torch.cuda.current_stream(machine.device) == stream
    machine.forget()
    wrong = sum(one != other for one, other in zip(ours, expected, strict=True))
    holds = wrong == 0 and is_as_before and not recorder.is_working
    return Finding(
        figure=f"{wrong} of {len(ours)} rows differ, {recorder.num_recorded} passes recorded",
        limit="0 rows",
        verdict=HOLDS if holds else FAILS,
    )


def _as_ar(name: str, device: torch.device) -> Finding:
    greedy = AutoregressiveSampler(max_new_tokens=_NEW, temperature=0.0)
    fast: Any = (
        DFlashSampler(max_new_tokens=_NEW, temperature=0.0)
        if name == "dflash"
        else SelfSpeculationSampler(temperature=0.0, **_BLOCKS)
    )
    expected = _open_ended(greedy, device, torch.float32, None)
    ours = _open_ended(fast, device, torch.float32, None)
    return compared(
        ours, expected, lambda seed: _open_ended(greedy, device, torch.float32, Moved(seed))
    )


def _fixed(sampler: Any, device: Any, dtype: torch.dtype, moved: Moved | None) -> Texts:
    model: Any = whole_row_denoiser(PROVEN, device, dtype)
    if moved is not None:
        model.head = moved.around(model.head)
    return rows_by(sampler, model)


def _open_ended(sampler: Any, device: Any, dtype: torch.dtype, moved: Moved | None) -> Texts:
    model = decoder_for(sampler, device, dtype)
    if moved is not None:
        model.head = moved.around(model.head)
    return completions_by(sampler, model)


def decoder_for(sampler: Any, device: Any, dtype: torch.dtype) -> Any:
    """What a sampler that continues prompts is called with."""
    target = decoder(PROVEN, device, dtype)
    return drafted(target, PROVEN) if isinstance(sampler, DFlashSampler) else target


def rows_by(sampler: Any, model: Any) -> Texts:
    """Rows of one length behind prompts of 0 to 4 tokens, on the CPU as in a job."""
    generator = torch.Generator().manual_seed(5)
    shape = (_NUM_ROWS, _LENGTH)
    tokens = torch.randint(MASK + 1, PROVEN.vocab_size, shape, generator=generator)
    given = torch.arange(_NUM_ROWS)[:, None] % 5
    is_given = torch.arange(_LENGTH) < given
    keys = RowGenerator.for_rows(9, torch.arange(_NUM_ROWS))
    texts: Texts = sampler.sample(model, tokens, is_given, keys).tokens.tolist()
    return texts


def completions_by(sampler: Any, model: Any) -> Texts:
    """Continuations of prompts of 1 to 16 tokens, in fewer slots than there are rows, so that rows
    take the places of others.
    """
    lengths = [1 + 5 * row % 16 for row in range(_NUM_ROWS)]
    requests = requests_of(lengths, PROVEN.vocab_size)
    done = sampler.complete(model, requests, key=4, num_slots=5)
    texts = {completion.id: completion.tokens for completion in done}
    return [texts[row] for row in range(_NUM_ROWS)]
