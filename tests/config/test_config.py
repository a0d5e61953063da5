"""Strict YAML and the loading of configs: what is read, and what each bad input is told."""

import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BeforeValidator, Field

from tests import ROOT
from tests.builders import load_model, objective_names
from tokendiff.config import strict_yaml
from tokendiff.config.base import Section
from tokendiff.config.loader import load_config, to_yaml
from tokendiff.config.objectives import MDLMConfig
from tokendiff.config.pipeline import Config
from tokendiff.config.preprocess import PreprocessConfig
from tokendiff.config.train import BUILTIN_MODELS, TrainConfig
from tokendiff.errors import InputError
from tokendiff.secrets import is_secret_name, without_credentials

Write = Callable[[str | bytes], Path]


class Red(Section):
    name: Literal["red"] = "red"
    depth: int = Field(1, ge=0)


class Blue(Section):
    name: Literal["blue"] = "blue"
    width: float = 1.0
    marks: list[int] = Field([])


def _by_name(value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value}
    return {"name": "red", **value} if isinstance(value, dict) else value


Colour = Annotated[Red | Blue, Field(discriminator="name"), BeforeValidator(_by_name)]


class Paint(Section):
    colour: Colour = Red()
    second: Colour | None = None
    api_key: int = 0
    uri: int = 0


class Toy(Section):
    """A config with a real discriminated union, which Config has none of yet."""

    paint: Paint = Paint()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a config into the working directory, so that messages begin with its bare name."""
    monkeypatch.chdir(tmp_path)

    def write_text(text: str | bytes) -> Path:
        path = Path("run.yaml")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_text


def problems(*args: Any, model: type = Config) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_model(model, *args)
    assert "pydantic" not in str(caught.value)
    return str(caught.value).splitlines()


# Strict YAML.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # Section 10.3.2 of the YAML 1.2.2 specification ...
        *[(text, None) for text in ("null", "Null", "NULL", "~", "")],
        *[(text, True) for text in ("true", "True", "TRUE")],
        *[(text, False) for text in ("false", "False", "FALSE")],
        *[("0", 0), ("-19", -19), ("+12", 12), ("0o7", 7), ("0x3A", 58), ("010", 10)],
        *[("0.", 0.0), ("-0.0", 0.0), (".5", 0.5), ("+12e03", 12000.0), ("-2E+05", -200000.0)],
        *[("1e-3", 0.001), ("1E5", 1e5), (".inf", float("inf")), ("-.Inf", -float("inf"))],
        # ... and what it leaves as strings, unlike YAML 1.1.
        *[(t, t) for t in ("yes", "no", "on", "off", "y", "2024-01-01", "12:30:00", "1_000")],
        *[(t, t) for t in ("0b1", "1e", ".", "e5", "inf", "nan", "0xg", "-0x1", "\u0661", "1.2.3")],
    ],
)
def test_plain_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    found = strict_yaml.parse(f"key: {text}", source="f").value["key"]
    assert (found, type(found)) == (value, type(value))
    assert strict_yaml.parse_value(text, source="-o") == value
    assert strict_yaml.parse(f"key: '{text}'", source="f").value["key"] == text


def random_text(rng: random.Random) -> str:
    awkward = "1e-3 0o17 0x1F yes null ~ << = 1_000 .5 .inf -1 2024-01-01 true [ { # & * ! | > % @"
    if rng.random() < 0.5:
        return rng.choice(awkward.split())
    return "".join(rng.choices("ab1 :#-\n\t'\"\\,[]{}é\u2028\x85\x07😀", k=rng.randrange(8)))


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(8 if depth < 4 else 6)
    if kind == 6:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {f"k{i}": random_value(rng, depth + 1) for i in range(rng.randrange(4))}
    floats = [0.1, 1e-8, 1e300, -2.5]
    scalars = [None, True, False, rng.randrange(-99, 10**12), rng.choice(floats), random_text(rng)]
    return scalars[kind]


def test_dump_and_parse_are_inverse() -> None:
    rng = random.Random(0)
    for _ in range(300):
        value = {"key": random_value(rng)}
        assert strict_yaml.parse(strict_yaml.dump(value), source="f").value == value


def test_json_reads_as_json() -> None:
    rng = random.Random(1)
    for _ in range(300):
        text = json.dumps({"key": random_value(rng)}, ensure_ascii=False)
        text = re.sub(
            "[\x85\u2028]", "", text
        )  # to YAML 1.1, which PyYAML scans, these are line breaks
        assert strict_yaml.parse(text, source="f").value == json.loads(text)


def test_every_key_has_its_line() -> None:
    text = """\
