"""Instruction tuning by the jobs: chats to shards, each objective trained and judged on answers."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jobs import evaluate, generate, pipeline, preprocess, train
from tests import ROOT
from tests.builders import objective_names
from tokendiff.artifacts.manifest import load_manifest
from tokendiff.config.pipeline import Config
from tokendiff.data.rows import TokenData
from tokendiff.tracking.run_log import metrics_by_step

TEMPLATE = ["--chat_template", str(ROOT / "pipelines" / "chat.jinja")]
BYTES = ["--tokenizer_name_or_path", "bytes", "--max_length", "64"]
MODELS = {
    "mdlm": "builtin:bert-tiny",
    "udlm": "builtin:dit-tiny",
    "hybrid": "builtin:bert-tiny",
}


def write_chats(folder: Path, count: int = 120) -> list[str]:
    lines = []
    for number in range(count):
        user = {"role": "user", "content": f"{number}"}
        said = {"role": "assistant", "content": f"{number % 10}"}
        lines.append(json.dumps({"messages": [user, said]}))
    (folder / "a.jsonl").write_text("\n".join(lines))
    return ["--dataset_name", "jsonl", "--data_files", str(folder / "*.jsonl")]


def result_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


@pytest.mark.slow
@pytest.mark.parametrize("objective", [name for name in objective_names() if name != "dflash"])
def test_every_objective_learns_answers_and_is_judged_by_them(
    objective: str,
    in_this_process: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ["--enabled", "false", "--json"]
    out = tmp_path / "out"
    model = MODELS.get(objective, "builtin:qwen3-tiny")
    steps = ["--max_train_steps", "4", "--eval_steps", "4", "--output_dir", str(out)]
    flags = ["--objective", objective, "--model_name_or_path", model, *BYTES, *TEMPLATE]
    assert train.main([*flags, *write_chats(tmp_path), *steps, *common]) == 0
    data = TokenData.open(out / "data", split="heldout")
    rows = data.read_group(0)
    fills = objective in MODELS
    chats = load_manifest(out / "data").metadata["chats"]
    assert (chats["dataset_format"], chats["fills_answers"]) == ("messages", fills)
    assert data.isolates_documents
    assert (rows.num_filler.sum() > 0) == fills
    capsys.readouterr()
    judge = ["--checkpoint_path", str(out / "final"), "--output_dir", str(tmp_path / "judged")]
    assert evaluate.main([*judge, "--num_mask_samples", "1", *common]) == 0
    judged = result_of(capsys)
    assert np.isfinite(judged["nats_per_token"])
    # As training said of the same rows, whatever fills the answers up.
    last = metrics_by_step(out / "run" / "log.jsonl", event="heldout")[-1]
    assert last["step"] == 4
    assert last["heldout_nats_per_token"] == pytest.approx(judged["nats_per_token"], rel=1e-4)
    if "block" in objective:
        process = json.loads((out / "final" / "scheduler_config.json").read_text())
        assert process["block_start"] == "answer"
        verified = [*judge[:3], str(tmp_path / "verified"), "--verify", *common]
        assert evaluate.main([*verified, "--num_mask_samples", "1"]) == 0
    # Of each answer a digit, and EOS; all else is given, or fills up.
    assert judged["num_tokens"] == 2 * data.metadata["splits"]["heldout"]["documents"]


@pytest.mark.slow
def test_blocks_of_documents_are_for_who_asks_and_answers_must_be_told(
    in_this_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--objective", "block_diffusion", "--model_name_or_path", "builtin:qwen3-tiny"]
    flags += [*BYTES, *TEMPLATE, *write_chats(tmp_path), "--max_train_steps", "1"]
    for name, more in {
        "document": ["--block_start", "document"],
        "last_answer": ["--train_on", "last_answer"],
        "all": ["--train_on", "all"],
    }.items():
        out = tmp_path / name
        assert train.main([*flags, *more, "--output_dir", str(out), "--enabled", "false"]) == 0
        process = json.loads((out / "final" / "scheduler_config.json").read_text())
        assert process.get("block_start") == ("last_answer" if name == "last_answer" else None)
    capsys.readouterr()
    more = ["--train_on", "all", "--block_start", "answer", "--output_dir", str(tmp_path / "no")]
    assert train.main([*flags, *more, "--enabled", "false"]) != 0
    assert (
        "block_start answer: these rows were preprocessed with the loss on all"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_answers_are_drawn_by_the_template_that_was_trained(
    in_this_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ["--objective", "ar", "--model_name_or_path", "builtin:qwen3-tiny", *BYTES, *TEMPLATE]
    steps = ["--max_train_steps", "2", "--output_dir", str(out), "--enabled", "false"]
    assert train.main([*flags, *write_chats(tmp_path), *steps]) == 0
    chat = ["--use_chat_template", "--add_generation_prompt", "--prompt", "7"]
    drawn = [
        *("--sampler", "ar", "--max_new_tokens", "4", "--num_samples", "1"),
        *("--output_dir", str(tmp_path / "drawn")),
    ]
    assert generate.main(["--checkpoint_path", str(out / "final"), *chat, *drawn]) == 0
    (record,) = map(json.loads, next((tmp_path / "drawn").glob("part-*")).read_text().splitlines())
    assert record["num_prompt_tokens"] == len("user: 7\nassistant: ")


@pytest.mark.slow
@pytest.mark.parametrize("blank", [" ", ""])
def test_a_blank_that_the_tokenizer_joins_to_the_answer_is_told(
    blank: str, in_this_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At preprocessing, and where the blank of a prompt is then a token by itself."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(["say the 1 and the 2"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="[EOS]")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.jinja").write_text(
        "{% for m in messages %}{{ m.role }}:"
        f"{blank}{{{{ m.content }}}}"
        "{{ eos_token if m.role == 'assistant' else '; ' }}{% endfor %}"
        f"{{% if add_generation_prompt %}}assistant:{blank}{{% endif %}}"
    )
    rows = [
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": said}]}
        for n in range(60)
        for said in ["the 1" if blank else " the 1"]
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ["--dataset_name", "jsonl", "--data_files", str(tmp_path / "a.jsonl")]
    data += ["--chat_template", str(tmp_path / "a.jinja"), "--max_length", "64"]
    data += ["--tokenizer_name_or_path", str(tmp_path / "tokenizer")]
    flags = ["--objective", "ar", "--model_name_or_path", "builtin:qwen3-tiny", *data]
    steps = ["--max_train_steps", "1", "--output_dir", str(tmp_path / "out"), "--enabled", "false"]
    assert train.main([*flags, *steps]) == 0
    said = (
        "in 60 conversations the text before an answer ends in a blank, which the tokenizer joins"
    )
    assert capsys.readouterr().out.count(said) == (1 if blank else 0)
    drawn = ["--checkpoint_path", str(tmp_path / "out" / "final"), "--sampler", "ar"]
    drawn += ["--max_new_tokens", "2", "--num_samples", "1"]
    for name, (more, is_told) in {
        "chat": (["--prompt", "7", "--use_chat_template", "--add_generation_prompt"], bool(blank)),
        "text": (["--prompt", "say ", "--prompt", "say"], True),
        "plain": (["--prompt", "say"], False),
    }.items():
        assert generate.main([*drawn, *more, "--output_dir", str(tmp_path / name)]) == 0
        printed = capsys.readouterr().out
        assert printed.count("ends in a blank, as it is or as the chat template") == is_told, name


@pytest.mark.slow
def test_a_warm_start_takes_the_tokenizer_of_its_checkpoint(
    in_this_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And its chat template, where no tokenizer is named; for text too."""
    common = ["--objective", "ar", "--max_train_steps", "1", "--enabled", "false"]
    first = [*common, *write_chats(tmp_path), "--output_dir", str(tmp_path / "first")]
    model = ["--model_name_or_path", "builtin:qwen3-tiny"]
    assert train.main([*first, *model, *BYTES, *TEMPLATE]) == 0
    (tmp_path / "a.txt").write_text("\n".join(f"line {number}" for number in range(60)))
    text = ["--dataset_name", "text", "--data_files", str(tmp_path / "a.txt")]
    for name, data in {"chats": write_chats(tmp_path), "text": text}.items():
        out, start = tmp_path / name, str(tmp_path / "first" / "final")
        flags = ["--warm_start_from", start, *BYTES[2:], *data, "--output_dir", str(out)]
        assert train.main([*common, *flags]) == 0, capsys.readouterr().err
        assert load_manifest(out / "data").metadata["tokenizer"] == start


