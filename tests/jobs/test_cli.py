"""The command line: flags made out of the config, and what a job answers with."""

import errno
import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest
from pydantic import BeforeValidator, Field

from jobs import cli, pipeline
from tests import ROOT
from tests.builders import load_model, objective_configs, objective_names
from tests.starts import STARTERS, started_by
from tokendiff.config.base import Section
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.objectives import MDLMConfig
from tokendiff.config.pipeline import Config
from tokendiff.config.preprocess import PreprocessConfig
from tokendiff.config.samplers import (
    AncestralConfig,
    FixedLengthSamplerConfig,
    OpenEndedSamplerConfig,
)
from tokendiff.config.train import TrainConfig
from tokendiff.errors import CorruptFileError, InputError

TRAIN = ("train", "preprocess", "cluster", "tracking")
parse = functools.partial(cli.parse, prog="jobs.toy", description="Do it.")


def problem(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(InputError) as caught:
        parse(*args, **kwargs)
    return str(caught.value)


def help_of(capsys: pytest.CaptureFixture[str], *args: str, **kwargs: Any) -> str:
    with pytest.raises(SystemExit) as caught:
        parse([*args, "--help"], **kwargs)
    assert caught.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_flags_overrides_and_file_make_one_config(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {seed: 1, max_train_steps: 5}\nroot: out\n")
    line = (
        "--max_train_steps 1000 --learning_rate 1e-3 --lambda_conf 0.1 --objective mdlm "
        "--dataset_name text --data_files a 2 --data_files c --text_column 123 --compile "
        "--gradient_checkpointing false --model_name_or_path=bert-base-uncased "
        "-o train.seed=2 --override train.max_train_steps=7 -o name=x"
    )
    arguments = parse(["--config", str(path), *line.split()], sections=TRAIN)
    assert arguments.config == Config(
        name="x",
        root="out",
        train=TrainConfig(
            seed=2,
            max_train_steps=1000,
            learning_rate=0.001,
            objective=MDLMConfig(lambda_conf=0.1),
            compile=True,
            model_name_or_path="bert-base-uncased",
        ),
        preprocess=PreprocessConfig(
            dataset_name="text", data_files=["a", "2", "c"], text_column="123"
        ),
    )
    assert "seed" not in parse(["--compile"], sections=TRAIN).config.train.model_fields_set


def test_common_flags() -> None:
    plain, loud = parse([], sections=TRAIN), parse(["--json", "--verbose"], sections=TRAIN)
    assert plain == cli.Arguments(config=Config(), json=False, command=None)
    assert loud == cli.Arguments(config=Config(), json=True, command=None)


def test_a_shared_name_is_the_first_section_s(capsys: pytest.CaptureFixture[str]) -> None:
    generate_first = parse(["--batch_size", "3"], sections=("generate", "evaluate")).config
    assert generate_first.generate == GenerateConfig(batch_size=3)
    evaluate_first = parse(["--batch_size", "3"], sections=("evaluate", "generate")).config
    assert evaluate_first.generate == GenerateConfig()
    text = help_of(capsys, sections=TRAIN)
    assert "preprocess: By -o only: preprocess.output_dir. --dataset_name" in text
    both = parse(["--output_dir", "a", "-o", "preprocess.output_dir=b"], sections=TRAIN).config
    assert (both.train.output_dir, both.preprocess.output_dir) == ("a", "b")
    assert parse(["--output", "c"], sections=TRAIN).config.train.output_dir == "c"


@pytest.mark.parametrize(
    "sections", [("preprocess",), TRAIN, ("generate", "cluster"), ("evaluate", "generate")]
)
def test_help_has_every_field_once(
    capsys: pytest.CaptureFixture[str], sections: tuple[str, ...]
) -> None:
    text = help_of(capsys, sections=sections)
    names = set()
    for section in sections:
        names |= set(type(getattr(Config(), section)).model_fields)
    if "train" in sections:
        for objective in objective_configs():
            names |= set(objective.model_fields) - {"name"}
    if "generate" in sections:
        for sampler in get_args(FixedLengthSamplerConfig) + get_args(OpenEndedSamplerConfig):
            names |= set(sampler.model_fields) - {"name"}
    flags = [word for word in text.split() if word.startswith("--") and word != "--help"]
    flags = [
        flag for flag in flags if flag not in ("--config", "--override", "--json", "--verbose")
    ]
    assert sorted(flags) == sorted(f"--{name}" for name in names)


def test_help_says_what_is_allowed_and_what_is_the_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = help_of(capsys, sections=TRAIN)
    assert "Do it." in text
    assert "--max_train_steps INT optimiser steps (>= 1; default: 1000)" in text
    assert "--learning_rate FLOAT peak learning rate of AdamW (> 0.0; default: 0.0001)" in text
    assert "optimiser state stay float32 (one of no, bf16; default: no)" in text
    assert (
        "the loss weight would be infinite (objective mdlm, udlm, hybrid, block_diffusion; > 0.0; "
        "< 1.0; default: 0.001 for mdlm, block_diffusion or 0.0001 for udlm, hybrid)" in text
    )
    assert "(objective hybrid; >= 0.0; < 1.0; default: 0.1)" in text
    names = ", ".join(objective_names())
    assert "one of elbo, cross_entropy for udlm, hybrid or dflash, dpace for dflash" in text
    assert f"a name, or a mapping with its fields (one of {names}; default: mdlm)" in text
    assert "--compile [true|false] compile the encoder with torch.compile (default: false)" in text
    assert "--data_path TEXT folder that jobs.preprocess wrote --target_states_path" in text
    assert "one of own, next; default: own for block_diffusion)" in text  # the others have none


def test_help_says_what_a_field_is_in_each_of_the_samplers_that_have_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = help_of(capsys, sections=("generate",))
    assert (
        "sampler blockwise, sdar: low_confidence_dynamic: commit every token whose probability is "
        "above this; sampler canvas: mean entropy in nats below which" in text
    )
    assert "default: 0.85 for blockwise, sdar or 0.005 for canvas)" in text
    assert "sampler ar, sdar, canvas, dflash, self_speculation: tokens of a completion" in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--max_train_stepz 3", "unknown flag --max_train_stepz; did you mean --max_train_steps?"),
        ("--max-train-steps=3", "unknown flag --max-train-steps; did you mean --max_train_steps?"),
        ("--max_train 3", "unknown flag --max_train"),  # and not taken for its only completion
        ("--verbos", "unknown flag --verbos; did you mean --verbose?"),
        (
            "--num_samples 3",
            "--num_samples is a flag of jobs.generate, not of jobs.toy",
        ),
        ("--api_key=hunter2 hunter2", "unknown flag --api_key"),
        ("stray", "unexpected argument 'stray'"),
        (
            "--output_dir --x",
            "argument --output_dir: expected one argument; write a value that begins with - as "
            "--output_dir=VALUE",
        ),
        ("--data_files", "argument --data_files: expected at least one argument; write a value"),
        ("-o", "argument -o/--override: expected one argument; write a value"),
        ("--learning_rate fast", "--learning_rate: must be a number, got 'fast'"),
        ("--compile maybe", "--compile: must be true or false, got 'maybe'"),
        ("--seed 1 --seed 1e3", "--seed: must be an integer, got 1000.0"),
        ("--mixed_precision fp16", "--mixed_precision: must be one of 'no', 'bf16', got 'fp16'"),
        (
            "--objective udlm2",
            f"--objective: must be one of {str(objective_names())[1:-1]}, got 'udlm2'; "
            "did you mean 'udlm'?",
        ),
        ("-o train.sed=1", "-o train.sed: unknown field; did you mean 'seed'?"),
        ("-o train.seed", "-o train.seed: write it as -o section.field=value"),
    ],
)
def test_a_bad_command_line_is_told_why(line: str, message: str) -> None:
    found = problem(line.split(), sections=TRAIN)
    assert found.splitlines()[0].startswith(message)
    assert "hunter" not in found


