"""Do small models answer? Chats of a made-up language train each objective from nothing, with the
loss on the answers, and with the loss on all tokens for the same number of steps.

A user says some letters. The assistant answers with the same in reverse, or with the one behind
each in the alphabet, then says one of two letters with equal chance, and ends. So ln 2 nats are all
that an answer tells one who knows its question: no bound may lie below, and a model that learnt
comes near. Conversations have two turns and are packed into rows by `jobs.preprocess`, with answers
found by the template's prefixes. Each model is asked second questions it has not seen.

    python -m benchmarks.chats                     # what `make toy` runs
    python -m benchmarks.chats --objectives ar mdlm
"""

import argparse
import contextlib
import io
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs import preprocess
from tests.builders import letter_tokenizer
from tests.in_this_process import jobs_here
from tokendiff.config.evaluate import EvaluateConfig
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.train import TrainConfig
from tokendiff.data.prompts import GenerationRow
from tokendiff.data.rows import TokenData
from tokendiff.evaluation.bound import summarize
from tokendiff.evaluation.draft_acceptance import DraftEvaluator, acceptance_figures
from tokendiff.evaluation.evaluator import Evaluator, evaluation_rows
from tokendiff.models.completion import CompletionModel
from tokendiff.models.sampling import SamplingModel
from tokendiff.training.run import train_in_process

LETTERS, SIZE, ENDS = "abcdefgh", 4, "jk"  # of questions, letters of one, and an answer's last one
ANSWER_TOKENS = SIZE + 2  # EOS among them
EOS = 2
ENTROPY = math.log(len(ENDS)) / ANSWER_TOKENS  # nats per token of the answers, given their prompts
TURN_TOKENS = SIZE + 1 + ANSWER_TOKENS
LENGTH = 4 * TURN_TOKENS  # two conversations in a row
TEMPLATE = (
    "{%- for message in messages -%}{{ message.content }}"
    "{{ eos_token if message.role == 'assistant' else 'i' }}{%- endfor -%}"
)
BLOCK = 4  # so that blocks begin inside questions and answers
OBJECTIVES: dict[str, dict[str, Any]] = {
    "ar": {},
    "block_diffusion": {"block_length": BLOCK, "exact_mask_counts": True},
    "block_refinement": {"block_length": BLOCK, "attention_mask_mode": "4d", "clean_context": True},
    "mdlm": {},
    "udlm": {},
    "hybrid": {},
    "dflash": {"draft_num_layers": 1, "block_size": 4, "num_anchors": 4},
}
STEPS = {  # that teach the answers, and little more
    "ar": 300,
    "block_diffusion": 250,
    "block_refinement": 250,
    "mdlm": 1000,
    "udlm": 4000,
    "hybrid": 4000,
    "dflash": 500,
}
MODELS = {"mdlm": "builtin:bert-tiny", "udlm": "builtin:dit-tiny", "hybrid": "builtin:bert-tiny"}
SAMPLERS: dict[str, dict[str, Any]] = {
    "ar": {"name": "ar", "max_new_tokens": ANSWER_TOKENS},
    "block_diffusion": {
        "name": "sdar",
        "max_new_tokens": ANSWER_TOKENS,
        "denoising_steps": BLOCK,
        "remasking_strategy": "low_confidence_static",
    },
    "block_refinement": {"name": "block_refinement", "gen_length": ANSWER_TOKENS, "threshold": 0.9},
    "dflash": {"name": "dflash", "max_new_tokens": ANSWER_TOKENS},
}
# Slots of the samplers that fill rows of one length: an answer ends inside, and EOS fills the rest.
SLOT = 2 * ANSWER_TOKENS


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """
    Attributes:
        exact: share of unseen questions answered right, the end included.
        bound: nats per token of answers held out, given their prompts; None of a draft.
        error: its standard error.
        accepted: tokens of a block of a draft; None of others.
    """

    objective: str
    train_on: str
    exact: float
    bound: float | None
    error: float
    accepted: float | None
    seconds: float


