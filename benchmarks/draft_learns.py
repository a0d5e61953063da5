"""Trains a target on a language that is learnt in context, then drafts for it: with its hidden
states, and without; and measures what each, and an untrained one, has accepted on held-out rows.

    python -m benchmarks.draft_learns [--target_steps 1800] [--draft_steps 800] \
        [--draft_layout dflash2]

Every row goes around a circle of the letters in an order of its own, with a jump now and then. What
comes next stands in the row: behind the last time that the letter occurred. Finding it takes one
layer that knows what each letter follows, and another that looks the letter up. The target has
both; a draft of two layers, whose context is not looked at by its own first layer, has only what it
is given. So a draft must do clearly better than an untrained one, and clearly better with the
target's hidden states than without them; exits with 1 otherwise. Minutes on one core.
"""

import argparse
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.builders import letter_tokenizer, token_folder
from tokendiff.config.evaluate import EvaluateConfig
from tokendiff.config.train import TrainConfig
from tokendiff.data.rows import TokenData
from tokendiff.evaluation.draft_acceptance import DraftEvaluator, acceptance_figures
from tokendiff.evaluation.evaluator import evaluation_rows
from tokendiff.training.run import train_in_process

NUM_LETTERS, LENGTH, JUMPS = 10, 64, 0.25
FIRST_LETTER = 4  # the tokenizer's special tokens come before
MODEL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True, kw_only=True)
class Effort:
    target_steps: int = 1800
    draft_steps: int = 800
    draft_layout: str = "dflash"
    rows_per_step: int = 32
    num_anchors: int = 8
    block_size: int = 5
    eval_rows: int = 300


def language(folder: Path) -> Path:
    """Packed rows, and a folder with a tokenizer and a model config."""
    from transformers import Qwen3Config

    rng = np.random.default_rng(7)

    def rows(count: int) -> list[list[int]]:
        circle = rng.permuted(np.tile(np.arange(NUM_LETTERS), (count, 1)), axis=1)
        rule = np.empty_like(circle)  # what follows each letter
        np.put_along_axis(rule, circle, np.roll(circle, -1, axis=1), axis=1)
        letters = [rng.integers(NUM_LETTERS, size=count)]
        for _ in range(LENGTH - 1):
            following = rule[np.arange(count), letters[-1]]
            jump = rng.random(count) < JUMPS
            letters.append(np.where(jump, rng.integers(NUM_LETTERS, size=count), following))
        return (FIRST_LETTER + np.stack(letters, axis=1)).tolist()

    tokenizer = letter_tokenizer(FIRST_LETTER + NUM_LETTERS)
    token_folder(
        folder / "data",
        files=[rows(20_000)],
        heldout=rows(1_000),
        max_length=LENGTH,
        tokenizer=tokenizer,
        row_group_rows=500,
    )
    Qwen3Config(**MODEL, vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "data"


def accepted_on_heldout(draft: Path, data: Path, effort: Effort) -> dict[str, float]:
    heldout = TokenData.open(data, split="heldout")
    evaluator = DraftEvaluator(draft, EvaluateConfig(batch_size=20), device="cpu")
    places = evaluation_rows(heldout, seed=0, max_rows=effort.eval_rows)
    return acceptance_figures(evaluator.acceptance(heldout.read(*places))["blocks"])


def train_all(folder: Path, effort: Effort) -> dict[str, dict[str, float]]:
    """Figures on held-out rows of each draft, by name."""
    data = language(folder)
    train = TokenData.open(data, split="train")

    def hear(event: str, **fields: Any) -> None:
        if event == "metrics":
            length = fields.get("expected_acceptance_length")
            print(fields["step"], round(fields["loss"], 3), length and round(length, 3), flush=True)

    common: dict[str, Any] = {
        "global_batch_size": effort.rows_per_step,
        "per_device_train_batch_size": effort.rows_per_step,
        "lr_warmup_steps": 20,
        "checkpointing_steps": 10**6,
        "logging_steps": 50,
    }
    target = TrainConfig(
        **common,
        model_name_or_path=str(folder / "model"),
        from_scratch=True,
        objective="ar",  # type: ignore[arg-type]
        max_train_steps=effort.target_steps,
        learning_rate=3e-3,
    )
    start = time.perf_counter()
    final = train_in_process(target, train, folder / "target", on_event=hear)
    print(f"target: {time.perf_counter() - start:.0f} s")
    figures = {}
    for name, steps, changes in (
        ("untrained", 1, {"learning_rate": 1e-12, "lr_warmup_steps": 0}),
        ("without hidden states", effort.draft_steps, {}),
        ("with hidden states", effort.draft_steps, {}),
    ):
        objective = {
            "name": "dflash",
            "draft_layout": effort.draft_layout,
            "draft_num_layers": 2,
            "block_size": effort.block_size,
            "num_anchors": effort.num_anchors,
            "use_target_hidden_states": name != "without hidden states",
        }
        config = TrainConfig.model_validate(
            {
                **common,
                "target_model_id": str(final),
                "objective": objective,
                "max_train_steps": steps,
                "learning_rate": 2e-3,
                **changes,
            }
        )
        start = time.perf_counter()
        draft = train_in_process(config, train, folder / name.replace(" ", "-"), on_event=hear)
        print(f"{name}: {time.perf_counter() - start:.0f} s")
        figures[name] = accepted_on_heldout(draft, data, effort)
    return figures


def report(figures: dict[str, dict[str, float]]) -> str:
    lines = []
    for name, found in figures.items():
        shares = [f"{value:.1%}" for key, value in found.items() if "_at_" in key]
        lines.append(
            f"{name:<22} {found['expected_acceptance_length']:.3f} +- "
            f"{found['expected_acceptance_length_standard_error']:.3f} tokens a block; first n all "
            f"accepted: {' '.join(shares)}"
        )
    return "\n".join(lines)


# (draft, another that it must do better than, by how many tokens a block).
EXPECTED = (
    ("without hidden states", "untrained", 0.1),
    ("with hidden states", "without hidden states", 0.2),
)


def shortfalls(figures: dict[str, dict[str, float]]) -> list[str]:
    """Where a draft is not better than another by what is expected, and three standard errors."""
    found = []
    for name, other, margin in EXPECTED:
        sides = [figures[name], figures[other]]
        mine, theirs = (side["expected_acceptance_length"] for side in sides)
        error = math.hypot(*(s["expected_acceptance_length_standard_error"] for s in sides))
        print(f"{name}: {mine - theirs:.3f} +- {error:.3f} tokens a block better than {other}")
        if mine - theirs < max(margin, 3 * error):
            found.append(f"{name} is not better than {other} by {margin} and three standard errors")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    for name in ("target_steps", "draft_steps", "rows_per_step", "num_anchors", "eval_rows"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Effort, name))
    parser.add_argument("--draft_layout", choices=["dflash", "dflash2"], default="dflash")
    parser.add_argument("--threads", type=int, default=1, help="torch's")
    args = vars(parser.parse_args())
    torch.set_num_threads(args.pop("threads"))
    with tempfile.TemporaryDirectory() as name:
        figures = train_all(Path(name), Effort(**args))
    print(report(figures))
    broken = shortfalls(figures)
    print("\n".join(broken))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
