"""AdamW beside Muon: each objective on the built-in corpus, with the same model, rows and noise.

Printed is what held-out rows cost after the same steps (nats per token; of a draft how many tokens
of a block are accepted), and the time of a step. A draft's target is what `ar` has become.

    python -m benchmarks.optimizers [--steps 300] [--objectives mdlm ar] [--size tiny]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tokendiff.config.train import TrainConfig
from tokendiff.data.rows import TokenData
from tokendiff.training.run import train_in_process

MODELS = {
    "mdlm": "bert",
    "udlm": "dit",
    "hybrid": "dit",
    "block_refinement": "qwen3",
    "block_diffusion": "qwen3",
    "ar": "qwen3",
}
OBJECTIVES = [*MODELS, "dflash"]
DRAFT = {"name": "dflash", "draft_num_layers": 1, "num_anchors": 8}
WAYS: dict[str, dict[str, Any]] = {"adamw": {}, "muon": {"optimizer": "muon"}}


def rows_of_text(folder: Path) -> TokenData:
    command = [sys.executable, "-m", "jobs.preprocess", "--dataset_name", "builtin"]
    options = {"tokenizer_name_or_path": "bytes", "max_length": "64", "heldout_fraction": "0.05"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    subprocess.run([*command, *words, "--output_dir", str(folder)], check=True, capture_output=True)
    return TokenData.open(folder, split="train")


def trained(config: TrainConfig, data: TokenData, folder: Path) -> tuple[str, float]:
    """What held-out rows say at the end, and seconds a step."""
    found: dict[str, Any] = {}

    def keep(event: str, **fields: Any) -> None:
        if event == "heldout":
            found.update(fields)

    start = time.perf_counter()
    train_in_process(config, data, folder, on_event=keep)
    seconds = (time.perf_counter() - start) / config.max_train_steps
    of_draft = found.get("heldout_acceptance_length")
    value = found["heldout_nats_per_token"] if of_draft is None else of_draft
    return f"{value:.4f} ± {found['heldout_standard_error']:.4f}", seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--muon_learning_rate", type=float, default=0.02)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    WAYS["muon"]["muon_learning_rate"] = arguments.muon_learning_rate
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = rows_of_text(folder / "data")
        for objective in arguments.objectives:
            for way in arguments.ways:
                fields: dict[str, Any] = {
                    "objective": objective,
                    "max_train_steps": arguments.steps,
                    "per_device_train_batch_size": 32,
                    "learning_rate": arguments.learning_rate,
                    "lr_warmup_steps": arguments.steps // 10,
                    "lr_scheduler": "cosine",
                    "adam_beta2": 0.98,
                    "checkpointing_steps": arguments.steps,
                    "eval_steps": arguments.steps,
                    "max_eval_rows": 400,
                    **WAYS[way],
                }
                if objective == "dflash":
                    fields["objective"] = {
                        "name": "dflash",
                        "draft_num_layers": 1,
                        "num_anchors": 8,
                    }
                    fields["target_model_id"] = str(folder / "ar-adamw" / "final")
                else:
                    fields["model_name_or_path"] = f"builtin:{MODELS[objective]}-{arguments.size}"
                config = TrainConfig.model_validate(fields)
                value, seconds = trained(config, data, folder / f"{objective}-{way}")
                print(f"{objective:<17}{way:<7}{value:>18}{1000 * seconds:8.1f} ms", flush=True)


if __name__ == "__main__":
    main()
