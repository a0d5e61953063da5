"""How often the CPU waits for the device, and what costs most, of a training step and of a pass of
decoding.

On a CPU the waits are those of a device that is emulated (`benchmarks.device_reads`): the code asks
for as many values there as it does on a card.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.decoding import KINDS, decode, replaying, sizes_on, timed
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.mathematics import OBJECTIVES, model_for
from benchmarks.gpu.models import PROVEN, published, whole_row_denoiser
from benchmarks.gpu.report import MEASURED, MET, MISSED, Case, Finding
from benchmarks.gpu.samplers import FIXED, OPEN_ENDED, completions_by, decoder_for, rows_by
from benchmarks.gpu.trainer import Settings, batches, new_trainer, run_to
from benchmarks.gpu.training import runs, trainer_of

_TRAINED = ("mdlm", "ar", "block_diffusion", "dflash")
# Name -> what is shorter here than where tokens are proven: an emulated device is slow.
_DECODED: dict[str, dict[str, Any]] = {
    "ar": {"max_new_tokens": 5},
    "sdar": {"max_new_tokens": 8},
    "block_refinement, 4d": {"max_new_tokens": 8},
    "dflash": {"max_new_tokens": 8},
    "ancestral, masks": {"num_inference_steps": 5},
}
_STEPS = 4  # of which the last is logged
_READS_PER_STEP, _READS_PER_PASS = 1 / _STEPS, 1.0
_NUM_COSTLIEST = 10
# What operations are called in words, by a part of their name; the first that fits counts.
WORDS: dict[str, str] = {
    "attention": "attention",
    "flash": "attention",
    "flex": "attention",
    "mm": "products of matrices",
    "adam": "optimiser",
    "foreach": "optimiser",
    "norm": "norms and means",
    "mean": "norms and means",
    "pow": "norms and means",
    "softmax": "softmax and losses",
    "logsumexp": "softmax and losses",
    "max": "softmax and losses",
    "expand": "views",
    "as_strided": "views",
    "view": "views",
    "exp": "softmax and losses",
    "embedding": "embedding",
    "index": "gathers and scatters",
    "gather": "gathers and scatters",
    "scatter": "gathers and scatters",
    "nonzero": "gathers and scatters",
    "copy": "copies and casts",
    "cat": "copies and casts",
    "clone": "copies and casts",
    "fill": "copies and casts",
    "zero": "copies and casts",
    "triton": "compiled kernels",
}
_WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def prepare(machine: Machine) -> None:
    """To be called before any other part runs: autograd counts the devices once, in the first
    backward pass of a process, and must find the emulated one.
    """
    from benchmarks.device_reads import count_waits

    device = _device(machine)
    with count_waits():
        torch.ones(1, device=device, requires_grad=True).sum().backward()


def cases(machine: Machine) -> Iterator[Case]:
    for name in _TRAINED:
        yield Case(
            name=f"waits of a step, {name}",
            compared=f"one read in {_STEPS} steps of which one is logged",
            run=partial(_waits_of_training, name, machine),
        )
    for name in _DECODED:
        yield Case(
            name=f"waits of a pass, {name}",
            compared="one read a pass",
            run=partial(_waits_of_decoding, name, machine),
        )
    where = "time of the device" if machine.is_cuda else "time of the CPU, toy"
    for run in runs(machine)[:2]:
        step = partial(_costliest_of_step, run, machine)
        name = f"what costs most of a step, {run.name}, {run.shape.name}"
        yield Case(name=name, compared=where, run=step)
    for kind in ("ar", "sdar"):
        decoding = partial(_costliest_of_decoding, kind, machine)
        name = f"what costs most of decoding, {kind}, {published(machine)[0].name}"
        yield Case(name=name, compared=where, run=decoding)


def _device(machine: Machine) -> torch.device:
    from benchmarks.device_reads import emulated_device

    return machine.device if machine.is_cuda else emulated_device()


def _waits_of_training(name: str, machine: Machine) -> Finding:
    from benchmarks.device_reads import count_waits

    (kind, objective), device = OBJECTIVES[name], _device(machine)
    settings = Settings(logging_steps=1000)
    with count_waits() as waits:
        model = model_for(kind, "cpu", torch.float32)
        trainer = new_trainer(model, objective, settings, device)
        rows = batches(settings, length=24, vocab_size=PROVEN.vocab_size)
        run_to(trainer, rows, 1)  # what is done once
        read, sent = waits.reads, waits.sends
        run_to(trainer, rows, 1 + _STEPS)
        return _finding_of_waits(waits.read[read:], waits.sent[sent:], _STEPS, _READS_PER_STEP)


def _waits_of_decoding(name: str, machine: Machine) -> Finding:
    from benchmarks.device_reads import count_waits

    device = _device(machine)
    sampler = replace({**OPEN_ENDED, **FIXED}[name], **_DECODED[name])
    with count_waits() as waits:
        if name in FIXED:
            model: Any = whole_row_denoiser(PROVEN, device, torch.float32)
            run: Callable[[], Any] = partial(rows_by, sampler, model)
        else:
            model = decoder_for(sampler, device, torch.float32)
            run = partial(completions_by, sampler, model)
        with timed(model, machine) as watches:
            read, sent = waits.reads, waits.sends
            run()
        passes = len(watches["encode"])
        return _finding_of_waits(waits.read[read:], waits.sent[sent:], passes, _READS_PER_PASS)


def _finding_of_waits(read: list[str], sent: list[str], count: int, limit: float) -> Finding:
    places = Counter(read).most_common(3)
    often = "; ".join(f"{place} ({times / count:.2g})" for place, times in places)
    return Finding(
        figure=f"{len(read) / count:.2g} reads, {len(sent) / count:.2g} copies that are waited for"
        + (f"; most at {often}" if often else ""),
        limit=f"{limit:g} reads",
        verdict=MET if len(read) <= limit * count else MISSED,
        values={"reads": len(read) / count, "sends": len(sent) / count, "limit": limit},
    )


def _costliest_of_step(run: Any, machine: Machine) -> Finding:
    machine.forget()
    trainer, source = trainer_of(run, max(1, run.rows // 4), machine)
    run_to(trainer, source, 2)
    return _costliest(lambda: run_to(trainer, source, 3), machine)


def _costliest_of_decoding(name: str, machine: Machine) -> Finding:
    machine.forget()
    kind, shape = KINDS[name], published(machine)[0]
    sizes = replace(sizes_on(machine), new=16)  # a profile of many passes takes minutes to read
    model, sampler = replaying(machine, kind.model, shape), kind.make(sizes)
    batch = min(8, max(sizes.batches))
    run = partial(decode, sampler, model, shape, batch=batch, sizes=sizes, machine=machine)
    run()
    return _costliest(run, machine)


def _costliest(work: Callable[[], Any], machine: Machine) -> Finding:
    """Where the time goes, in words, and by operation."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if machine.is_cuda else [])]
    with profile(activities=activities) as found:
        work()
        machine.synchronize()
    # Kernels are listed beside the operations that start them; those alone are counted.
    events = [e for e in found.key_averages() if e.device_type == torch.autograd.DeviceType.CPU]
    field = "self_device_time_total" if machine.is_cuda else "self_cpu_time_total"
    times = {e.key: (float(getattr(e, field)), e.count) for e in events if getattr(e, field) > 0}
    total = sum(time for time, _ in times.values()) or 1.0
    kinds: Counter[str] = Counter()
    for key, (time, _) in times.items():
        kinds[in_words(key)] += time  # type: ignore[assignment]
    order = sorted(times, key=lambda key: -times[key][0])[:_NUM_COSTLIEST]
    shown = [f"{key} {times[key][0] / total:.0%} ({times[key][1]} calls)" for key in order]
    waits = sum(e.count for e in found.key_averages() if e.key in _WAITING)
    shares = [f"{kind} {time / total:.0%}" for kind, time in kinds.most_common(5)]
    return Finding(
        figure=", ".join(shares)
        + (f"; {waits} synchronisations" if machine.is_cuda else "")
        + f". Costliest: {'; '.join(shown)}",
        limit="",
        verdict=MEASURED,
        values={
            "shares": {kind: time / total for kind, time in kinds.items()},
            "costliest": {key: times[key][0] / total for key in order},
            "synchronisations": waits,
        },
    )


def in_words(operation: str) -> str:
    """The kind of work that an operation of torch is."""
    name = operation.lower()
    return next(
        (words for part, words in WORDS.items() if part in name), "element by element, rest"
    )
