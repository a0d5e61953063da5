"""Run a pipeline: its stages, each once, each behind what it is made from.

python -m jobs.pipeline run pipelines/quickstart.yaml
python -m jobs.pipeline plan pipelines/quickstart.yaml -o train.max_train_steps=200
python -m jobs.pipeline status pipelines/quickstart.yaml
python -m jobs.pipeline watch pipelines/quickstart.yaml
python -m jobs.pipeline compare output/one --with output/other --page comparison.html
python -m jobs.pipeline clean pipelines/quickstart.yaml -o runner.keep_runs=7 --dry_run

Exit codes: 0 done; 1 failed; 2 the config or its input cannot be used; 3 a gate was not passed;
4 another run of the pipeline is under way; 130 interrupted (Ctrl-C); 143 stopped by SIGTERM.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs import cli

_COMMANDS = {
    "run": "run every stage that is not done; goes on with what was interrupted",
    "plan": "check the file and print the stages, their keys, what would run and why; run nothing",
    "promote": "run the promote stages alone: check the gate, move the champion if it is passed",
    "rollback": "move the champion back to the version that it replaced",
    "clean": "delete stage folders that none of the last runner.keep_runs runs used; never what a "
    "registered model holds",
    "status": "print the last runs, and how the stages stand",
    "watch": "show how far each stage is, again and again while one runs; takes a folder too",
    "compare": "write a page of two runs side by side; takes their folders",
}
_SELECTION = {
    "from": "start at these stages: run them and what is made from them",
    "to": "end at these stages: run them and what they are made from",
    "only": "run these stages alone",
    "force": "run these stages again, even if they are done",
}


def _add_options(command: str, parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(**dict.fromkeys(_SELECTION, ()))
    if command in ("run", "plan"):
        for name, text in _SELECTION.items():
            parser.add_argument(
                f"--{name}", nargs="+", action="extend", default=[], metavar="STAGE", help=text
            )
    if command == "plan":
        parser.add_argument("--mermaid", action="store_true", help="print a Mermaid graph")
    if command == "watch":
        parser.add_argument(
            "--page",
            type=Path,
            metavar="FILE.html",
            help="write a page too, which a browser loads again every five seconds",
        )
    if command == "compare":
        parser.add_argument(
            "--with", type=Path, metavar="FOLDER", required=True, help="the other run"
        )
        parser.add_argument(
            "--page",
            type=Path,
            metavar="FILE.html",
            default=Path("comparison.html"),
            help="file that the page is written to (comparison.html)",
        )
    if command == "clean":
        parser.add_argument(
            "--dry_run", action="store_true", help="print what would be deleted, and delete nothing"
        )
    if command == "status":
        parser.add_argument(
            "--runs", type=int, default=5, metavar="INT", help="number of runs to print (5)"
        )


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = cli.parse(
        argv,
        prog="jobs.pipeline",
        description=__doc__,
        commands=_COMMANDS,
        add_options=_add_options,
        folders=("watch", "compare"),
    )
    if args.command == "watch":
        return _watch(args)
    if args.command == "compare":
        return _compare(args)
    from pipelines import promotion, runner, tables
    from pipelines.paths import output_path
    from pipelines.record import EXIT_CODES, last_runs
    from pipelines.schedule import Selection
    from tokendiff.cluster.session import check_seen_by_all
    from tokendiff.errors import CorruptFileError, InputError

    config, options = args.config, args.options
    root = output_path(config.root)
    if args.command == "status":
        runs = last_runs(root / config.name, options.runs)
        if not args.json:  # they are told though the stages cannot be, as where the corpus is away
            tables.print_runs(runs)
        try:
            plan = runner.plan(config, root)
        except (InputError, CorruptFileError) as error:
            if args.json:
                known = tables.status_as_json(runs, runner.Plan(steps=[], notes=[]))
                cli.print_result({**known, "error": str(error)}, as_json=True)
            raise
        if args.json:
            cli.print_result(tables.status_as_json(runs, plan), as_json=True)
        else:
            tables.print_status(runs, plan, config, root)
        return cli.EXIT_OK
    if args.command == "clean":
        from pipelines.retention import clean

        items = clean(config, root, is_dry_run=options.dry_run)
        if args.json:
            cli.print_result(tables.cleaned_as_json(items), as_json=True)
        else:
            tables.print_cleaned(items, is_dry_run=options.dry_run)
        return cli.EXIT_OK
    if args.command == "rollback":
        cli.print_result(promotion.roll_back(config, root), as_json=args.json)
        return cli.EXIT_OK
    if args.command == "promote":
        options.only = list(promotion.promote_sections(config))
    selection = Selection(
        start=tuple(getattr(options, "from")),
        end=tuple(options.to),
        only=tuple(options.only),
        force=tuple(options.force),
    )
    if args.command == "plan":
        check_seen_by_all(config.cluster, root)
        plan = runner.plan(config, root, selection)
        if args.json:
            cli.print_result(tables.plan_as_json(plan), as_json=True)
        elif options.mermaid:
            print("\n".join(tables.mermaid(plan.steps)))
        else:
            tables.print_plan(plan, root / config.name)
        return cli.EXIT_OK
    record = runner.run_pipeline(config, root, selection)
    if args.json:
        cli.print_result(record.as_json(), as_json=True)
    else:
        tables.print_record(record, config, root)
    message = tables.failure_of(stage.result for stage in record.stages)
    return EXIT_CODES[record.state] if message is None else cli.fail(message)


def _folder(args: cli.Arguments) -> Path:
    """The folder that was given, or that of the pipeline whose file was given.

    Raises:
        InputError: the pipeline is behind a URI, and another machine has the logs of its runs.
    """
    from pipelines.paths import output_path
    from tokendiff.artifacts.locations import mirror_of
    from tokendiff.errors import InputError
    from tokendiff.tracking.live import logs_under

    folder: Path = args.options.config
    if folder.is_dir():
        return folder
    place = output_path(args.config.root) / args.config.name
    here = mirror_of(place)
    if here != place and not logs_under(here):
        raise InputError(
            f"{place}: the machine that runs this pipeline keeps the logs that `{args.command}` "
            "reads, and this one has none; use it there. `status` tells from any machine how a run "
            "stands"
        )
    return here


def _compare(args: cli.Arguments) -> int:
    from pipelines.side_by_side import write_side_by_side

    page = args.options.page
    write_side_by_side(page, _folder(args), getattr(args.options, "with"))
    cli.print_result({"page": str(page.absolute())}, as_json=args.json)
    return cli.EXIT_OK


def _watch(args: cli.Arguments) -> int:
    from pipelines import watch

    folder = _folder(args)
    if args.json:
        cli.print_result(watch.as_json(watch.standings(folder)), as_json=True)
    else:
        watch.watch(folder, page=args.options.page)
    return cli.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
