"""Tokens per second of decoding, the time of a pass beside what the machine could do at best, and
how much of the time goes by outside the model.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.machine import Machine, Stopwatch
from benchmarks.gpu.models import (
    MASK,
    Shape,
    decoder,
    drafted,
    published,
    replay_passes,
    requests_of,
    whole_row_denoiser,
)
from benchmarks.gpu.report import MEASURED, MET, MISSED, Case, Finding
from benchmarks.gpu.roofline import Pass, cache_bytes, pass_seconds
from tokendiff.diffusion.kernels import AbsorbingKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.diffusion.schedules import LogLinear
from tokendiff.samplers.ancestral import AncestralSampler
from tokendiff.samplers.autoregressive import AutoregressiveSampler
from tokendiff.samplers.block_refinement import BlockRefinementSampler
from tokendiff.samplers.dflash import DFlashSampler
from tokendiff.samplers.sdar import SDARSampler

_AIM_OF_LIMIT = 0.6  # of the machine's limit, at batch 1
_AIM_OUTSIDE = 0.1  # of the time, at the largest batch
_BLOCK, _DRAFT_BLOCK = 8, 8
_KERNEL = AbsorbingKernel(schedule=LogLinear(), mask_token_id=MASK)
_PARTS = ("encode", "head", "draft")  # of a model


@dataclass(frozen=True, kw_only=True)
class Sizes:
    prompt: int
    new: int
    steps: int  # of `ancestral`
    batches: tuple[int, ...]


def sizes_on(machine: Machine) -> Sizes:
    if machine.is_cuda:
        return Sizes(prompt=128, new=192, steps=16, batches=(1, 128, 8, 64))
    return Sizes(prompt=6, new=8, steps=4, batches=(1, 4))


@dataclass(frozen=True, kw_only=True)
class Kind:
    """
    Attributes:
        model: which of `_MODELS` it runs on.
        make: the sampler, for so many new tokens.
        width: tokens of a row that a pass reads, once the prompt is read.
    """

    model: str
    make: Callable[[Sizes], Any]
    width: Callable[[Sizes], int]


def _of_blocks(sizes: Sizes) -> dict[str, Any]:
    return {"mask_token_id": MASK, "block_length": _BLOCK, "max_new_tokens": sizes.new}


KINDS: dict[str, Kind] = {
    "ar": Kind(
        model="decoder",
        make=lambda s: AutoregressiveSampler(max_new_tokens=s.new),
        width=lambda s: 1,
    ),
    "sdar": Kind(
        model="decoder",
        make=lambda s: SDARSampler(denoising_steps=_BLOCK // 2, **_of_blocks(s)),
        width=lambda s: _BLOCK,
    ),
    "block_refinement": Kind(
        model="decoder",
        make=lambda s: BlockRefinementSampler(
            attention_mask_mode="4d", num_inference_steps=_BLOCK // 2, **_of_blocks(s)
        ),
        width=lambda s: _BLOCK,
    ),
    "dflash": Kind(
        model="drafted",
        make=lambda s: DFlashSampler(max_new_tokens=s.new),
        width=lambda s: _DRAFT_BLOCK,
    ),
    "ancestral": Kind(
        model="denoiser",
        make=lambda s: AncestralSampler(kernel=_KERNEL, num_inference_steps=s.steps),
        width=lambda s: s.prompt + s.new,
    ),
}


def cases(machine: Machine) -> Iterator[Case]:
    """Batch 1 and the largest one first, of each size: time may run out."""
    build = functools.lru_cache(maxsize=3)(partial(replaying, machine))
    by_kernel = functools.lru_cache(maxsize=1)(partial(model_of, machine))
    sizes, shapes = sizes_on(machine), published(machine)
    dtype = "bf16" if machine.is_cuda else "toy, fp32"
    for batches in (sizes.batches[:2], sizes.batches[2:]):
        for shape in shapes:
            for name in KINDS:
                for batch in batches:
                    yield Case(
                        name=f"{name}, {shape.name}, batch {batch}",
                        compared=f"{sizes.prompt} + {sizes.new} tokens, {dtype}",
                        run=partial(_speed, name, shape, batch, machine, build),
                        most_seconds=40.0,
                    )
    for name in ("ar", "sdar", "ancestral") if machine.is_cuda else ():
        yield Case(
            name=f"{name}, {shapes[0].name}, batch 1, no CUDA graphs",
            compared="each kernel launched by itself",
            run=partial(_speed, name, shapes[0], 1, machine, by_kernel),
            most_seconds=40.0,
        )


def replaying(machine: Machine, kind: str, shape: Shape) -> Any:
    """As in a job on a card; on a CPU passes are not replayed, nor are they in a job."""
    model = model_of(machine, kind, shape)
    if machine.is_cuda:
        replay_passes(model, machine)
    return model


def model_of(machine: Machine, kind: str, shape: Shape) -> Any:
    dtype = torch.bfloat16 if machine.is_cuda else torch.float32
    if kind == "denoiser":
        return whole_row_denoiser(shape, machine.device, dtype)
    target = decoder(shape, machine.device, dtype)
    return drafted(target, shape, block_size=_DRAFT_BLOCK) if kind == "drafted" else target


def _speed(name: str, shape: Shape, batch: int, machine: Machine, build: Any) -> Finding:
    kind, sizes = KINDS[name], sizes_on(machine)
    model, sampler = build(kind.model, shape), kind.make(sizes)
    run = partial(decode, sampler, model, shape, batch=batch, sizes=sizes, machine=machine)
    try:
        run()
        machine.synchronize()
        start = time.perf_counter()
        with timed(model, machine) as watches:
            run()
            machine.synchronize()
        seconds = time.perf_counter() - start
    except torch.OutOfMemoryError:
        machine.forget()
        return Finding(figure="out of memory", limit="", verdict=MISSED)
    inside = sum(watch.stop() for part in watches.values() for watch in part)
    passes = len(watches["encode"])
    outside = max(0.0, 1.0 - inside / seconds)
    values = {
        "tokens_per_second": batch * sizes.new / seconds,
        "pass_seconds": seconds / passes,
        "passes": passes,
        "outside": outside,
    }
    figure = (
        f"{batch * sizes.new / seconds:,.0f} tokens/s, {1e3 * seconds / passes:.2f} ms a pass, "
        f"{outside:.0%} outside the model"
    )
    recorder = getattr(getattr(model, "target", model), "recorder", None)
    if recorder is not None and not recorder.is_working:
        figure += ", passes NOT replayed"
    if not machine.is_cuda:
        return Finding(figure=figure, limit="", verdict=MEASURED, values=values)
    limit = _limit_seconds(kind, model, shape, batch, sizes, machine)
    share = limit * passes / seconds
    verdict, aim = MEASURED, ""
    if batch == 1:
        verdict, aim = (MET if share >= _AIM_OF_LIMIT else MISSED), f"; aim {_AIM_OF_LIMIT:.0%}"
    elif batch == max(sizes.batches):
        verdict = MET if outside <= _AIM_OUTSIDE else MISSED
        aim = f"; aim {_AIM_OUTSIDE:.0%} outside"
    return Finding(
        figure=f"{figure}, {share:.0%} of the limit",
        limit=f"{1e3 * limit:.2f} ms a pass{aim}",
        verdict=verdict,
        values={**values, "limit_seconds": limit, "share": share},
    )


def _limit_seconds(
    kind: Kind, model: Any, shape: Shape, batch: int, sizes: Sizes, machine: Machine
) -> float:
    """Of one pass: all weights are read once, and what is kept of the rows."""
    width, context = kind.width(sizes), sizes.prompt + sizes.new / 2
    is_whole = kind.model == "denoiser"
    forward = Pass(
        shape=shape,
        tokens=batch * width,
        pairs=batch * width * (width if is_whole else context),
        head_tokens=batch * (sizes.new / sizes.steps if is_whole else width),
    )
    kept = 0.0 if is_whole else cache_bytes(shape, num_rows=batch, context=context)
    return pass_seconds(forward, machine, num_bytes=_weight_bytes(model) + kept)


def _weight_bytes(model: Any) -> float:
    modules = (model.target, model._draft) if hasattr(model, "target") else (model,)
    return float(sum(p.nbytes for module in modules for p in module.parameters()))


def decode(
    sampler: Any, model: Any, shape: Shape, *, batch: int, sizes: Sizes, machine: Machine
) -> None:
    """All rows at once, to their end."""
    if isinstance(sampler, AncestralSampler):
        length = sizes.prompt + sizes.new
        is_given = torch.arange(length).expand(batch, -1) < sizes.prompt
        tokens = torch.full_like(is_given, MASK + 1, dtype=torch.int64)
        keys = RowGenerator.for_rows(1, torch.arange(batch))
        sampler.sample(model, tokens, is_given, keys)
        return
    requests = requests_of([sizes.prompt] * batch, shape.vocab_size)
    for _ in sampler.complete(model, requests, key=1, num_slots=batch):
        pass


@contextmanager
def timed(model: Any, machine: Machine) -> Iterator[dict[str, list[Stopwatch]]]:
    """Stopwatches of all calls of the parts of a model in this block."""
    watches: dict[str, list[Stopwatch]] = {name: [] for name in _PARTS if hasattr(model, name)}

    def around(name: str, part: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            watch = Stopwatch(machine)
            result = part(*args, **kwargs)
            watch.mark()
            watches[name].append(watch)
            return result

        return call

    for name in watches:
        setattr(model, name, around(name, getattr(model, name)))
    try:
        yield watches
    finally:
        for name in watches:
            delattr(model, name)