def language_of(objective: str) -> str:
    """Whole rows of masks learn to look the same distance back long before they learn to count."""
    return "next" if objective in MODELS else "reverse"


def answer_to(question: str, end: str, language: str) -> str:
    if language == "reverse":
        return question[::-1] + end
    return "".join(LETTERS[LETTERS.index(letter) - len(LETTERS) + 1] for letter in question) + end


def conversations(count: int, language: str, *, seed: int) -> list[list[dict[str, str]]]:
    """Of two turns each; no question is asked twice as a second one."""
    rng = np.random.default_rng(seed)
    numbers = rng.choice(len(LETTERS) ** SIZE, size=count, replace=False)
    firsts = rng.integers(len(LETTERS) ** SIZE, size=count)
    found = []
    for pair in zip(firsts, numbers, strict=True):
        turns = []
        for number in pair:
            digits = number // len(LETTERS) ** np.arange(SIZE) % len(LETTERS)
            question = "".join(LETTERS[digit] for digit in digits)
            answer = answer_to(question, ENDS[rng.integers(len(ENDS))], language)
            turns.append({"role": "user", "content": question})
            turns.append({"role": "assistant", "content": answer})
        found.append(turns)
    return found


def shards(folder: Path, *, train_on: str, fill_answers: bool) -> Path:
    out = folder / f"data-{train_on}-{fill_answers}"
    if not out.exists():
        flags = [
            *("--dataset_name", "jsonl", "--data_files", str(folder / "chats.jsonl")),
            *("--tokenizer_name_or_path", str(folder / "tokenizer"), "--train_on", train_on),
            *("--fill_answers", str(fill_answers).lower(), "--max_length", str(LENGTH)),
            *("--heldout_fraction", "0.1", "--enabled", "false", "--output_dir", str(out)),
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            code = preprocess.main(flags)
        assert code == 0
    return out


def train(name: str, data: Path, folder: Path, *, steps: int, target: Path | None) -> Path:
    source = (
        {"model_name_or_path": MODELS.get(name, "builtin:qwen3-tiny")}
        if target is None
        else {"target_model_id": str(target)}
    )
    config = TrainConfig.model_validate(
        {
            **source,
            "objective": {"name": name, **OBJECTIVES[name]},
            "max_train_steps": steps,
            "per_device_train_batch_size": 32,
            "learning_rate": 3e-3,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": steps // 20,
            "checkpointing_steps": steps,
        }
    )
    return train_in_process(config, TokenData.open(data, split="train"), folder)


def bound_of(checkpoint: Path, data: Path) -> tuple[float, float]:
    """Of held-out answers: nats per token, and its standard error."""
    config = EvaluateConfig(num_mask_samples=8, batch_size=32)
    heldout = TokenData.open(data, split="heldout")
    rows = heldout.read(*evaluation_rows(heldout, seed=0, max_rows=128))
    found = Evaluator(checkpoint, config, device="cpu").bounds(rows)
    bound = summarize(found["nats"], found["num_tokens"], found["num_bytes"])
    return bound.nats_per_token, bound.standard_error


def accepted_by(draft: Path, data: Path) -> float:
    heldout = TokenData.open(data, split="heldout")
    rows = heldout.read(*evaluation_rows(heldout, seed=0, max_rows=128))
    blocks = DraftEvaluator(draft, EvaluateConfig(batch_size=32), device="cpu").acceptance(rows)
    return acceptance_figures(blocks["blocks"])["expected_acceptance_length"]


def exact_answers(
    name: str, checkpoint: Path, asked: Sequence[list[dict[str, str]]], *, target: Path | None
) -> float:
    """Share of second questions whose answers are right to the end, drawn at temperature 1."""
    models = (
        {"checkpoint_path": str(checkpoint)}
        if target is None
        else {"target_model_id": str(target), "draft_model_id": str(checkpoint)}
    )
    rows = [GenerationRow(id=at, prompt=turns[:-1]) for at, turns in enumerate(asked)]
    fields: dict[str, Any] = {**models, "batch_size": 64}
    if name in SAMPLERS:
        config = GenerateConfig.model_validate({**fields, "sampler": SAMPLERS[name]})
        records = CompletionModel(config, checkpoint=checkpoint).sample(rows)
    else:
        length = 2 * TURN_TOKENS - ANSWER_TOKENS + SLOT
        sampler = {"name": "ancestral", "num_inference_steps": 32}
        config = GenerateConfig.model_validate({**fields, "sampler": sampler, "seq_len": length})
        records = list(SamplingModel(checkpoint, config, device="cpu").samples(rows))
    language = language_of(name)
    return float(np.mean([*map(partial(is_right, language=language), records, asked)]))


def is_right(record: dict[str, Any], turns: list[dict[str, str]], language: str) -> bool:
    new = record["tokens"][record["num_prompt_tokens"] :]
    # Samplers that stop leave the stop token out; the others fill the slot with it.
    has_ended = record["finish_reason"] == "stop" or set(new[ANSWER_TOKENS - 1 :]) == {EOS}
    answers = {answer_to(turns[-2]["content"], end, language) for end in ENDS}
    return has_ended and record["completion"] in answers


def run(
    names: Sequence[str], *, steps: int | None, num_train: int, num_asked: int, root: Path
) -> Iterator[Learnt]:
    """
    Args:
        steps: of each training; None takes those of STEPS.
    """
    targets: dict[str, Path] = {}
    for name in names:
        folder = root / name
        folder.mkdir()
        talks = conversations(num_train + num_asked, language_of(name), seed=0)
        lines = (json.dumps({"messages": turns}) + "\n" for turns in talks[:num_train])
        (folder / "chats.jsonl").write_text("".join(lines))
        tokenizer = letter_tokenizer()
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder / "tokenizer")
        fills = name in MODELS
        num_steps = steps or STEPS[name]
        judged = shards(folder, train_on="answers", fill_answers=False)
        for train_on in ("answers", "all"):
            start = time.perf_counter()
            data = shards(folder, train_on=train_on, fill_answers=fills and train_on == "answers")
            if name == "dflash" and train_on not in targets:
                out = folder / f"target-{train_on}"
                targets[train_on] = train("ar", data, out, steps=num_steps, target=None)
            target = targets[train_on] if name == "dflash" else None
            final = train(name, data, folder / train_on, steps=num_steps, target=target)
            bound, error = (None, 0.0) if target else bound_of(final, judged)
            yield Learnt(
                objective=name,
                train_on=train_on,
                exact=exact_answers(name, final, talks[num_train:], target=target),
                bound=bound,
                error=error,
                accepted=accepted_by(final, judged) if target else None,
                seconds=time.perf_counter() - start,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact answers of small models that learn chats.")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--steps", type=int, help="of each; by default what it takes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{SIZE} of {len(LETTERS)} letters, two turns; steps of 32 rows, as many on both sides")
    print(f"entropy of the answers given their prompts: {ENTROPY:.4f} nats per token")
    titles = ("exact", "nats per token", "accepted", "s")
    print(f"{'objective':<18}{'loss on':<10}" + "{:>8}{:>20}{:>10}{:>6}".format(*titles))
    with tempfile.TemporaryDirectory() as folder, jobs_here():
        for found in run(
            args.objectives, steps=args.steps, num_train=3000, num_asked=256, root=Path(folder)
        ):
            bound = "" if found.bound is None else f"{found.bound:.4f} ± {found.error:.4f}"
            accepted = "" if found.accepted is None else f"{found.accepted:.2f}"
            print(
                f"{found.objective:<18}{found.train_on:<10}{found.exact:>8.1%}{bound:>20}"
                f"{accepted:>10}{found.seconds:>6.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
