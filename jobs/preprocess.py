"""Text to packed token shards.

Reads files, a Hugging Face dataset or the built-in corpus, tokenizes, packs documents into rows of
max_length, keeps a part for evaluation, and writes Parquet shards with a manifest. Rows that cannot
be used are left out and named in errors/; more than max_errors of them fail the job.

    python -m jobs.preprocess --dataset_name text --data_files 'corpus/*.txt' \\
        --output_dir corpus-output
"""

import sys
from collections.abc import Sequence

from jobs import cli


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = cli.parse(
        argv,
        prog="jobs.preprocess",
        description=__doc__,
        sections=("preprocess", "cluster", "tracking"),
        hidden=(
            "cluster.num_workers",
            "cluster.num_actors",
            "cluster.min_actors",
            "cluster.gpus_per_actor",
            "cluster.use_gpu",
            "cluster.cpus_per_worker",
            "cluster.threads_per_worker",
            "cluster.max_failures",
            "cluster.worker_start_timeout_s",
        ),
    )
    from pipelines.builders import preprocess_stage
    from pipelines.registered import with_models
    from pipelines.runner import run_job

    config = with_models(args.config)
    stage = preprocess_stage(config, folder=config.preprocess.output_dir or "preprocess-output")
    cli.print_result(run_job([stage], config), as_json=args.json)
    return cli.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