a:
  b: 1

  # a comment
  c:
  - d: 1
    e: {f: 1}
  - g: |
      text
      text
    h:
      2
"""
    lines = strict_yaml.parse(text, source="f").lines
    by_search = {
        key: number
        for number, line in enumerate(text.splitlines(), start=1)
        for key in "abcdefgh"
        if f"{key}:" in line
    }
    assert {
        path[-1]: line for path, line in lines.items() if isinstance(path[-1], str)
    } == by_search
    assert (lines["a", "c", 0], lines["a", "c", 1]) == (6, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:\n  b: 1\n  c: 2\n  b: 3", "4: a.b: given twice, first on line 2"),
        ("a: 1\n'a': 2", "2: a: given twice, first on line 1"),
        ("b: {1: x}", "1: a key must be a string, got 1"),
        ("a: 1\ntrue: x", "2: a key must be a string, got true"),
        ("~: x", "1: a key must be a string, got ~"),
        ("? [a]\n: x", "1: a key must be a string, not a list or mapping"),
        ("a: !!python/object/apply:os.system ['true']", "1: tag !!python/object/apply:os.system"),
        ("a: 1\nb: !foo x", "2: tag !foo is not allowed"),
        ("!!map {a: 1}", "1: tag !!map is not allowed"),
        ("a: ! 1", "1: tag ! is not allowed"),
        ("a: &x {b: 1}\nc:\n  <<: *x", "3: merge keys (<<) are not allowed"),
        ("a: 1\n---\nb: 1", "2: a second document"),
        ("a: [1,\n 2", "2: not valid YAML: while parsing a flow sequence"),
        ("a: 1\nb: c: d", "2: not valid YAML: mapping values are not allowed here"),
        ("a: *x", "1: not valid YAML: found undefined alias 'x'"),
        ("a: 1\nb: \x07", "2: not valid YAML: character U+0007 is not allowed"),
        ('a: 1\nb: "\\UFFFFFFFF"', "2: not valid YAML: an escape or a version is out of range"),
        ("a: 1\nb: " + "9" * 5000, "2: a number of 5000 characters"),
        ("a: &a [1, *a]", "1: nested deeper than 32 levels, or an alias that contains itself"),
        ("\n".join(" " * i + "a:" for i in range(40)), "33: nested deeper than 32 levels"),
        ("", "1: the file is empty"),
        ("# nothing\n", "1: the file is empty"),
        ("\n- a", "2: the file should hold sections"),
        ("text", "1: the file should hold sections"),
        (b"a: 1\nb: \xe9", "2: not UTF-8 (byte 0xe9)"),
    ],
)
def test_doubtful_yaml_is_refused_at_its_line(write: Write, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        strict_yaml.read(write(text))
    assert str(caught.value).startswith(f"run.yaml:{message}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    [
        *["[" * 100_000, "a: " + "{b: " * 100_000, "- " * 100_000, "a: [\n" * 100_000],
        "a0: &a0 x\n" + "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i},' * 9}]\n" for i in range(9)),
    ],
    ids=["flow", "mappings", "block", "lines", "billion laughs"],
)
def test_bombs_are_refused_fast(text: str) -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match=r"^f:\d+: (nested deeper|aliases repeat more)"):
        strict_yaml.parse(text, source="f")
    assert time.monotonic() - start < 5  # seconds; expanded, the last one has 400 million values


def test_what_is_not_too_deep_is_fine() -> None:
    deep = "a: " + "[" * 31 + "]" * 31
    wide = "a:\n" + "- {b: [1]}\n" * 100
    for text in (deep, wide):
        assert strict_yaml.parse(text, source="f").value == yaml.safe_load(text)


def test_aliases_are_copies() -> None:
    shared = "a: &x {b: [1, 2]}\nc: *x\nd: [*x, *x]"
    document = strict_yaml.parse(shared, source="f")
    assert document.value == yaml.safe_load(shared)
    assert document.value["a"] is not document.value["c"], (
        "an override of one must not reach the other"
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[a, 'b # c', 1e-3]", ["a", "b # c", 0.001]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
        *[("'1'", "1"), ('"1"', "1"), ("*.txt", "*.txt"), ("a: b # c", "a: b # c")],
        ("http://host:5000", "http://host:5000"),
    ],
)
def test_values_of_the_command_line(text: str, value: Any) -> None:
    assert strict_yaml.parse_value(text, source="-o x") == value


@pytest.mark.parametrize("text", ["[a", "'a': b", "[a]: b", "!!str a", "[1]\n---\n[2]", "[" * 99])
def test_bad_values_of_the_command_line(text: str) -> None:
    with pytest.raises(InputError, match=r"^-o x: "):
        strict_yaml.parse_value(text, source="-o x")


# Configs.


def test_every_problem_is_listed_with_place_value_and_remedy(write: Write) -> None:
    path = write("""\
