"""Tokens per second of training, by the loop that jobs use, beside what the shapes allow."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.models import (
    BERT_BASE,
    EOS,
    MASK,
    TOY,
    Shape,
    causal_denoiser,
    encoder,
    published,
    whole_row_denoiser,
)
from benchmarks.gpu.report import MEASURED, MET, MISSED, Case, Finding
from benchmarks.gpu.roofline import (
    Pass,
    block_diffusion_pairs,
    causal_pairs,
    training_seconds,
    whole_pairs,
)
from benchmarks.gpu.trainer import Settings, batches, new_trainer, run_to
from tokendiff.diffusion.kernels import AbsorbingKernel
from tokendiff.diffusion.schedules import LogLinear
from tokendiff.objectives.autoregressive import Autoregressive
from tokendiff.objectives.block_diffusion import BlockDiffusion
from tokendiff.objectives.mdlm import MDLM
from tokendiff.training.trainer import Trainer

_AIM = 0.5  # MFU of dense models
_AS_PREDICTED = 0.85  # of the MFU of `ar` with the same shape, for block diffusion
_BLOCK = 32
_MEASURED_SECONDS, _MOST_STEPS, _WARM_STEPS = 6.0, 20, 3
_KERNEL = AbsorbingKernel(schedule=LogLinear(), mask_token_id=MASK)


@dataclass(frozen=True, kw_only=True)
class Run:
    """
    Attributes:
        rows: of one pass, at first; half as many where memory does not suffice.
        pairs: see `Pass`, of a row.
        copies: how many times a row goes through the layers.
        head_share: of a row's tokens that have logits.
        is_compiled: trained with `compile`.
    """

    name: str
    shape: Shape
    build: Callable[[Shape, Any, torch.dtype], Any]
    objective: Any
    length: int
    rows: int
    pairs: float
    copies: int = 1
    head_share: float = 1.0
    is_compiled: bool = False

    @property
    def title(self) -> str:
        return f"{self.name}, {self.shape.name}" + (", compiled" if self.is_compiled else "")

    def forward(self, rows: int) -> Pass:
        tokens = rows * self.length
        return Pass(
            shape=self.shape,
            tokens=tokens * self.copies,
            pairs=rows * self.pairs,
            head_tokens=tokens * self.head_share,
        )


def cases(machine: Machine) -> Iterator[Case]:
    mfu_of_ar: dict[tuple[str, bool], float] = {}
    yield Case(name="peaks of this machine", compared="as stated", run=partial(_peaks, machine))
    for run in runs(machine):
        what = f"rows of {run.length}" + (", bf16" if machine.is_cuda else ", toy, fp32")
        yield Case(
            name=run.title,
            compared=what,
            run=partial(_speed, run, machine, mfu_of_ar),
        )


def runs(machine: Machine) -> list[Run]:
    """What matters most comes first: time may run out. On a card, those of the smaller shape and of
    the encoder are also compiled; on a CPU compiling would take longer than everything else here.
    """
    length = 4096 if machine.is_cuda else 64
    found = []
    for shape in published(machine):
        rows = 2 if not machine.is_cuda else 8 if shape.hidden_size <= 1024 else 4
        common: dict[str, Any] = {"shape": shape, "length": length, "rows": rows}
        block = BlockDiffusion(kernel=_KERNEL, block_length=_BLOCK, eos_token_id=EOS)
        found += [
            Run(
                name="ar",
                build=causal_denoiser,
                objective=Autoregressive(),
                pairs=causal_pairs(length),
                **common,
            ),
            Run(
                name="block_diffusion",
                build=causal_denoiser,
                objective=block,
                pairs=block_diffusion_pairs(length, _BLOCK),
                copies=2,
                head_share=0.5,
                **common,
            ),
        ]
    mdlm: dict[str, Any] = {"objective": MDLM(kernel=_KERNEL), "head_share": 0.5}
    small = 512 if machine.is_cuda else 64
    of_both_ways = Run(
        name="mdlm, both ways",
        shape=published(machine)[0],
        build=whole_row_denoiser,
        length=length,
        rows=8 if machine.is_cuda else 2,
        pairs=whole_pairs(length),
        **mdlm,
    )
    of_encoder = Run(
        name="mdlm, encoder",
        shape=BERT_BASE if machine.is_cuda else TOY,
        build=encoder,
        length=small,
        rows=128 if machine.is_cuda else 2,
        pairs=whole_pairs(small),
        **mdlm,
    )
    eager = [*found[:2], of_encoder, of_both_ways]
    compiled = [replace(run, is_compiled=True) for run in eager if machine.is_cuda]
    return [*eager, *compiled, *found[2:]]


def _peaks(machine: Machine) -> Finding:
    measured = (machine.measured_operations(), machine.measured_bytes())
    shown = f"{measured[0] / 1e12:.3g} TFLOP/s of a product, {measured[1] / 1e9:.3g} GB/s of a copy"
    stated = machine.stated
    return Finding(
        figure=shown,
        limit=""
        if stated is None
        else f"{stated[0] / 1e12:.0f} TFLOP/s, {stated[1] / 1e9:.0f} GB/s",
        verdict=MEASURED,
        values={"measured": measured, "stated": stated},
    )


def _speed(run: Run, machine: Machine, mfu_of_ar: dict[tuple[str, bool], float]) -> Finding:
    rows = run.rows
    while True:
        machine.forget()
        try:
            seconds, first = _step_seconds(run, rows, machine)
            break
        except (torch.OutOfMemoryError, MemoryError):  # the second is a trainer's word for it
            if rows == 1:
                return Finding(figure="out of memory with one row", limit="", verdict=MISSED)
        rows //= 2
    forward = run.forward(rows)
    per_second = rows * run.length / seconds
    values: dict[str, Any] = {
        "tokens_per_second": per_second,
        "step_seconds": seconds,
        "first_steps_seconds": first,
        "rows": rows,
    }
    if not machine.is_cuda:
        figure = f"{per_second:,.0f} tokens/s, {1e3 * seconds:.0f} ms a step of {rows} rows"
        return Finding(figure=figure, limit="", verdict=MEASURED, values=values)
    mfu = 3.0 * forward.operations / seconds / machine.peaks[0]
    roofline = rows * run.length / training_seconds(forward, machine)
    memory = machine.peak_gigabytes()
    alike = run.shape.name, run.is_compiled
    if run.name == "ar":
        mfu_of_ar[alike] = mfu
    aim = _AIM
    if run.name == "block_diffusion":
        aim = _AS_PREDICTED * mfu_of_ar.get(alike, _AIM)
    return Finding(
        figure=f"{per_second:,.0f} tokens/s, MFU {mfu:.0%}, {memory:.0f} GB, "
        f"{1e3 * seconds:.0f} ms a step of {rows} rows; first steps {first:.0f} s",
        limit=f"MFU {aim:.0%}; roofline {roofline:,.0f} tokens/s",
        verdict=MET if mfu >= aim else MISSED,
        values={**values, "mfu": mfu, "roofline": roofline, "gigabytes": memory},
    )


def trainer_of(run: Run, rows: int, machine: Machine) -> tuple[Trainer, Iterator[dict[str, Any]]]:
    """A trainer whose steps are one pass each, and the rows that it takes."""
    settings = Settings(
        per_device_train_batch_size=rows,
        mixed_precision="bf16" if machine.is_cuda else "no",
        lr_scheduler="constant",
        compile=run.is_compiled,
        logging_steps=1000,
        checkpointing_steps=10**9,
    )
    model = run.build(run.shape, machine.device, torch.float32)
    trainer = new_trainer(model, run.objective, settings, machine.device)
    return trainer, batches(settings, length=run.length, vocab_size=run.shape.vocab_size)


def _step_seconds(run: Run, rows: int, machine: Machine) -> tuple[float, float]:
    """Of a step of one pass; and of the first ones, in which kernels are chosen and compiled."""
    trainer, source = trainer_of(run, rows, machine)

    def timed(count: int) -> float:
        """Seconds of so many further steps."""
        machine.synchronize()
        start = time.perf_counter()
        run_to(trainer, source, trainer.step + count)
        machine.synchronize()
        return time.perf_counter() - start

    first = timed(_WARM_STEPS if machine.is_cuda else 1)
    seconds = timed(2) / 2
    if machine.is_cuda:
        count = int(min(max(_MEASURED_SECONDS / seconds, 2), _MOST_STEPS))
        seconds = timed(count) / count
    return seconds, first
