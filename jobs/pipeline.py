"""Run a pipeline: preprocess, train, generate, evaluate, each stage once.

python -m jobs.pipeline run pipelines/quickstart.yaml
python -m jobs.pipeline plan pipelines/quickstart.yaml -o train.max_train_steps=200
python -m jobs.pipeline status pipelines/quickstart.yaml
"""

import sys
from collections.abc import Sequence

from jobs import cli

_COMMANDS = {
    "run": "run every stage that is not done, in order; resumes what was cut off",
    "plan": "check the file and print the stages, their keys and which are done; run nothing",
    "status": "print the results of the stages that are done",
}


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = cli.parse(argv, prog="jobs.pipeline", description=__doc__, commands=_COMMANDS)
    from pipelines import runner, tables
    from pipelines.paths import output_path
    from tokendiff.cluster.session import check_seen_by_all

    root = output_path(args.config.root)
    if args.command == "plan":
        check_seen_by_all(args.config.cluster, root)
        tables.print_plan(runner.plan(args.config, root), as_json=args.json)
        return cli.EXIT_OK
    work = runner.run_pipeline if args.command == "run" else runner.status
    results = work(args.config, root)
    tables.print_results(results, args.config, root, as_json=args.json)
    message = tables.failure_of(results)
    return cli.EXIT_OK if message is None else cli.fail(message)


if __name__ == "__main__":
    sys.exit(main())
