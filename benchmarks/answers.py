"""Does a small model answer? A made-up language, a few minutes of training, exact matches counted.

A document is some letters, a colon, and the same letters in reverse (or in order), then EOS. Each
block objective trains a model on it from nothing, with the question kept clean (`prompt_length`);
then every sampler that goes with it answers questions that were not among the training rows.

    python -m benchmarks.answers              # what `make toy` runs
    python -m benchmarks.answers --language sort --steps 1500
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.builders import letter_tokenizer, token_folder
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.train import TrainConfig
from tokendiff.data.prompts import GenerationRow
from tokendiff.data.rows import TokenData
from tokendiff.models.completion import CompletionModel
from tokendiff.training.run import train_in_process

LETTERS, SIZE = "abcdefgh", 5  # of the alphabet, and of a question
COLON, EOS = "i", 2
LENGTH, PROMPT = 2 * SIZE + 2, SIZE + 1
BLOCK = 4  # so that the first block of an answer begins with the end of its question

MODELS: dict[str, dict[str, Any]] = {
    "block_refinement 2d": {"name": "block_refinement", "prompt_length": PROMPT},
    "block_refinement 2d, CAP": {
        "name": "block_refinement",
        "prompt_length": PROMPT,
        "lambda_conf": 1.0,
        "conf_temperature": 0.5,
    },
    "block_refinement 4d, clean": {
        "name": "block_refinement",
        "prompt_length": PROMPT,
        "attention_mask_mode": "4d",
        "clean_context": True,
    },
    "block_diffusion": {"name": "block_diffusion"},
    "block_diffusion, exact counts": {"name": "block_diffusion", "exact_mask_counts": True},
}
_REFINEMENT: dict[str, dict[str, Any]] = {
    "quota of 1": {"num_inference_steps": BLOCK, "threshold": 2.0},
    "threshold 0.9": {"num_inference_steps": BLOCK, "threshold": 0.9},
    "2 steps, edited": {
        "num_inference_steps": 2,
        "threshold": 0.9,
        "editing_threshold": 0.9,
        "max_post_steps": 2,
    },
}
_SDAR: dict[str, dict[str, Any]] = {
    "sequential": {},
    "low_confidence_static": {},
    "low_confidence_dynamic": {"confidence_threshold": 0.9},
    "entropy_bounded": {"entropy_threshold": 0.2},
}


@dataclass(frozen=True, kw_only=True)
class Answers:
    """How one sampler did with one model.

    Attributes:
        exact: share of the questions whose whole answer is right, its end included.
    """

    model: str
    sampler: str
    strategy: str
    exact: float
    tokens_per_forward: float


def answer_to(question: str, language: str) -> str:
    return question[::-1] if language == "reverse" else "".join(sorted(question))


def some_questions(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(LETTERS) ** SIZE, size=count, replace=False)
    digits = chosen[:, None] // len(LETTERS) ** np.arange(SIZE) % len(LETTERS)
    return ["".join(LETTERS[digit] for digit in row) for row in digits]


def write_language(folder: Path, questions: list[str], language: str) -> TokenData:
    tokenizer = letter_tokenizer()
    texts = [question + COLON + answer_to(question, language) for question in questions]
    rows = [[*tokenizer(text)["input_ids"], EOS] for text in texts]
    token_folder(folder, files=[rows], max_length=LENGTH, tokenizer=tokenizer, row_group_rows=1024)
    return TokenData.open(folder, split="train")


def train_model(objective: dict[str, Any], data: TokenData, folder: Path, *, steps: int) -> Path:
    config = TrainConfig.model_validate(
        {
            "model_name_or_path": "builtin:qwen3-tiny",
            "objective": {**objective, "block_length": BLOCK},
            "max_train_steps": steps,
            "per_device_train_batch_size": 64,
            "learning_rate": 3e-3,
            "lr_warmup_steps": steps // 20,
            "checkpointing_steps": steps,
        }
    )
    return train_in_process(config, data, folder)


def samplers_of(objective: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(sampler, strategy, fields) of all that decode a model of this objective."""
    for strategy, fields in _REFINEMENT.items():
        yield "block_refinement", strategy, {"gen_length": SIZE + 1, **fields}
    if objective["name"] == "block_diffusion" or objective.get("attention_mask_mode") == "4d":
        for strategy, fields in _SDAR.items():
            yield (
                "sdar",
                strategy,
                {
                    "max_new_tokens": SIZE + 1,
                    "denoising_steps": BLOCK,
                    "temperature": 0.0,
                    "remasking_strategy": strategy,
                    **fields,
                },
            )


def ask(checkpoint: Path, sampler: dict[str, Any], questions: list[str], language: str) -> Any:
    """(share of exact answers, tokens per forward pass)."""
    config = GenerateConfig.model_validate(
        {"checkpoint_path": str(checkpoint), "sampler": sampler, "batch_size": 64}
    )
    rows = [GenerationRow(id=at, prompt=text + COLON) for at, text in enumerate(questions)]
    records = CompletionModel(config, checkpoint=checkpoint).sample(rows)
    exact = [
        record["completion"] == answer_to(question, language) and record["finish_reason"] == "stop"
        for record, question in zip(records, questions, strict=True)
    ]
    new = sum(len(record["tokens"]) - record["num_prompt_tokens"] for record in records)
    return np.mean(exact), new / sum(record["num_model_calls"] for record in records)


def run(
    names: list[str], *, language: str, steps: int, num_train: int, num_asked: int, folder: Path
) -> Iterator[Answers]:
    questions = some_questions(num_train + num_asked, seed=0)
    data = write_language(folder / "data", questions[:num_train], language)
    for name in names:
        objective = MODELS[name]
        final = train_model(objective, data, folder / name.replace(" ", "-"), steps=steps)
        for sampler, strategy, fields in samplers_of(objective):
            asked = questions[num_train:]
            exact, speed = ask(final, {"name": sampler, **fields}, asked, language)
            yield Answers(
                model=name,
                sampler=sampler,
                strategy=strategy,
                exact=float(exact),
                tokens_per_forward=speed,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact answers of small models.")
    parser.add_argument("--language", choices=("reverse", "sort"), default="reverse")
    parser.add_argument("--steps", type=int, default=800)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.language} {SIZE} of {len(LETTERS)} letters; {args.steps} steps of 64 rows")
    print(f"{'model':<31}{'sampler':<18}{'strategy':<24}{'exact':>7}{'tokens/forward':>16}")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        for row in run(
            list(MODELS),
            language=args.language,
            steps=args.steps,
            num_train=8000,
            num_asked=256,
            folder=Path(folder),
        ):
            print(
                f"{row.model:<31}{row.sampler:<18}{row.strategy:<24}{row.exact:>7.1%}"
                f"{row.tokens_per_forward:>16.2f}",
                flush=True,
            )
        print(f"{time.perf_counter() - start:,.0f} s")


if __name__ == "__main__":
    main()