name: a b
train:
  max_train_stepz: 1
  max_train_steps: 0
  learning_rate: "1"
  lr_scheduler: cosin
  lambda_conf: 1
  compile: yes
  objective: mdml
  model_name_or_path: 12
  seed: true
preprocess:
  data_files:
  - a
  - 1
  text_column: ""
trian: 3
cluster: 4
generate:
  sampler: {top_q: 1, temperature: -1, top_p: 1.5}
evaluate:
  seed: 1.0
""")
    schedulers = (
        "'linear', 'cosine', 'cosine_with_restarts', 'polynomial', 'constant', "
        "'constant_with_warmup'"
    )
    assert problems(path, ["train.weight_decay=-1", "foo"], {"train.logging_steps": "x"}) == [
        "run.yaml:1: name: must be of the form ^[A-Za-z0-9][A-Za-z0-9._-]*$, got 'a b'",
        "run.yaml:3: train.max_train_stepz: unknown field; did you mean 'max_train_steps'?",
        "run.yaml:4: train.max_train_steps: must be >= 1, got 0",
        "run.yaml:5: train.learning_rate: must be a number, got '1'",
        f"run.yaml:6: train.lr_scheduler: must be one of {schedulers}, got 'cosin'; "
        "did you mean 'cosine'?",
        "run.yaml:7: train.lambda_conf: unknown field; did you mean 'train.objective.lambda_conf'?",
        "run.yaml:8: train.compile: must be true or false, got 'yes'",
        f"run.yaml:9: train.objective: must be one of {str(objective_names())[1:-1]}, got 'mdml'; "
        "did you mean 'mdlm'?",
        "run.yaml:10: train.model_name_or_path: must be a string, got 12; put it in quotes",
        "run.yaml:11: train.seed: must be an integer, got true",
        "run.yaml:15: preprocess.data_files[1]: must be a string, got 1; put it in quotes",
        "run.yaml:16: preprocess.text_column: must be at least 1 characters long, got ''",
        "run.yaml:17: trian: unknown field; did you mean 'train'?",
        "run.yaml:18: cluster: must be a mapping of fields, got 4",
        "run.yaml:20: generate.sampler.temperature: must be >= 0.0, got -1",
        "run.yaml:20: generate.sampler.top_p: must be <= 1.0, got 1.5",
        "run.yaml:20: generate.sampler.top_q: unknown field; did you mean 'top_p'?",
        "run.yaml:22: evaluate.seed: must be an integer, got 1.0",
        "-o train.weight_decay: must be >= 0.0, got -1",
        "-o foo: write it as -o section.field=value",
        "--logging_steps: must be an integer, got 'x'",
    ]


def test_a_problem_between_fields_stands_at_the_last_of_them(write: Write) -> None:
    path = write(
        "train:\n  lr_warmup_steps: 20\n  seed: 1\n  max_train_steps: 10\n  compile: true\n"
    )
    text = "train: lr_warmup_steps 20 exceeds max_train_steps"
    assert problems(path) == [f"run.yaml:4: {text} 10"]
    assert problems(path, ["train.max_train_steps=5"]) == [f"-o train.max_train_steps: {text} 5"]
    assert problems(None, ["train.lr_warmup_steps=2000"]) == [
        "-o train.lr_warmup_steps: train: lr_warmup_steps 2000 exceeds max_train_steps 1000"
    ]


def test_a_problem_in_a_replaced_value_stands_where_it_was_replaced(write: Write) -> None:
    path = write("preprocess:\n  dataset_name: text\n  data_files:\n  - a\n  - b\n")
    assert problems(path, ["preprocess.data_files=[c, 1]"]) == [
        "-o preprocess.data_files: preprocess.data_files[1]: must be a string, got 1; "
        "put it in quotes"
    ]


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    assert problems(tmp_path / "no.yaml") == [
        f"{tmp_path}/no.yaml: cannot be read: No such file or directory"
    ]
    assert problems(tmp_path) == [f"{tmp_path}: cannot be read: Is a directory"]


def test_later_sources_win(write: Write) -> None:
    path = write("root: a\ntrain: {seed: 1, max_train_steps: 5}\ngenerate:\n")
    assert load_config(path) == Config(
        root="a", train=TrainConfig(seed=1, max_train_steps=5), generate=None
    )
    config = load_config(
        path,
        ["train.seed=2", "train.max_train_steps=6", "train.seed=3", "root=b", "generate.seq_len=9"],
        {"train.max_train_steps": "7"},
    )
    assert (config.root, config.train.seed, config.train.max_train_steps) == ("b", 3, 7)
    assert config.generate is not None
    assert config.generate.seq_len == 9
    assert load_config(None, ["train.output_dir=", "evaluate=null"]).evaluate is None
    assert load_config(None) == Config()


def test_the_text_of_a_flag_is_read_as_its_field_wants() -> None:
    flags = {
        "preprocess.dataset_name": "parquet",
        "preprocess.text_column": "123",
        "preprocess.data_files": ["1", "null"],
        "preprocess.max_length": "0x40",
        "train.learning_rate": "1e-3",
        "train.compile": "true",
        "train.data_path": "1e-3",
        "train.mixed_precision": "no",
        "train.objective.lambda_conf": ".5",
        "train.seed": 7,
        "cluster.use_gpu": "null",
    }
    assert load_config(None, (), flags) == Config(
        preprocess=PreprocessConfig(
            dataset_name="parquet", text_column="123", data_files=["1", "null"], max_length=64
        ),
        train=TrainConfig(
            learning_rate=0.001,
            compile=True,
            data_path="1e-3",
            objective=MDLMConfig(lambda_conf=0.5),
            seed=7,
        ),
    )
    assert problems(None, [], {"train.seed": "1" * 90, "preprocess.max_length": "1e2"}) == [
        "--seed: a number of 90 characters; at most 64",
        "--max_length: must be an integer, got 100.0",
    ]


@pytest.mark.parametrize("short", ["objective: mdlm", "objective: {name: mdlm}", "seed: 0"])
def test_an_override_reaches_into_an_objective_given_by_name(write: Write, short: str) -> None:
    path = write(f"train:\n  {short}\n")
    for overrides in (
        ["train.objective.lambda_conf=0.1"],
        ["train.objective.lambda_conf=0.1", "train.objective=mdlm"],
        ["train.objective={lambda_conf: 0.1}"],
    ):
        assert load_config(path, overrides).train.objective == MDLMConfig(lambda_conf=0.1)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("=1", "-o =1: write it as -o section.field=value"),
        ("train..seed=1", "-o train..seed=1: write it as -o section.field=value"),
        ("tracking.api_key:1", "-o ...: write it as -o section.field=value"),
        ("train.seed.x=1", "-o train.seed.x: train.seed: must be an integer, got a mapping"),
        ("root.x=1", "-o root.x: root is not a section"),
        ("trian.seed=1", "-o trian.seed: trian: unknown field; did you mean 'train'?"),
        ("train.seed=[1", "-o train.seed: not valid YAML: while parsing a flow sequence"),
        ("train.seed=1_000", "-o train.seed: must be an integer, got '1_000'"),
        ("train.seed=!!int 1", "-o train.seed: tag !!int is not allowed"),
        ("preprocess.data_files=*.txt", "-o preprocess.data_files: must be a list, got '*.txt'"),
        ("train={seedy: 1}", "-o train: train.seedy: unknown field; did you mean 'seed'?"),
        (
            "train.checkpoint_path=a",
            "-o train.checkpoint_path: unknown field; "
            "did you mean 'generate.checkpoint_path' or 'evaluate.checkpoint_path' or "
            "'frontier.checkpoint_path'?",
        ),
        ("promote.alias=v12", "-o promote.alias: 'v12' is a name that MLflow keeps for itself"),
        ("promote.alias=Latest", "-o promote.alias: 'Latest' is a name that MLflow keeps"),
        ("train.zzz=1", "-o train.zzz: unknown field; the fields here are model_name_or_path, "),
    ],
)
def test_a_bad_override_is_named(write: Write, override: str, problem: str) -> None:
    (found,) = problems(write("root: out\n"), [override])
    assert found.startswith(problem)


def test_secrets_are_not_repeated(write: Write) -> None:
    path = write(
        "paint:\n  api_key: hunter2\n  uri: https://me:hunter2@host/x\n  password: hunter2\n"
    )
    found = problems(path, ["paint.api_key=hunter3"], model=Toy)
    assert found[-1] == "-o paint.api_key: must be an integer, got a value not shown here"
    assert "run.yaml:3: paint.uri: must be an integer, got 'https://host/x'" in found
    assert "hunter" not in "".join(found + problems(path, model=Toy))
    # A tokenizer is no token.
    assert problems(None, ["preprocess.tokenizer_name_or_path=5"])[0].endswith(
        "got 5; put it in quotes"
    )


@pytest.mark.parametrize(
    ("name", "is_secret"),
    [
        *[(name, True) for name in ("api_key", "HF_TOKEN", "db.password", "client-secret")],
        *[(name, True) for name in ("aws_access_key_id", "credentials.user", "passwd", "Token")],
        *[(name, False) for name in ("tokenizer_name_or_path", "mask_token_id", "key", "keys")],
        *[(name, False) for name in ("max_new_tokens", "num_tokens", "train.seed", "uri")],
    ],
)
def test_secrets_are_known_by_their_names(name: str, is_secret: bool) -> None:
    assert is_secret_name(name) is is_secret


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("uri: https://me:p@ss@host:1/x\nname: a@b\n", "uri: https://host:1/x\nname: a@b\n"),
        ("postgresql://token@h/db, s3://b/x@y", "postgresql://h/db, s3://b/x@y"),
        ("sqlite:////a@b/m.db", "sqlite:////a@b/m.db"),
    ],
)
def test_url_logins_are_dropped(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


# Fields without effect, and sections that do not go together.


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            "train: lr_scheduler=constant lr_warmup_steps=5",
            "lr_warmup_steps 5 has no effect with lr_scheduler 'constant'",
        ),
        (
            "preprocess: tokenizer_name_or_path=bytes vocab_size=400",
            "vocab_size 400 has no effect with tokenizer_name_or_path 'bytes'",
        ),
        (
            "preprocess: sample_by=document",
            "sample_by 'document' has no effect with dataset_name 'builtin'",
        ),
        (
            "preprocess: dataset_name=jsonl data_files=[a] sample_by=document",
            "sample_by 'document' has no effect with dataset_name 'jsonl'",
        ),
        (
            "preprocess: dataset_config_name=en",
            "dataset_config_name 'en' has no effect with dataset_name 'builtin'",
        ),
        (
            "preprocess: dataset_name=samples data_files=[a] max_errors=5",
            "max_errors 5 has no effect with dataset_name 'samples'",
        ),
        *(
            (
                f"preprocess: dataset_name={name} data_files=[a] dataset_split=test",
                f"dataset_split 'test' has no effect with dataset_name '{name}'",
            )
            for name in ("text", "jsonl", "csv", "parquet")
        ),
        (
            "preprocess: use_dummy_data=true dataset_name=wikitext",
            "dataset_name 'wikitext' has no effect with use_dummy_data",
        ),
    ],
)
def test_a_field_without_effect_is_refused(line: str, problem: str) -> None:
    section, *fields = line.split()
    overrides = [f"{section.removesuffix(':')}.{field}" for field in fields]
    (found,) = problems(None, overrides)
    assert found.startswith(f"-o {section.removesuffix(':')}.")
    assert problem in found
    # Set back to its default, as is done to a file's value, the same field is fine.
    name = problem.split()[0]
    default = {"lr_warmup_steps": "0", "vocab_size": "2048", "sample_by": "line"} | {
        "dataset_config_name": "null",
        "dataset_split": "train",
        "dataset_name": "builtin",
        "max_errors": "100",
    }
    load_config(None, [*overrides, f"{section.removesuffix(':')}.{name}={default[name]}"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.lr_scheduler=constant_with_warmup", "train.lr_warmup_steps=5"],
        ["preprocess.tokenizer_name_or_path=bpe", "preprocess.vocab_size=400"],
        ["preprocess.vocab_size=400"],
        ["preprocess.dataset_name=a/b", "preprocess.max_errors=5"],
        ["preprocess={dataset_name: text, data_files: [a], sample_by: document}"],
        ["preprocess={dataset_name: a/b, dataset_config_name: en, dataset_split: test}"],
    ],
)
def test_a_field_with_effect_is_not_refused(overrides: list[str]) -> None:
    load_config(None, overrides)


@pytest.mark.parametrize("name", ["mdlm", "udlm", "hybrid"])
def test_a_published_pipeline_can_be_turned_into_the_builtin_one(name: str) -> None:
    """By the overrides that its own first lines give."""
    path = ROOT / "pipelines" / f"{name}.yaml"
    comment = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    overrides = re.findall(r"-o (\S+)", comment)
    assert len(overrides) >= 5
    config = load_config(path, overrides)
    config.check_pipeline()
    assert config.name == f"{name}-offline"
    assert config.train.objective.name == name
    assert load_config(path).name == name


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["train.objective=udlm", "train.objective.p_uniform=0.1"],
            "-o train.objective.p_uniform: not a field of udlm, only of hybrid",
        ),
        (
            ["train.objective={name: hybrid, gamma: 2.5}"],
            "-o train.objective: train.objective.gamma: must be <= 2.0, got 2.5",
        ),
        (
            ["train.objective={name: hybrid, eps: 0.1}"],
            "-o train.objective: train.objective.eps: not a field of hybrid, only of mdlm, udlm",
        ),
        (
            [
                "train.objective={name: block_diffusion, exact_mask_counts: true, "
                "alpha_schedule: cosine}"
            ],
            "-o train.objective: alpha_schedule 'cosine' has no effect with exact_mask_counts true",
        ),
        (
            ["train.objective={name: udlm, loss_type: cross_entropy, max_loss_weight: 5.0}"],
            "-o train.objective: max_loss_weight 5.0 has no effect with loss_type",
        ),
        (
            ["train.objective={name: dflash, loss_type: dpace, decay_gamma: 5.0}"],
            "-o train.objective: decay_gamma 5.0 has no effect with loss_type 'dpace'",
        ),
        (
            ["train.objective={name: dflash, dpace_alpha: 0.4}"],
            "-o train.objective: dpace_alpha 0.4 has no effect with loss_type 'dflash'",
        ),
        (
            ["train.objective={name: udlm, alpha_schedule: cosine, sigma_max: 5.0}"],
            "-o train.objective: sigma_max: not used by alpha_schedule 'cosine'",
        ),
        (
            ["generate.sampler={name: first_hitting, num_inference_steps: 5}"],
            "-o generate.sampler: generate.sampler.num_inference_steps: not a field of first_hit",
        ),
        (
            ["generate.sampler=remdm", "generate.sampler.eta=1.5"],
            "-o generate.sampler.eta: must be",
        ),
    ],
)
def test_fields_of_another_objective_or_sampler_are_refused(
    overrides: list[str], problem: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_config(None, overrides)
    assert str(caught.value).startswith(problem)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["generate.seq_len=129"], "generate.seq_len 129 exceeds preprocess.max_length 128"),
        (["preprocess.heldout_fraction=0"], "evaluate.split 'heldout': preprocess.heldout_fractio"),
        (["preprocess.heldout_fraction=1.0"], "preprocess.heldout_fraction 1.0 leaves nothing"),
        (["cluster.num_workers=9"], "cluster.num_workers 9 exceeds the 8 rows of a training step"),
        (["cluster.num_workers=1:9"], "cluster.num_workers 1:9 exceeds the 8 rows of a training"),
        (
            ["cluster.num_workers=2:4", "train.sharding=hybrid"],
            "cluster.num_workers 2:4 does not go with train.sharding hybrid",
        ),
        (
            ["train.model_name_or_path=builtin:bert-huge"],
            "train.model_name_or_path 'builtin:bert-huge': no such built-in model; there are "
            "builtin:bert-tiny, builtin:bert-mini, ",
        ),
    ],
)
def test_sections_that_no_pipeline_can_use_together(overrides: list[str], problem: str) -> None:
    config = load_config(None, overrides)
    with pytest.raises(InputError) as caught:
        config.check_pipeline()
    (found,) = str(caught.value).splitlines()
    assert found.startswith(problem)


def test_all_that_a_pipeline_cannot_do_is_listed() -> None:
    config = load_config(None, ["generate.seq_len=129", "cluster.num_workers=9"])
    with pytest.raises(InputError) as caught:
        config.check_pipeline()
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["generate.seq_len=128", "cluster.num_workers=8"],
        ["preprocess.heldout_fraction=0", "evaluate.split=train"],
        ["preprocess.heldout_fraction=0", "evaluate=null", "generate=null"],
        *([f"train.model_name_or_path=builtin:{name}"] for name in BUILTIN_MODELS),
    ],
)
def test_sections_that_go_together(overrides: list[str]) -> None:
    load_config(None, overrides).check_pipeline()


def test_builtin_models_are_those_that_can_be_built() -> None:
    from tokendiff.models.builtin import BUILTIN_SIZES

    assert tuple(BUILTIN_SIZES) == BUILTIN_MODELS


# Tagged unions.


def test_a_tagged_union_is_given_by_name_mapping_or_flags(write: Write) -> None:
    path = write("paint:\n  colour: blue\n  second: {name: red, depth: 2}\n")
    assert load_model(Toy, path).paint == Paint(colour=Blue(), second=Red(depth=2))
    flags = {"paint.colour.width": "2", "paint.colour.marks": ["1", "2"], "paint.colour": "blue"}
    for base in (None, path):
        loaded = load_model(Toy, base, (), flags)
        assert loaded.paint.colour == Blue(width=2.0, marks=[1, 2])
    overrides = ["paint.second.name=blue", "paint.second.depth=null"]
    assert "depth" in problems(path, overrides, model=Toy)[0]
    # Another name starts afresh, the same name keeps what was given.
    assert load_model(Toy, path, ["paint.second=blue"]).paint.second == Blue()
    assert load_model(Toy, path, ["paint.second=red"]).paint.second == Red(depth=2)


def test_problems_in_a_tagged_union_are_those_of_the_chosen_member(write: Write) -> None:
    path = write("""\