def test_a_tokenizer_or_a_model_that_is_named_is_taken_before_that_of_a_warm_start() -> None:
    """So that the keys of stages stay what they were; an alias may stand for another one later."""

    def tokenizer(named: str | None = None, **fields: Any) -> str:
        sections = {"preprocess": {"tokenizer_name_or_path": named}, "train": fields}
        return Config.model_validate(sections).tokenizer_name_or_path

    assert tokenizer(warm_start_from="s3://bucket/final") == "s3://bucket/final"
    assert tokenizer("bytes", warm_start_from="out/final") == "bytes"
    assert tokenizer(warm_start_from="out/final", model_name_or_path="a/b") == "a/b"
    assert tokenizer(warm_start_from="models:/toy@champion") == "bpe"
    assert tokenizer() == "bpe"
    assert tokenizer(objective={"name": "dflash"}, target_model_id="a/b") == "a/b"


def test_preprocessing_shows_the_format_and_an_example(
    in_this_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*write_chats(tmp_path), *BYTES, *TEMPLATE, "--enabled", "false"]
    assert preprocess.main([*flags, "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"dataset_format +messages\n", printed)
    assert "user: 0\nassistant: [[0[EOS]]]" in printed
    (tmp_path / "other.jinja").write_text("{{ messages[0].content }}")
    other = [*flags[: -len(TEMPLATE) - 2], "--chat_template", str(tmp_path / "other.jinja")]
    again = [*other, "--enabled", "false", "--output_dir", str(tmp_path / "out")]
    assert preprocess.main(again) == 2
    assert "of another config or of other input" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "dataset_format messages: the tokenizer has no chat template; give one"),
        (["--chat_template", "nowhere.jinja"], "chat_template nowhere.jinja: cannot be read"),
        (["--dataset_format", "alpaca"], "alpaca needs the columns 'instruction', 'output', but"),
        (["--dataset_format", "text", "--train_on", "all"], "train_on 'all' has no effect with"),
        (["--dataset_format", "sharegpt", "--text_column", "a"], "text_column 'a' has no effect"),
    ],
)
def test_what_chats_cannot_be_made_of_is_told(
    flags: list[str],
    says: str,
    in_this_process: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [*write_chats(tmp_path), *BYTES, *flags, "--output_dir", str(tmp_path / "out")]
    assert preprocess.main([*command, "--enabled", "false"]) == 2
    assert says in capsys.readouterr().err


def test_what_conversations_lose_is_said_once(
    in_this_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_chats(tmp_path)
    flags = [*files, *BYTES, *TEMPLATE, "--enabled", "false"]
    assert preprocess.main([*flags, "--output_dir", str(tmp_path / "all")]) == 0
    assert "left_out" not in capsys.readouterr().out
    path = tmp_path / "a.jsonl"
    rows: list[Any] = [{"tools": "[]", **json.loads(line)} for line in path.open()]
    for row in rows[:7]:
        row["messages"][1]["reasoning_content"] = "Hm."
    path.write_text("\n".join(map(json.dumps, rows)))
    assert preprocess.main([*flags, "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    lost = "the column 'tools', and the reasoning_content or reasoning or thinking of 7 conversat"
    assert re.search(rf"left_out +{lost}", printed.out)
    assert printed.out.count(f"the model does not see {lost}") == 1


def test_text_that_fits_a_chat_format_too_is_said_to(
    in_this_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is read as text; who asks for one of the two is told nothing."""
    files = write_chats(tmp_path)
    path = tmp_path / "a.jsonl"
    rows = [{"text": f"line {n}", **json.loads(line)} for n, line in enumerate(path.open())]
    path.write_text("\n".join(map(json.dumps, rows)))
    note = "set dataset_format messages to train on their answers"
    for name, more, is_told in (
        ("found", [], True),
        ("text", ["--dataset_format", "text"], False),
        ("column", ["--text_column", "text"], False),
        ("messages", ["--dataset_format", "messages", *TEMPLATE], False),
    ):
        flags = [*files, *BYTES, *more, "--output_dir", str(tmp_path / name)]
        assert preprocess.main([*flags, "--enabled", "false"]) == 0
        printed = capsys.readouterr()
        assert printed.out.count(note) == is_told
        assert (re.search(r"dataset_format +text\n", printed.out) is not None) == is_told
    sections = {
        "preprocess": {"dataset_name": "jsonl", "data_files": [files[-1]]},
        "tracking": {"enabled": False},
        "root": str(tmp_path / "root"),
    }
    (tmp_path / "a.yaml").write_text(json.dumps(sections))
    assert pipeline.main(["plan", str(tmp_path / "a.yaml")]) == 0
    assert " ".join(note.split()) in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_conversations_that_are_all_of_no_use_are_not_looked_for_in_text_column(
    tokenizer: str, in_this_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    files = ["--dataset_name", "jsonl", "--data_files", str(tmp_path / "a.jsonl"), *TEMPLATE]
    flags = [*files, "--tokenizer_name_or_path", tokenizer, "--output_dir", str(tmp_path / "out")]
    assert preprocess.main([*flags, "--enabled", "false"]) == 2
    said = capsys.readouterr().err
    assert "no message of the assistant" in said
    assert "check the data" in said
    assert "text_column" not in said


def test_a_plan_shows_the_format_and_the_first_conversation(
    in_this_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_chats(tmp_path)[-1]
    config = tmp_path / "chats.yaml"
    sections = {
        "name": "x",
        "root": str(tmp_path / "root"),
        "preprocess": {
            "dataset_name": "jsonl",
            "data_files": [files],
            "tokenizer_name_or_path": "bytes",
            "chat_template": TEMPLATE[1],
            "max_length": 64,
        },
        "train": {"model_name_or_path": "builtin:qwen3-tiny", "objective": "ar"},
        "generate": None,
        "evaluate": None,
        "tracking": {"enabled": False},
    }
    config.write_text(json.dumps(sections))

    def shown() -> str:
        assert pipeline.main(["plan", str(config)]) == 0
        return capsys.readouterr().out

    for _ in range(2):
        printed = shown()
        assert re.search(r"dataset_format +messages\n", printed)
        assert re.search(r"example +user: 0\n +assistant: \[\[0\[EOS\]\]\]", printed)
        assert pipeline.main(["run", str(config), "--only", "preprocess"]) == 0  # then it is done
        capsys.readouterr()
    broken = [*("-o", f"preprocess.chat_template={tmp_path / 'nowhere.jinja'}")]
    assert pipeline.main(["plan", str(config), *broken]) == 0
    assert "none can be shown: chat_template" in capsys.readouterr().out
    assert pipeline.main(["plan", str(config), "--json"]) == 0
    stages = result_of(capsys)["stages"]
    assert stages[0]["preview"]["dataset_format"] == "messages"


@pytest.mark.slow
def test_a_key_changes_with_what_decides_the_rows_of_chats_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_chats(tmp_path)[-1]
    (tmp_path / "chat.jinja").write_text(Path(TEMPLATE[1]).read_text())

    def key(*changes: str, template: str = "chat.jinja") -> str:
        overrides = [
            *("name=x", f"root={tmp_path}/root", "preprocess.dataset_name=jsonl"),
            *(f"preprocess.data_files=[{files}]", "preprocess.dataset_split=train"),
            f"preprocess.chat_template={tmp_path / template}",
            *("preprocess.tokenizer_name_or_path=bytes", "train.lora_rank=null", *changes),
            "train.model_name_or_path=builtin:qwen3-tiny",
        ]
        words = [word for text in overrides for word in ("-o", text)]
        assert pipeline.main(["plan", "pipelines/instruct.yaml", *words, "--json"]) == 0
        stages = result_of(capsys)["stages"]
        return str(next(stage["key"] for stage in stages if stage["stage"] == "preprocess"))

    first = key()
    assert key("train.max_train_steps=999") == first
    assert key("preprocess.train_on=all") != first
    assert key("preprocess.fill_answers=true") != first
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    assert key() != first


def test_conversations_that_are_all_too_long_are_said_to_be(
    in_this_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*write_chats(tmp_path, 3), "--tokenizer_name_or_path", "bytes", "--max_length", "2"]
    out = ["--output_dir", str(tmp_path / "out"), "--enabled", "false"]
    assert preprocess.main([*flags, *TEMPLATE, *out]) == 2
    said = "3 conversations too long for max_length 2); raise max_length, or check the data"
    assert said in capsys.readouterr().err
