"""Judge a checkpoint: the bound on held-out rows, metrics of its samples, and an HTML report.

--verify adds a certificate, and the job ends with exit code 1 if a check fails. --tasks adds tasks
of lm-evaluation-harness. --time_passes true prints what speculative decoding would gain on this
machine. Figures by row (rows.parquet, documents/) let a gate tell the difference of two checkpoints
from chance.

    python -m jobs.evaluate --checkpoint_path mdlm-output/final \\
        --samples_path mdlm-output/samples --output_dir mdlm-output/evaluation
    python -m jobs.evaluate --checkpoint_path mdlm-output/final --tasks builtin
"""

import sys
from collections.abc import Sequence

from jobs import cli
from tokendiff.errors import InputError


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = cli.parse(
        argv,
        prog="jobs.evaluate",
        description=__doc__,
        sections=("evaluate", "cluster", "tracking"),
        hidden=(
            "cluster.num_workers",
            "cluster.max_failures",
            "cluster.min_actors",
            "cluster.gpus_per_actor",
        ),
    )
    config = args.config.evaluate
    if config is None or config.checkpoint_path is None:
        raise InputError(
            "--checkpoint_path is missing: a checkpoint-N or final folder of jobs.train"
        )
    from pipelines.builders import evaluate_stage, in_own_folder
    from pipelines.paths import input_path
    from pipelines.registered import checkpoint_folder
    from pipelines.runner import run_job
    from pipelines.tables import table_lines, verified_lines
    from tokendiff.artifacts.manifest import fetch, load_manifest
    from tokendiff.evaluation.pass_times import outlook_tables
    from tokendiff.verification.certificate import failure, read_certificate

    checkpoint = checkpoint_folder(config.checkpoint_path, args.config)
    data = config.data_path and input_path(config.data_path, what="data_path")
    samples = config.samples_path and input_path(config.samples_path, what="samples_path")
    stage = evaluate_stage(
        args.config,
        folder=config.output_dir or "evaluate-output",
        checkpoint_path=checkpoint,
        data_path=data,
        samples_path=samples,
    )
    if config.output_dir is None:
        stage = in_own_folder(stage, checkpoint, data, samples)
    result = run_job([stage], args.config)
    checks = read_certificate(fetch(stage.output))
    if checks and not args.json:
        print("\n".join(verified_lines(checks)))
    if config.time_passes and not args.json:
        metrics = load_manifest(stage.output).metadata["metrics"]
        print("\n".join(table_lines(outlook_tables(metrics))))
    cli.print_result(result, as_json=args.json)
    message = failure(checks)
    return cli.EXIT_OK if message is None else cli.fail(message)


if __name__ == "__main__":
    sys.exit(main())
