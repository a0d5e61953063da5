"""Sample from a checkpoint, in batches, on any number of actors, or continue prompts with it or
with any causal language model.

Writes part files (jsonl or Parquet) with id, prompt, tokens, text and model calls, and errors/ with
the prompts that could not be used; running the same command again goes on where it stopped.

    python -m jobs.generate --checkpoint_path mdlm-output/final --num_samples 4 --seq_len 64 \\
        --num_inference_steps 128 --output_dir mdlm-output/samples
    python -m jobs.generate --model_id JetLM/SDAR-1.7B-Chat --sampler sdar --block_length 4 \\
        --denoising_steps 4 --max_new_tokens 256 --use_chat_template --add_generation_prompt \\
        --prompt "Explain what reinforcement learning is in simple terms."
    python -m jobs.generate --sampler dflash --draft_model_id z-lab/Qwen3-8B-DFlash-b16 \\
        --target_model_id Qwen/Qwen3-8B --max_new_tokens 256 --use_chat_template \\
        --add_generation_prompt --measure_speedup true --prompt "How many divisors has 196?"
"""

import sys
from collections.abc import Sequence
from typing import Any

from jobs import cli
from tokendiff.errors import InputError

_SHOWN = 4
_READ = 1000  # most records that these are chosen from: not all of a million samples


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = cli.parse(
        argv,
        prog="jobs.generate",
        description=__doc__,
        sections=("generate", "cluster", "tracking"),
        hidden=("cluster.num_workers", "cluster.max_failures"),
        default_sampler=_default_sampler,
    )
    config = args.config.generate
    models = ("checkpoint_path", "model_id", "target_model_id", "draft_model_id")
    if config is None or not any(getattr(config, name) for name in models):
        raise InputError(
            "--checkpoint_path is missing: give a checkpoint-N or final folder of jobs.train; or "
            "--model_id, a causal language model or a published denoiser (LLaDA, Dream); or, for "
            "sampler dflash, --target_model_id and --draft_model_id"
        )
    from pipelines.builders import generate_stage, in_own_folder
    from pipelines.registered import checkpoint_folder, with_models
    from pipelines.runner import run_job
    from pipelines.tables import failure_of, printable, to_read
    from tokendiff.data.samples import first_records

    checkpoint = config.checkpoint_path and checkpoint_folder(config.checkpoint_path, args.config)
    stage = generate_stage(
        with_models(args.config, ("generate",)),
        folder=config.output_dir or "generate-output",
        checkpoint_path=checkpoint,
    )
    if config.output_dir is None:
        stage = in_own_folder(stage, checkpoint)
    result = run_job([stage], args.config)
    if not args.json:
        read = first_records(stage.output, min(_SHOWN * config.num_samples, _READ))
        shown = _of_many_prompts(read, _SHOWN)
        for record in shown:
            print(f"--- {record['id']}\n{printable(to_read(record))}")
            if record["completion"] == "":
                print("(nothing: it ended at once)")
        print(f"--- {len(shown)} of {result['rows']} samples are shown")
    cli.print_result(result, as_json=args.json)
    message = failure_of([result])
    return cli.EXIT_OK if message is None else cli.fail(message)


def _of_many_prompts(records: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The first sample of each prompt, then others, up to `count`; in their order."""
    seen: set[str] = set()
    firsts: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for record in records:
        prompt = repr(record["prompt"])
        (others if prompt in seen else firsts).append(record)
        seen.add(prompt)
    return sorted([*firsts, *others][:count], key=lambda record: record["id"])


def _default_sampler(model_id: str) -> str:
    from tokendiff.models.default_sampler import default_sampler

    return default_sampler(model_id)


if __name__ == "__main__":
    sys.exit(main())