def test_all_bad_flags_are_listed() -> None:
    unknown = problem(["--fooo", "1", "--max_train_stepz", "3"], sections=TRAIN)
    assert unknown.splitlines() == [
        "unknown flag --fooo",
        "unknown flag --max_train_stepz; did you mean --max_train_steps?",
        "see python -m jobs.toy --help",
    ]
    wrong = problem(["--logging_steps=0", "--seed=-1", "--lambda_conf=-1"], sections=TRAIN)
    assert sorted(line.partition(":")[0] for line in wrong.splitlines()) == [
        "--lambda_conf",
        "--logging_steps",
        "--seed",
    ]


def test_a_section_that_the_job_needs_may_not_be_null(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("generate: null\n")
    found = problem(["--config", str(path)], sections=("generate",))
    assert "generate: null, but jobs.toy needs this section" in found
    again = parse(["--config", str(path), "-o", "generate={}"], sections=("generate",))
    assert again.config.generate == GenerateConfig()
    flagged = parse(["--config", str(path), "--top_k", "3"], sections=("generate",))
    assert flagged.config.generate == GenerateConfig(sampler=AncestralConfig(top_k=3))


def test_subcommands_take_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {seed: 1}\n")
    commands = {"run": "Run it.", "plan": "Print what would run."}
    arguments = parse(["plan", str(path), "-o", "train.seed=2", "--json"], commands=commands)
    assert arguments == cli.Arguments(
        config=Config(train=TrainConfig(seed=2)),
        json=True,
        command="plan",
    )
    assert "plan Print what would run." in help_of(capsys, commands=commands)
    assert "usage: jobs.toy plan [-h]" in help_of(capsys, "plan", commands=commands)
    found = problem(["run", str(path), "--num_workers", "3"], commands=commands)
    assert found.startswith("unknown flag --num_workers; did you mean -o cluster.num_workers=...?")
    found = problem(["run", "--config", str(path), "--seed", "3"], commands=commands)
    assert found.splitlines()[:2] == [
        "unknown flag --config; the file is given as FILE.yaml after the command",
        "unknown flag --seed; did you mean -o train.seed=... or -o generate.seed=... "
        "or -o evaluate.seed=... or -o frontier.seed=...?",
    ]
    assert "FILE.yaml" in problem(["run"], commands=commands)
    assert "choose from" in problem(["rnu", str(path)], commands=commands)


def test_a_hidden_field_has_no_flag(capsys: pytest.CaptureFixture[str]) -> None:
    hidden = ("cluster.num_workers", "train.seed")
    text = help_of(capsys, sections=TRAIN, hidden=hidden)
    told = set(re.findall(r"--\w+", text))
    assert not told & {"--num_workers", "--seed"}
    assert "--num_actors" in told
    for given, expected in (("2", 2), ("2:4", "2:4")):
        for words in (["--num_workers", given], ["-o", f"cluster.num_workers={given}"]):
            assert parse(words, sections=TRAIN).config.cluster.num_workers == expected
    config = parse(["-o", "cluster.num_workers=2"], sections=TRAIN, hidden=hidden).config
    assert config.cluster.num_workers == 2
    assert problem(["--num_workers", "2"], sections=TRAIN, hidden=hidden).startswith(
        "unknown flag --num_workers; jobs.toy does not read cluster.num_workers\n"
    )
    # The flag goes to the next section that has the field.
    sections = ("train", "evaluate")
    config = parse(["--seed", "3"], sections=sections, hidden=hidden).config
    assert (config.train.seed, config.evaluate and config.evaluate.seed) == (0, 3)


def test_help_names_the_system_that_a_flag_is_about(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, sections=TRAIN)
    for flag, system in (
        *(("--enabled [true|false]", "MLflow"), ("--uri TEXT", "MLflow")),
        *(("--experiment TEXT", "MLflow"), ("--address TEXT", "Ray")),
    ):
        assert f"{flag} {system}: " in text


class Red(Section):
    name: Literal["red"] = "red"
    depth: int = Field(1, ge=0, description="how deep")
    size: int = 1
    seed: int = 5


class Blue(Section):
    name: Literal["blue"] = "blue"
    marks: list[int] = Field([], description="100% of them")
    size: str = "1"


def _by_name(value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value}
    return {"name": "red", **value} if isinstance(value, dict) else value


class Paint(Section):
    colour: Annotated[Red | Blue, Field(discriminator="name"), BeforeValidator(_by_name)] = Red()
    verbose: bool = False  # a flag of every job already
    seed: int = 0  # declared after the colours, and still the one that --seed sets


class Toy(Section):
    paint: Paint = Paint()


def test_flags_of_all_members_of_a_union(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "Config", Toy)
    monkeypatch.setattr(cli, "load_config", lambda *given, default_sampler: load_model(Toy, *given))

    def paint(line: str) -> Any:
        config: Any = parse(line.split(), sections=("paint",)).config
        return config.paint

    blue = paint("--marks 1 2 --colour blue --size 3").colour
    assert blue == Blue(marks=[1, 2], size="3")
    assert paint("--depth 2 --size 3").colour == Red(depth=2, size=3)
    assert paint("--seed 3 --verbose") == Paint(seed=3)
    assert problem(["--marks", "1"], sections=("paint",)) == (
        "--marks: not a field of red, only of blue"
    )
    text = help_of(capsys, sections=("paint",))
    assert "--colour TEXT (one of red, blue; default: red)" in text
    assert "--depth INT how deep (colour red; >= 0; default: 1)" in text
    assert "--marks INT [INT ...] 100% of them (colour blue)" in text
    assert "By -o only: paint.colour.seed, paint.verbose." in text


@pytest.mark.parametrize(
    ("raised", "code", "stderr"),
    [
        (None, 0, ""),
        (
            InputError("run.yaml:1: a\nrun.yaml:2: b"),
            2,
            "error: run.yaml:1: a\n       run.yaml:2: b\n",
        ),
        (FloatingPointError("loss is nan at step 3"), 1, "error: loss is nan at step 3\n"),
        (CorruptFileError("out/x: sha256 differs"), 1, "error: out/x: sha256 differs\n"),
        (PermissionError("s3://b/x: refused"), 1, "error: s3://b/x: refused\n"),
        (
            ConnectionError("s3://b/x: AWS Error SLOW_DOWN"),
            1,
            "error: s3://b/x: AWS Error SLOW_DOWN; run the same command again when it answers: it "
            "goes on\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(
    capsys: pytest.CaptureFixture[str], raised: BaseException | None, code: int, stderr: str
) -> None:
    @cli.entry_point
    def main(argv: Any) -> None:
        if raised is not None:
            raise raised

    assert main([]) == code
    assert capsys.readouterr().err == stderr


@pytest.mark.parametrize("starter", STARTERS)
def test_sigterm_is_exit_code_143_whoever_started_the_process(
    capsys: pytest.CaptureFixture[str], starter: str
) -> None:
    @cli.entry_point
    def main(argv: Any) -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        time.sleep(10)

    def interrupt(argv: Any) -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    with started_by(starter):
        assert main([]) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM\n"
    assert signal.getsignal(signal.SIGTERM) is before
    assert cli.entry_point(interrupt)([]) == 130


def test_ctrl_c_spares_what_was_started_in_the_background() -> None:
    with started_by("a script, with &"):
        assert cli.entry_point(lambda argv: signal.raise_signal(signal.SIGINT))([]) == 0


def test_an_unforeseen_error_keeps_its_traceback_and_a_code_its_value(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.entry_point(lambda argv: [][0])([]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert cli.entry_point(lambda argv: len(argv or ()))(["a", "b", "c"]) == 3


@pytest.mark.parametrize(
    ("cause", "code"),
    [
        (InputError("a: b"), 2),
        (CorruptFileError("a: b"), 1),
        (FloatingPointError("a: b"), 1),
        (ZeroDivisionError("a: b"), 1),
    ],
)
@pytest.mark.parametrize("is_also_cause", [True, False])
def test_an_error_of_a_ray_task_is_told_as_what_it_is(
    capsys: pytest.CaptureFixture[str], cause: Exception, code: int, is_also_cause: bool
) -> None:
    from ray.exceptions import RayTaskError

    error = RayTaskError("read", "Traceback of the worker", cause)

    @cli.entry_point
    def main(argv: Any) -> None:
        raise error.as_instanceof_cause() if is_also_cause else error

    assert main([]) == code
    shown = capsys.readouterr().err
    if isinstance(cause, ZeroDivisionError):
        assert shown.startswith("Traceback")
    else:
        assert shown == "error: a: b\n"


def test_giving_up_on_workers_shows_no_traceback_of_ray_s(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ray.exceptions import RayError

    def exit_with(error: Exception, cause: Exception) -> tuple[int, str]:
        @cli.entry_point
        def main(argv: Any) -> None:
            raise error from cause

        return main([]), capsys.readouterr().err

    lost = RayError("a worker died")
    assert exit_with(RuntimeError("failed 4 times"), lost) == (1, "error: failed 4 times\n")
    for error, cause in (
        (RuntimeError("bug"), KeyError("x")),
        (NotImplementedError("bug"), lost),
    ):
        code, shown = exit_with(error, cause)
        assert code == 1
        assert "Traceback" in shown


def test_results(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"loss": float("nan"), "path": Path("out"), "list": [1.5, float("inf")]}
    print("progress")
    cli.print_result(result, as_json=True)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last, parse_constant=refuse) == {
        "loss": None,
        "path": "out",
        "list": [1.5, None],
    }
    cli.print_result({"loss": 1.5, "seq_len": None, "num_steps": 3}, as_json=False)
    assert capsys.readouterr().out == "loss       1.5\nnum_steps  3\n"
    for value, shown in (
        (2.6993696212768556, "2.69937"),
        (72137.06524096525, "72137.1"),
        (12345678.9, "12345679"),
        (64.0, "64"),
        (1e-9, "1e-09"),
        (float("inf"), "inf"),
        ([1.25], "[1.25]"),
    ):
        cli.print_result({"x": value}, as_json=False)
        assert capsys.readouterr().out == f"x  {shown}\n"


@pytest.mark.parametrize(("flags", "shown"), [([], ""), (["--verbose"], "INFO tokendiff.x: hi\n")])
def test_verbose_shows_what_is_logged(flags: list[str], shown: str) -> None:
    code = f"""
import logging
from jobs import cli
from tests import ROOT
cli.parse({flags}, prog="x", description=None)
logging.getLogger("tokendiff.x").info("hi")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == shown


def test_help_pays_for_no_heavy_import() -> None:
    code = """
import sys
from jobs import cli
from tests import ROOT
try:
    cli.parse(["--help"], prog="x", description=None, sections=("train", "cluster"))
except SystemExit:
    heavy = "torch transformers ray mlflow datasets pyarrow numpy matplotlib"
    print("loaded:", [name for name in heavy.split() if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "loaded: []"


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room and run the same command again: it goes on"),
        (errno.EDQUOT, "make room and run the same command again: it goes on"),
        (errno.EROFS, "give an output folder that can be written"),
    ],
)
def test_a_disk_that_takes_nothing_is_one_message(
    number: int, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: object) -> int:
        raise OSError(number, os.strerror(number), "out/part")

    assert cli.entry_point(main)([]) == 1
    expected = f"error: [Errno {number}] {os.strerror(number)}: 'out/part'; {remedy}\n"
    assert capsys.readouterr().err == expected


def test_a_path_that_cannot_be_one_is_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "root" / "run").parent.mkdir()
    (tmp_path / "root" / "run").write_text("")
    long = "n" * 300
    for root, name, remedy in (
        ("file", "run", "a file is where a folder should be; give another path"),
        ("root", "run", "a file is where a folder should be; give another path"),
        ("loop", "run", "a link there leads back to itself; mend it, or give another path"),
        (long, "run", "give a shorter path"),
        ("other", long, "give a shorter path"),
    ):
        flags = [f"root={tmp_path / root}", f"name={name}", "tracking.enabled=false"]
        overrides = [word for flag in flags for word in ("-o", flag)]
        assert pipeline.main(["run", "quickstart", *overrides]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: [Errno ")
        assert str(tmp_path / root) in error
        assert error.endswith(f"; {remedy}\n")
        assert error.count("\n") == 1


def test_a_folder_that_another_process_has_just_made_is_no_bad_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, is_bad in (("file", True), (".", False)):
        error = FileExistsError(errno.EEXIST, "File exists", str(tmp_path / name))
        assert (cli._path_remedy(error) is not None) == is_bad


_SAYS_POLICY = """
import os, sys
from jobs import cli
from tests import ROOT

@cli.entry_point
def main(argv):
    print("torch" in sys.modules, os.environ["OMP_WAIT_POLICY"])

main([])
"""


@pytest.mark.parametrize(("policy", "then"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_sleep_while_they_wait_unless_they_are_told_otherwise(
    policy: str | None, then: str
) -> None:
    """Decided before torch is loaded, which reads it then."""
    environment = {name: v for name, v in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if policy is None else {"OMP_WAIT_POLICY": policy}
    told = subprocess.run(
        [sys.executable, "-c", _SAYS_POLICY],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == ["False", then]
