"""The command `tokendiff`: which jobs it has, what it says, and what a shell completes of it."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import cli, completion, console
from tests import ROOT
from tokendiff.config.train import TrainConfig


def test_every_job_is_a_command() -> None:
    texts = {path.stem: path.read_text() for path in (ROOT / "jobs").glob("*.py")}
    assert set(console.COMMANDS) == {n for n, text in texts.items() if "@cli.entry_point" in text}
    for name in console.COMMANDS:
        assert console.main_of(name).__module__ == f"jobs.{name}"


def test_help_imports_the_standard_library_alone() -> None:
    code = (
        "import sys; from jobs import console; console.main(['--help']); "
        "print(sorted({n.split('.')[0] for n in sys.modules} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    *_, modules = done.stdout.splitlines()
    assert set(ast.literal_eval(modules)) <= {"__main__", "jobs"}
    for name in (*console.COMMANDS, "completion"):
        assert f"  {name} " in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, ""),
        (["--help"], 0, ""),
        (["--version"], 0, ""),
        (["trian"], 2, "unknown command 'trian'; did you mean 'train'?"),
        (["completion"], 2, "completion takes one of bash, zsh, got nothing"),
        (["completion", "fish"], 2, "got fish"),
        (["train", "--max_train_stepz", "3"], 2, "see tokendiff train --help"),
        (["pipeline", "plan", "absent.yaml"], 2, "absent.yaml"),
    ],
)
def test_exit_codes_and_words(
    capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    assert console.main(words) == code
    assert said in capsys.readouterr().err


def test_usage_says_what_was_typed(capsys: pytest.CaptureFixture[str]) -> None:
    from jobs import train

    with pytest.raises(SystemExit):
        console.main(["train", "--help"])
    assert capsys.readouterr().out.startswith("usage: tokendiff train [--config")
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert capsys.readouterr().out.startswith("usage: python -m jobs.train [--config")


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "pipelines/quickstart.yaml"])
def test_a_pipeline_that_is_shipped_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.shipped(Path(name)) == ROOT / "pipelines" / "quickstart.yaml"
    assert cli.shipped(Path("elsewhere/quickstart.yaml")) == Path("elsewhere/quickstart.yaml")
    own = tmp_path / name
    own.parent.mkdir(exist_ok=True)
    own.touch()  # a file of the user's goes first
    assert cli.shipped(Path(name)) == Path(name)


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "tokendiff.bash"
    path.write_text(completion.script("bash"))
    return path


def completed(script: Path, line: str, folder: Path | None = None) -> list[str]:
    """What bash offers for the last word of a line, by the function that it registers."""
    words = line.split(" ")
    code = f"""
source {script}
[[ $(complete -p tokendiff) == *" -F _tokendiff "* ]] || exit 1
COMP_WORDS=({" ".join(f"'{word}'" for word in words)}) COMP_CWORD={len(words) - 1}
_tokendiff
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "--norc", "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_flags_and_values(bash_script: Path, tmp_path: Path) -> None:
    assert completed(bash_script, "tokendiff pr") == ["preprocess"]
    assert completed(bash_script, "tokendiff completion ") == ["bash", "zsh"]
    assert set(completed(bash_script, "tokendiff pipeline ")) >= {"run", "plan", "status"}
    assert completed(bash_script, "tokendiff train --max_tr") == ["--max_train_steps"]
    assert completed(bash_script, "tokendiff generate --max_tr") == []
    assert completed(bash_script, "tokendiff train --mixed_precision ") == ["no", "bf16"]
    assert "mdlm" in completed(bash_script, "tokendiff train --objective ")
    assert completed(bash_script, "tokendiff train --compile f") == ["false"]
    assert completed(bash_script, "tokendiff pipeline run x.yaml --fr") == ["--from"]
    fields = completed(bash_script, "tokendiff pipeline run x.yaml -o train.lr_w")
    assert fields == ["train.lr_warmup_steps="]
    (tmp_path / "mine.yaml").touch()
    assert completed(bash_script, "tokendiff pipeline plan m", tmp_path) == ["mine.yaml"]


def test_completion_knows_every_flag_of_training(bash_script: Path) -> None:
    offered = completed(bash_script, "tokendiff train --")
    assert {f"--{name}" for name in TrainConfig.model_fields} <= set(offered)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
def test_zsh_completes_the_same(tmp_path: Path) -> None:
    """In the options that bashcompinit sets for functions of bash. What does not begin with
    the word is left out by zsh itself, later.
    """
    script = tmp_path / "completion"
    script.write_text(completion.script("zsh"))
    for line, expected in [
        ("tokendiff pr", "preprocess"),
        ("tokendiff train --compile f", "false"),
        ("tokendiff pipeline run x.yaml -o train.lr_w", "train.lr_warmup_steps="),
    ]:
        words = line.split(" ")
        code = f"""
source {script}
complete_one() {{
    emulate -L sh; setopt kshglob noshglob braceexpand
    COMP_WORDS=({" ".join(f"'{word}'" for word in words)}) COMP_CWORD={len(words) - 1}
    _tokendiff
    printf '%s\\n' "${{COMPREPLY[@]}}"
}}
complete_one
"""
        done = subprocess.run(["zsh", "-f", "-c", code], capture_output=True, text=True, check=True)
        assert expected in done.stdout.split()
        assert done.stderr == ""


def test_zsh_reads_the_same_function(bash_script: Path) -> None:
    text = completion.script("zsh")
    assert text.endswith(bash_script.read_text().partition("\n")[2])
    assert "bashcompinit" in text
