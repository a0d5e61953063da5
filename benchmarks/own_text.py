"""Does a real chat model write its own text faster, and with what beside it?

SmolLM2-135M-Instruct (`benchmarks.real_model`) answers prompts of one narrow kind: a Python class
with some fields. On its answers, adapters learn to fill blocks (self-speculation with `keep_base`),
and a DFlash draft does, each for the same processor time; the draft's includes that of reading the
answers with the model once (`cache_target_states`). Then prompts that neither has seen are answered
in turn by the model alone, by self-speculation and with the draft.

    python -m benchmarks.own_text FOLDER --minutes 60     # of one core, for each training

Printed are acceptance, tokens per pass of the model, and the speed against the model alone, by
wall-clock and by processor time, which other processes disturb less. Each part (the model, its
answers, their rows, the speed of a step, each training, each batch of the comparison) is kept in
FOLDER, and the same command goes on where it was cut off. `make own` installs the packages first.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_model import save_real_model
from tokendiff.cluster.target_states import cache_target_states
from tokendiff.config.cluster import ClusterConfig
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.train import TrainConfig
from tokendiff.data.prompts import GenerationRow
from tokendiff.data.rows import TokenData
from tokendiff.evaluation.acceptance import acceptance_metrics
from tokendiff.models.completion import CompletionModel
from tokendiff.training.run import train_in_process

NAMES = (
    *("Cat", "Horse", "Teacher", "Student", "Doctor", "Patient", "Driver", "Pilot", "Farmer"),
    *("Book", "Song", "Movie", "Recipe", "Letter", "Report", "Ticket", "Order", "Payment"),
    *("House", "Garden", "Bridge", "School", "Hospital", "Museum", "Factory", "Airport"),
    *("Bicycle", "Truck", "Ship", "Train", "Engine", "Battery", "Camera", "Printer", "Phone"),
    *("Planet", "River", "Mountain", "Island", "City"),
)
UNSEEN = ("Invoice", "Dog", "Library", "Tractor", "Singer", "Hotel", "Lamp", "Forest")
FIELDS = (
    *("name", "age", "color", "size", "weight", "price", "date", "title", "owner", "address"),
    *("speed", "height", "number", "status", "model", "year"),
)
PROMPTS_PER_NAME = 5
MAX_NEW_TOKENS, MAX_LENGTH, BLOCK, STEP_ROWS = 96, 160, 8, 4
PACE_STEPS = 4
ADAPTERS: dict[str, Any] = {
    "objective": {
        "name": "block_diffusion",
        "block_length": BLOCK,
        "predict": "next",
        "exact_mask_counts": True,
    },
    "keep_base": True,
    "lora_rank": 32,
    "lora_alpha": 32,
}
DRAFT: dict[str, Any] = {
    "objective": {
        "name": "dflash",
        "block_size": BLOCK,
        "draft_num_layers": 2,
        "num_anchors": 32,
    }
}


def questions(names: tuple[str, ...], *, per_name: int) -> list[str]:
    """The same for the same names; no two of one name have the same fields."""
    chosen = random.Random(len(names))
    asked = []
    for name in names:
        seen: set[tuple[str, ...]] = set()
        while len(seen) < per_name:
            seen.add(tuple(chosen.sample(FIELDS, 3)))
        asked += [
            f"Write a Python class {name} with the fields {a}, {b} and {c}."
            for a, b, c in sorted(seen)
        ]
    return asked


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


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(text)
    unfinished.replace(path)


def prepare(folder: Path) -> None:
    """The model, its answers, and rows of them; what is there already is left."""
    model, chats, data = folder / "model", folder / "answers.jsonl", folder / "data"
    if not (model / "tokenizer.json").is_file():  # written last
        save_real_model(model)
    if not chats.is_file():
        asked = questions(NAMES, per_name=PROMPTS_PER_NAME)
        alone = completer({"name": "ar"}, batch_size=32, model_id=str(model))
        lines = []
        for question, answer in zip(asked, alone.sample(rows_of(asked)), strict=True):
            said = [("user", question), ("assistant", answer["completion"])]
            messages = [{"role": role, "content": text} for role, text in said]
            lines.append(json.dumps({"messages": messages}) + "\n")
        write(chats, "".join(lines))
    if not (data / "MANIFEST.json").is_file():
        source = ("--dataset_name", "jsonl", "--data_files", str(chats))
        made = ("--tokenizer_name_or_path", str(model), "--max_length", str(MAX_LENGTH))
        # Held-out rows would be judged at every log line.
        how = ("--heldout_fraction", "0", "--enabled", "false", "--output_dir", str(data))
        job = [sys.executable, "-m", "jobs.preprocess", *source, *made, *how]
        subprocess.run(job, check=True)


def config_of(folder: Path, fields: dict[str, Any], *, steps: int) -> TrainConfig:
    model = "target_model_id" if fields["objective"]["name"] == "dflash" else "model_name_or_path"
    return TrainConfig.model_validate(
        {
            **fields,
            model: str(folder / "model"),
            "max_train_steps": steps,
            "per_device_train_batch_size": STEP_ROWS,
            "learning_rate": 1e-3,
            "lr_warmup_steps": min(10, steps),
            "logging_steps": 1,
            "checkpointing_steps": max(20, steps // 5),
            "checkpoints_total_limit": 1,
            "mixed_precision": "bf16",
        }
    )


def train(config: TrainConfig, folder: Path, out: Path, on_step: Callable[[int], None]) -> Path:
    def tell(event: str, **found: Any) -> None:
        if event == "metrics":
            on_step(found["step"])
            if found["step"] % 10 == 0:
                print(f"{out.name}, step {found['step']}: loss {found['loss']:.3f}", flush=True)

    return train_in_process(
        config, TokenData.open(folder / "data", split="train"), out, on_event=tell
    )


def measured(path: Path, measure: Callable[[], float]) -> float:
    """A figure that is measured once."""
    if not path.is_file():
        write(path, json.dumps(measure()))
    found: float = json.loads(path.read_text())
    return found


def read_once(folder: Path) -> float:
    """Keep what the model says of its answers; returns the seconds of processor time."""

    def read() -> float:
        start = time.process_time()
        cache_target_states(
            config_of(folder, DRAFT, steps=1),
            ClusterConfig(threads_per_worker=torch.get_num_threads()),  # as training has
            data_path=folder / "data",
            output_dir=folder / "states",
        )
        return time.process_time() - start

    return measured(folder / "states.json", read)


def seconds_of_a_step(folder: Path, name: str, fields: dict[str, Any]) -> float:
    """Of processor time, the median of some steps behind the first."""

    def measure() -> float:
        times: list[float] = []
        out = folder / f"pace-{name}-{os.getpid()}"
        config = config_of(folder, fields, steps=PACE_STEPS)
        train(config, folder, out, on_step=lambda step: times.append(time.process_time()))
        return statistics.median(end - begin for begin, end in pairwise(times))

    return measured(folder / f"pace-{name}.json", measure)


def train_for(folder: Path, name: str, fields: dict[str, Any], *, minutes: float) -> Path:
    """Train for as long, by the speed that was measured, and not by a clock: a run that is cut off
    goes on as the one that was not.
    """
    seconds = 60.0 * minutes
    if name == "draft":
        seconds -= read_once(folder)
        fields = {**fields, "target_states_path": str(folder / "states")}
    pace = seconds_of_a_step(folder, name, fields)
    steps = max(1, round(seconds / pace))
    print(f"{name}: {steps} steps of {pace:.2f} s of processor time", flush=True)
    config = config_of(folder, fields, steps=steps)
    return train(config, folder, folder / f"{name}-{steps}", on_step=lambda step: None)


def compare(folder: Path, trained: dict[str, Path], *, num_rows: int) -> list[dict[str, Any]]:
    """Each batch of unseen prompts, answered by all ways in turn; another one begins each time."""
    known = folder / f"compared-{'-'.join(path.parent.name for path in trained.values())}.jsonl"
    done = [json.loads(line) for line in known.read_text().splitlines()] if known.is_file() else []
    asked = rows_of(questions(UNSEEN, per_name=-(-num_rows // len(UNSEEN))))[:num_rows]
    for batch_size in (1, 8):
        ways = {
            "the model alone": completer(
                {"name": "ar"}, batch_size=batch_size, model_id=str(folder / "model")
            )
        }
        if "adapters" in trained:
            own, name = str(trained["adapters"]), "self_speculation"
            ways[name] = completer({"name": name}, batch_size=batch_size, checkpoint_path=own)
            ways[f"{name}, draft_ahead"] = completer(
                {"name": name, "draft_ahead": True}, batch_size=batch_size, checkpoint_path=own
            )
        if "draft" in trained:
            ways["dflash"] = completer(
                {"name": "dflash"},
                batch_size=batch_size,
                target_model_id=str(folder / "model"),
                draft_model_id=str(trained["draft"]),
            )
        for way in ways.values():  # the first pass of a model is slower
            way.sample(asked[:1])
        for number, begin in enumerate(range(0, len(asked), batch_size)):
            at = {"batch_size": batch_size, "begin": begin}
            if any(all(one[key] == at[key] for key in at) for one in done):
                continue
            first = number % len(ways)
            sides = {}
            for name in [*ways, *ways][first : first + len(ways)]:
                wall, processor = time.perf_counter(), time.process_time()
                records = ways[name].sample(asked[begin : begin + batch_size])
                sides[name] = {
                    "wall": time.perf_counter() - wall,
                    "processor": time.process_time() - processor,
                    "records": records,
                }
            done.append({**at, "sides": sides})
            with known.open("a") as lines:
                lines.write(json.dumps(done[-1]) + "\n")
    return done


def table(compared: list[dict[str, Any]]) -> Iterator[str]:
    yield (
        f"{'':<30}{'batch':>6}{'acceptance':>14}{'tokens a':>10}"
        f"{'tokens/s':>10}{'speed-up':>18}{'same':>7}"
    )
    yield (
        f"{'':<30}{'':>6}{'length':>14}{'pass':>10}{'wall':>10}{'wall':>8}{'processor':>10}"
        f"{'text':>7}"
    )
    for batch_size in (1, 8):
        sides = [one["sides"] for one in compared if one["batch_size"] == batch_size]
        alone = [side["the model alone"] for side in sides]
        written = [record["tokens"] for side in alone for record in side["records"]]
        for name in sides[0]:
            mine = [side[name] for side in sides]
            records = [record for side in mine for record in side["records"]]
            new = sum(len(one["tokens"]) - one["num_prompt_tokens"] for one in records)
            seconds = {
                clock: (sum(s[clock] for s in alone), sum(s[clock] for s in mine))
                for clock in ("wall", "processor")
            }
            speedups = [before / after for before, after in seconds.values()]
            same = statistics.mean(
                one["tokens"] == text for one, text in zip(records, written, strict=True)
            )
            figures = {} if name == "the model alone" else acceptance_metrics(records)
            length = figures.get("acceptance_length_mean")
            error = figures.get("acceptance_length_standard_error")
            accepted = "" if length is None else f"{length:.2f} ± {error:.2f}"
            passes = new / sum(one["num_model_calls"] for one in records)
            yield (
                f"{name:<30}{batch_size:>6}{accepted:>14}{passes:>10.2f}"
                f"{new / seconds['wall'][1]:>10.1f}{speedups[0]:>8.2f}{speedups[1]:>10.2f}"
                f"{same:>7.0%}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="processor time of each training"
    )
    parser.add_argument("--rows", type=int, default=16, help="unseen prompts that are answered")
    parser.add_argument(
        "--ways", nargs="+", choices=("draft", "adapters"), default=["draft", "adapters"]
    )
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    trained = {}
    for name, fields in (("draft", DRAFT), ("adapters", ADAPTERS)):
        if name not in arguments.ways:
            continue
        trained[name] = train_for(folder, name, fields, minutes=arguments.minutes)
    for line in table(compare(folder, trained, num_rows=arguments.rows)):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