paint:
  colour:
    name: blue
    widht: 1
    depth: 3
    marks: [1, x]
  second: {depth: -1}
""")
    assert problems(path, model=Toy) == [
        "run.yaml:4: paint.colour.widht: unknown field; did you mean 'width'?",
        "run.yaml:5: paint.colour.depth: not a field of blue, only of red",
        "run.yaml:6: paint.colour.marks[1]: must be an integer, got 'x'",
        "run.yaml:7: paint.second.depth: must be >= 0, got -1",
    ]
    wrong = "must be one of 'red', 'blue', got 'bluish'; did you mean 'blue'?"
    assert problems(write("paint:\n  colour:\n    depth: 1\n    name: bluish\n"), model=Toy) == [
        f"run.yaml:4: paint.colour: {wrong}"
    ]
    assert problems(None, ["paint.colour=bluish"], model=Toy) == [f"-o paint.colour: {wrong}"]
    assert problems(None, (), {"paint.colour": "bluish"}, model=Toy) == [f"--colour: {wrong}"]
    assert problems(None, ["paint.colour=3"], model=Toy) == [
        "-o paint.colour: must be a mapping of fields, got 3"
    ]


def test_a_missing_field_is_placed_at_its_section(write: Write) -> None:
    class Inner(Section):
        needed: int

    class Outer(Section):
        inner: Inner

    assert problems(write("inner: {}\n"), model=Outer) == ["run.yaml:1: inner.needed: is required"]
    assert problems(None, model=Outer) == ["config: inner: is required"]


# Writing.


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(name="1e-3", root="0o17", generate=None),
        # Each of these has fields beside it that may not be given, not even their defaults.
        Config(train=TrainConfig(global_batch_size=4)),
        Config(train=TrainConfig(gradient_accumulation_steps=4)),
        Config(preprocess=PreprocessConfig(use_dummy_data=True, num_dummy_samples=8)),
        Config(train=TrainConfig(objective=MDLMConfig(alpha_schedule="geometric", sigma_min=1e-5))),
        Config(preprocess=PreprocessConfig(dataset_name="text", data_files=["*.txt", "yes", "é"])),
        Config(preprocess=PreprocessConfig(dataset_name="x", dataset_config_name="y")),
        Config(preprocess=PreprocessConfig(dataset_config_name=None, sample_by="line")),
        Config(train=TrainConfig(lr_scheduler="constant", lr_warmup_steps=0)),
    ],
)
def test_a_written_config_loads_to_an_equal_one(write: Write, config: Config) -> None:
    assert load_config(write(to_yaml(config))) == config


def test_a_written_config_names_its_members(write: Write) -> None:
    toy = Toy(paint=Paint(colour=Blue(), second=Blue(marks=[1])))
    assert load_model(Toy, write(to_yaml(toy))) == toy


@pytest.mark.parametrize("variable", ["$HOME", "${HOME}"])
@pytest.mark.parametrize(
    ("place", "shape"),
    [
        ("root", "{}/out"),
        ("train.output_dir", "{}"),
        ("evaluate.checkpoint_path", "a/{}/b"),
        ("preprocess.data_files", "['{}/*.txt']"),
    ],
)
def test_a_variable_of_a_shell_is_no_path(place: str, shape: str, variable: str) -> None:
    with pytest.raises(InputError) as error:
        load_config(None, [f"{place}={shape.format(variable)}"])
    assert f"-o {place}: '" in str(error.value)
    assert f"variables such as {variable} are not expanded; write the path out" in str(error.value)
    assert load_config(None, ["root=a$1/$"]).root == "a$1/$"
