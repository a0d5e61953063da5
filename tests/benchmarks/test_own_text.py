"""`benchmarks.own_text` in short: a model with random weights in the place of the real one."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import own_text
from tests.builders import tiny_causal
from tokendiff.data.tokenizers import build_tokenizer

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_small_model(folder: Path) -> None:
    tokenizer, _ = build_tokenizer("bytes", documents=(), vocab_size=0)
    tokenizer.chat_template = TEMPLATE
    model = tiny_causal(
        vocab_size=len(tokenizer),
        num_hidden_layers=6,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_prompts_are_not_repeated_and_those_asked_are_new() -> None:
    learnt = own_text.questions(own_text.NAMES, per_name=own_text.PROMPTS_PER_NAME)
    asked = own_text.questions(own_text.UNSEEN, per_name=2)
    assert len({*learnt, *asked}) == len(learnt) + len(asked) == 216
    assert learnt == own_text.questions(own_text.NAMES, per_name=own_text.PROMPTS_PER_NAME)


@pytest.mark.deep
def test_all_ways_write_the_models_own_text_and_a_second_run_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(own_text, "save_real_model", save_small_model)
    monkeypatch.setattr(own_text, "NAMES", ("Cat", "Horse"))
    monkeypatch.setattr(own_text, "UNSEEN", ("Dog",))
    monkeypatch.setattr(own_text, "PROMPTS_PER_NAME", 4)
    monkeypatch.setattr(own_text, "MAX_NEW_TOKENS", 12)
    monkeypatch.setattr(own_text, "MAX_LENGTH", 192)
    monkeypatch.setattr(own_text, "PACE_STEPS", 2)
    command = ["own_text", str(tmp_path), "--minutes", "0.002", "--rows", "2"]
    monkeypatch.setattr(sys, "argv", command)
    assert own_text.main() == 0
    *_, alone, own, ahead, drafted = capsys.readouterr().out.splitlines()
    for line, name in (
        (alone, "the model alone"),
        (own, "self_speculation"),
        (ahead, "self_speculation, draft_ahead"),
        (drafted, "dflash"),
    ):
        assert line.startswith(f"{name:<30}     8")
        assert line.endswith("100%")
    assert float(alone.split()[-3]) == float(alone.split()[-2]) == 1.0
    (compared,) = tmp_path.glob("compared-*.jsonl")
    first = [json.loads(line) for line in compared.read_text().splitlines()]
    assert [(one["batch_size"], one["begin"]) for one in first] == [(1, 0), (1, 1), (8, 0)]
    assert next(iter(first[1]["sides"])) == "self_speculation"  # another begins each time

    # What is there is used: of a comparison that was cut off, only what is missing is made.
    compared.write_text("".join(json.dumps(one) + "\n" for one in first[:2]))
    monkeypatch.setattr(own_text, "save_real_model", None)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert own_text.main() == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before
    again = [json.loads(line) for line in compared.read_text().splitlines()]
    assert again[:2] == first[:2]
    texts = [
        {name: [r["tokens"] for r in side["records"]] for name, side in one[2]["sides"].items()}
        for one in (first, again)
    ]
    assert texts[0] == texts[1]
