"""The command: options, the parts with their shares of the time, and the exit code."""

import argparse
import importlib
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import Case, Report, run_case

# Parts that prove; they come first, and together may take this share of the time.
PROOFS = ("mathematics", "attention", "samplers", "trainer")
_PROOFS_SHARE = 0.7
# Parts that measure -> share of the time that is left then. What one does not use goes to those
# behind it.
MEASURES: dict[str, float] = {"profile": 0.4, "training": 0.35, "decoding": 0.25}
PARTS = (*PROOFS, *MEASURES)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    end = time.monotonic() + 60.0 * args.minutes  # importing torch counts too
    machine = _machine(args.device)
    report = Report(_about(machine, args), args.out)
    chosen = [part for part in PARTS if part in (args.only or PARTS)]
    for part, case, deadline in _planned(chosen, machine, end):
        row = run_case(part, case, seconds_left=deadline - time.monotonic())
        report.add(row)
        print(f"{row.verdict:9}{row.seconds:6.1f} s  {part}: {row.name}  {row.figure}", flush=True)
    print(f"\n{report.finish()}")
    if unproven := report.unproven():
        print(f"not proven on {machine.name}: {'; '.join(unproven)}", file=sys.stderr)
    return 1 if unproven else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Prove and measure the package on a card, or prove it on a CPU at small sizes.",
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all parts (8)")
    parser.add_argument(
        "--out", type=Path, default=Path("output/gpu"), help="gets gpu.json and gpu.md (output/gpu)"
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (cuda)")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    return parser


def _machine(name: str) -> Any:
    import torch

    from benchmarks.gpu.machine import Machine

    device = torch.device(name)
    if device.type not in ("cuda", "cpu"):
        sys.exit(f"--device {name}: give cuda, cuda:N or cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--device {name}: torch {torch.__version__} sees no card; give --device cpu")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return Machine(device)


def _about(machine: Any, args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    import tokendiff

    return {
        "device": machine.name,
        "sizes": "published" if machine.is_cuda else "toy: speeds say nothing of a card",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokendiff": tokendiff.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "minutes": args.minutes,
    }


def _planned(parts: list[str], machine: Any, end: float) -> Iterator[tuple[str, Case, float]]:
    """Each case with the moment at which the time of its part is over."""
    # All imports come before any clock: one that is stopped leaves half a module behind.
    from transformers import ModernBertForMaskedLM, Qwen3ForCausalLM, get_scheduler  # noqa: F401

    modules = {part: importlib.import_module(f"benchmarks.gpu.{part}") for part in parts}
    if "profile" in parts:
        modules["profile"].prepare(machine)
    now = time.monotonic()
    proven_by = now + _PROOFS_SHARE * (end - now)
    for index, part in enumerate(parts):
        now, deadline = time.monotonic(), proven_by
        if part in MEASURES:
            weights = [MEASURES[name] for name in parts[index:]]
            deadline = now + weights[0] / sum(weights) * (end - now)
        for case in modules[part].cases(machine):
            yield part, case, deadline
