"""The console command `tokendiff`: the jobs under one name, and completion for a shell.

    tokendiff train --objective mdlm --data_files corpus.txt --output_dir mdlm-output
    tokendiff pipeline run quickstart
    source <(tokendiff completion bash)

`tokendiff JOB ...` is `python -m jobs.JOB ...`: the same flags, output and exit codes. Nothing but
the standard library is imported before a job is chosen.
"""

import sys
from collections.abc import Callable, Sequence

COMMANDS = {
    "preprocess": "tokenize and pack text into rows",
    "train": "train a model: text or rows to a checkpoint",
    "generate": "sample from a checkpoint, or continue prompts",
    "evaluate": "judge a checkpoint: bound, metrics, report",
    "pipeline": "run, plan, promote or inspect a whole pipeline file",
}
SHELLS = ("bash", "zsh")
_EXIT_BAD_INPUT = 2  # as `jobs.cli` has it, which takes longer to import than help to print


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if words else _EXIT_BAD_INPUT
    command, *rest = words
    if command == "--version":
        from tokendiff import __version__

        print(f"tokendiff {__version__}")
        return 0
    if command == "completion":
        return _print_completion(rest)
    if command not in COMMANDS:
        return _refuse(f"unknown command {command!r}{_closest(command)}")
    from jobs import cli

    with cli.called_as("tokendiff"):
        return main_of(command)(rest)


def main_of(command: str) -> Callable[[Sequence[str]], int]:
    """The `main` of a job in COMMANDS, which is imported now."""
    match command:
        case "preprocess":
            from jobs.preprocess import main as run
        case "train":
            from jobs.train import main as run
        case "generate":
            from jobs.generate import main as run
        case "evaluate":
            from jobs.evaluate import main as run
        case "pipeline":
            from jobs.pipeline import main as run
        case _:
            raise KeyError(command)
    return run


def _help() -> str:
    rows = {**COMMANDS, "completion": f"print a completion script for {' or '.join(SHELLS)}"}
    width = max(map(len, rows))
    return "\n".join(
        [
            "usage: tokendiff COMMAND ...",
            "",
            "Train and sample discrete-diffusion language models as jobs on a Ray cluster.",
            "",
            *(f"  {name:<{width}}  {text}" for name, text in rows.items()),
            "",
            "tokendiff COMMAND --help lists what a command takes; --version prints the version.",
        ]
    )


def _print_completion(words: Sequence[str]) -> int:
    if words in (["-h"], ["--help"]):
        print("usage: tokendiff completion {" + ",".join(SHELLS) + "}")
        print("\nTo load it in every shell: source <(tokendiff completion bash)")
        return 0
    if len(words) != 1 or words[0] not in SHELLS:
        found = " ".join(words) or "nothing"
        return _refuse(f"completion takes one of {', '.join(SHELLS)}, got {found}")
    from jobs.completion import script

    print(script(words[0]), end="")
    return 0


def _closest(word: str) -> str:
    import difflib

    close = difflib.get_close_matches(word, [*COMMANDS, "completion"], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _refuse(message: str) -> int:
    print(f"error: {message}\n       see tokendiff --help", file=sys.stderr)
    return _EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
