"""Train a discrete-diffusion language model: text or packed rows to a checkpoint.

--output_dir gets checkpoint-N/ and final/; running the same command again resumes. Without
--data_path the dataset is preprocessed first, into output_dir/data.

    python -m jobs.train --objective mdlm --model_name_or_path bert-base-uncased \\
        --dataset_name wikitext --dataset_config_name wikitext-2-raw-v1 --text_column text \\
        --output_dir mdlm-output --max_train_steps 1000
"""

import sys
from collections.abc import Sequence

from jobs import cli


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = cli.parse(
        argv,
        prog="jobs.train",
        description=__doc__,
        sections=("train", "preprocess", "cluster", "tracking"),
        hidden=("cluster.num_actors", "cluster.min_actors", "cluster.gpus_per_actor"),
    )
    from pipelines.builders import preprocess_stage, train_stage
    from pipelines.paths import input_path
    from pipelines.registered import with_models
    from pipelines.runner import run_job

    config = with_models(args.config)
    output_dir = config.train.output_dir or "train-output"
    if config.train.data_path is not None:
        data_path = input_path(config.train.data_path, what="data_path")
        stages = [train_stage(config, folder=output_dir, data_path=data_path)]
    else:
        data = preprocess_stage(config, folder=config.preprocess.output_dir or f"{output_dir}/data")
        train = train_stage(
            config,
            folder=output_dir,
            data_path=data.output,
            planned_length=config.preprocess.max_length,
        )
        stages = [data, train]
    cli.print_result(run_job(stages, config), as_json=args.json)
    return cli.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
