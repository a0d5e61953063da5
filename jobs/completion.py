"""Completion scripts for bash and zsh, made from the parsers of the jobs.

A script holds all that can be completed, so that pressing the tab key starts no Python. zsh reads
the same function through its own `bashcompinit`.
"""

import argparse
import shlex
from collections.abc import Iterable, Mapping

from jobs import cli
from jobs.console import COMMANDS, SHELLS, main_of
from tokendiff.config.loader import walk_fields
from tokendiff.config.pipeline import Config

_FUNCTION = """\
_tokendiff_offer() {
    local word
    COMPREPLY=()
    while IFS= read -r word; do COMPREPLY+=("$word"); done < <(compgen "$@")
}

_tokendiff() {
    local word="${COMP_WORDS[COMP_CWORD]}" before="" job="${COMP_WORDS[1]}" key
    ((COMP_CWORD > 0)) && before="${COMP_WORDS[COMP_CWORD - 1]}"
    if ((COMP_CWORD == 1)); then
        _tokendiff_offer -W "@COMMANDS@" -- "$word"
        return
    fi
    key="$job"
    ((COMP_CWORD > 2)) && [[ $job == pipeline ]] && key="pipeline ${COMP_WORDS[2]}"
    case "$before" in
    -o | --override)
        # bash takes "=" for the end of a word: what stands behind it is the user's.
        _tokendiff_offer -S = -W "@FIELDS@" -- "$word"
        [[ -n ${BASH_VERSION:-} ]] && compopt -o nospace 2>/dev/null
        return
        ;;
    esac
    case "$key $before" in
@VALUES@
    esac
    case "$key" in
@FLAGS@
    esac
    _tokendiff_offer -f -- "$word"
}

complete -o filenames -o bashdefault -F _tokendiff tokendiff
"""


def script(shell: str) -> str:
    """What `source` takes in `shell`, one of `jobs.console.SHELLS`."""
    assert shell in SHELLS, shell
    flags: list[str] = []
    values: list[str] = []
    for command in COMMANDS:
        parser = cli.parser_of(main_of(command))
        for key, one in _parsers(command, parser).items():
            flags.append(_branch(key, _flags(one)))
            values += [_branch(f"{key} {flag}", words) for flag, words in _values(one).items()]
        if commands := _subcommands(parser):
            flags.append(_branch(command, commands, only_flags=False))
    flags.append(_branch("completion", SHELLS, only_flags=False))
    fields = [".".join(path) for path, _, _ in walk_fields(Config)]
    body = _FUNCTION.replace("@COMMANDS@", " ".join([*COMMANDS, "completion"]))
    body = body.replace("@FIELDS@", " ".join(dict.fromkeys(fields)))
    body = body.replace("@VALUES@", "\n".join(values)).replace("@FLAGS@", "\n".join(flags))
    start = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
    return f"# tokendiff completion for {shell}\n" + (start if shell == "zsh" else "") + body


def _parsers(
    command: str, parser: argparse.ArgumentParser
) -> Mapping[str, argparse.ArgumentParser]:
    subparsers = _subcommands(parser)
    if not subparsers:
        return {command: parser}
    return {f"{command} {name}": one for name, one in subparsers.items()}


def _subcommands(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    return [flag for action in shown for flag in action.option_strings if flag.startswith("--")]


def _values(parser: argparse.ArgumentParser) -> dict[str, tuple[str, ...]]:
    """Flag -> the words that it takes, where those can be counted."""
    allowed = cli.allowed_values()
    return {
        flag: allowed[action.dest]
        for action in parser._actions
        if action.dest in allowed
        for flag in action.option_strings
    }


def _branch(key: str, words: Iterable[str], *, only_flags: bool = True) -> str:
    offer = f'_tokendiff_offer -W {shlex.quote(" ".join(words))} -- "$word"'
    if only_flags and " -" not in key:
        offer = f"[[ $word == -* ]] && {{ {offer}; return; }}"
        return f"    {shlex.quote(key)}) {offer} ;;"
    return f"    {shlex.quote(key)}) {offer}; return ;;"
