"""Prompts and chats to token ids, and causal models that continue them as a job does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from tests.builders import generation_rows, letter_tokenizer, tiny_causal
from tokendiff.artifacts.checkpoint import open_checkpoint
from tokendiff.artifacts.manifest import commit
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.config.cluster import ClusterConfig
from tokendiff.config.generate import GenerateConfig
from tokendiff.data.prompts import GenerationRow, PromptEncoder
from tokendiff.errors import InputError
from tokendiff.models.completion import CompletionModel, CompletionSetup

V = 30
# Every message in brackets after its role's first letter; an answer begins with "a(".
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}"
    "{% endif %}{{ m.role[0] }}b{{ m.content }}c{% endfor %}"
    "{% if add_generation_prompt %}ab{% endif %}"
)


@pytest.fixture(scope="module")
def model_id(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A causal model and a tokenizer with a chat template, as other tools save them."""
    folder = tmp_path_factory.mktemp("causal")
    model = tiny_causal(vocab_size=V, max_position_embeddings=64).float()
    model.generation_config.eos_token_id = [2, 17]
    model.save_pretrained(folder)
    tokenizer = letter_tokenizer(V)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


def config_of(model_id: str | None, sampler: Any = None, **fields: Any) -> GenerateConfig:
    sampler = {"name": "ar", "temperature": 0.0, "max_new_tokens": 10, **(sampler or {})}
    return GenerateConfig(**{"model_id": model_id, "sampler": sampler, "num_samples": 1, **fields})


def generate_config(**fields: Any) -> GenerateConfig:
    return GenerateConfig(**fields)


def rows_of(*prompts: Any) -> list[GenerationRow]:
    return [GenerationRow(id=index, prompt=prompt) for index, prompt in enumerate(prompts)]


# Prompts.


def test_prompts_come_from_text_json_lines_and_parquet(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "be"}, {"role": "user", "content": "abc"}]
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    lines = [
        {"prompt": "three", "other": 1},
        {"messages": chat},
        {"prompt": None, "messages": chat},
    ]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    named = [{"role": "user", "content": "abc", "name": "x"}, {"role": "user", "content": "d"}]
    table = pa.table({"prompt": ["four", None], "messages": [None, named], "id": [0, 1]})
    pq.write_table(table, tmp_path / "c.parquet")
    config = GenerateConfig(prompt=["zero"], prompts=[str(tmp_path / "*")], num_samples=2)
    rows = generation_rows(config)
    prompts = ["zero", "one", "two", "three", chat, chat, "four", named]
    assert [row.prompt for row in rows] == [prompt for prompt in prompts for _ in range(2)]
    assert [row.id for row in rows] == list(range(16))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"text": "x"}', r'a.jsonl:1: needs a field "prompt".*or "messages"'),
        ("a.jsonl", '{"prompt": "x", "messages": []}', 'a.jsonl:1: has both "prompt" and "mess'),
        ("a.jsonl", '{"prompt": 5}', 'a.jsonl:1: "prompt" must be a string, got 5'),
        ("a.jsonl", '{"messages": []}', '"messages" must be a list of at least one'),
        ("a.jsonl", '{"messages": ["x"]}', r'messages\[0\] needs the strings "role" and "content"'),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', r"messages\[0\] needs.*got \{'role'"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": [1]}]}',
            r"messages\[0\] needs the strings",
        ),
        ("a.jsonl", '{"messages": [{"role": "u", "content": "\\ud800"}]}', "not valid Unicode"),
        ("a.parquet", b"PAR1", "a.parquet: cannot be read as Parquet"),
    ],
)
def test_prompts_that_are_malformed_are_refused_with_their_place(
    name: str, content: str | bytes, says: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=says):
        generation_rows(GenerateConfig(prompts=[str(path)]))


def test_parquet_without_prompts_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match='needs a column "prompt" or "messages"; it has text'):
        generation_rows(GenerateConfig(prompts=[str(tmp_path / "a.parquet")]))
    pq.write_table(pa.table({"prompt": ["x", None]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet: row 2: needs a field"):
        generation_rows(GenerateConfig(prompts=[str(tmp_path / "a.parquet")]))


def test_a_message_in_parts_of_text_is_read_as_in_training(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    image = [*parts, {"type": "image", "url": "x"}]
    for content in (parts, image):
        line = json.dumps({"messages": [{"role": "user", "content": content, "name": "n"}]})
        (tmp_path / "a.jsonl").write_text(line)
        config = GenerateConfig(prompts=[str(tmp_path / "a.jsonl")], num_samples=1)
        if content is image:
            with pytest.raises(InputError, match=r"messages\[0\] needs the strings"):
                generation_rows(config)
        else:
            (row,) = generation_rows(config)
            assert row.prompt == [{"role": "user", "content": "a b", "name": "n"}]


def test_chats_are_written_out_by_the_template(model_id: str) -> None:
    tokenizer: Any = CompletionSetup.of(config_of(model_id), None).tokenizer

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    chat = [{"role": "system", "content": "be"}, {"role": "user", "content": "def"}]
    plain = PromptEncoder(tokenizer=tokenizer)
    assert plain("def") == ids("def")
    assert plain(None) == []
    assert plain(chat) == ids("sbbecubdefc")
    templated = PromptEncoder(
        tokenizer=tokenizer, use_chat_template=True, add_generation_prompt=True
    )
    assert templated("def") == ids("ubdefcab")
    assert templated(chat) == ids("sbbecubdefcab")
    with pytest.raises(InputError, match=r"refuses them.*no tools here"):
        templated([{"role": "tool", "content": "x"}])
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="use_chat_template: the tokenizer of the checkpoint has"):
        PromptEncoder(tokenizer=tokenizer, use_chat_template=True)
    with pytest.raises(InputError, match=r"a prompt of messages: .* has no chat template"):
        plain(chat)


def test_what_the_tokenizer_puts_in_front_stays_and_what_it_puts_behind_does_not() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = letter_tokenizer(V)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[PAD] $A [EOS]", special_tokens=[("[PAD]", 0), ("[EOS]", 2)]
    )
    assert tokenizer("ab")["input_ids"] == [0, 4, 5, 2]
    assert PromptEncoder(tokenizer=tokenizer, keeps_prefix=True)("ab") == [0, 4, 5]
    assert PromptEncoder(tokenizer=tokenizer)("ab") == [4, 5]


# A model and a config.


def test_records_of_continued_prompts(model_id: str) -> None:
    config = config_of(model_id, {"stop_token_ids": [9]}, batch_size=2)
    model = CompletionModel(config)
    assert model.setup.sampler.stop_token_ids == (2, 9, 17)
    chat = [{"role": "user", "content": "def"}]
    prompts = ["abc", "hgfedcba", chat, "a", None]
    records = model.sample(rows_of(*prompts))
    assert [record["id"] for record in records] == list(range(5))
    reference: Any = tiny_causal(vocab_size=V, max_position_embeddings=64).float()
    for record, prompt in zip(records, prompts, strict=True):
        length, tokens = record["num_prompt_tokens"], record["tokens"]
        given = torch.tensor([tokens[:length]])
        expected = reference.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=10,
            eos_token_id=[2, 9, 17],
            pad_token_id=0,
        )
        assert tokens == expected[0].tolist()
        new = tokens[length:]
        assert record["finish_reason"] == ("stop" if new[-1] in (2, 9, 17) else "length")
        assert record["tokens_per_forward"] == len(new) / record["num_model_calls"] == 1.0
        decode = model.tokenizer.decode
        assert record["completion"] == decode(new, skip_special_tokens=True)
        assert record["text"] == decode(tokens, skip_special_tokens=True)
        assert record["gaps"] == []
        assert record["prompt"] == (json.dumps(chat) if prompt is chat else prompt)
    assert records[2]["tokens"][:6] == model.tokenizer("ubdefc")["input_ids"]
    assert records[4]["tokens"][:1] == [2], "a row without a prompt begins where a text ended"


@pytest.mark.parametrize(
    "sampler",
    [
        {"name": "ar", "max_new_tokens": 10, "stop_token_ids": [9]},
        {"name": "sdar", "max_new_tokens": 10, "block_length": 4},
        {"name": "block_refinement", "gen_length": 10, "block_length": 4},
    ],
    ids=["ar", "sdar", "block_refinement"],
)
def test_progress_goes_on_between_finished_rows(model_id: str, sampler: dict[str, Any]) -> None:
    fields = {"model_id": model_id, "num_samples": 1, "batch_size": 2}
    model = CompletionModel(GenerateConfig.model_validate({**fields, "sampler": sampler}))
    told: list[tuple[float, float]] = []
    rows = rows_of("a", "bcd", "ef")
    watched = model.samples(rows, on_progress=lambda figures: told.append(figures()))
    records = sorted(watched, key=lambda record: record["id"])
    assert [r["tokens"] for r in records] == [r["tokens"] for r in model.sample(rows)]
    assert told == sorted(told)
    assert told[-1] == (3, sum(len(r["tokens"]) - r["num_prompt_tokens"] for r in records))
    assert any(0 < done < 1 for done, _ in told)  # before the first is finished
    assert len(told) >= max(r["num_model_calls"] for r in records)


def test_rows_are_taken_as_slots_become_free_and_bf16_is_the_weights_own(model_id: str) -> None:
    model = CompletionModel(config_of(model_id, batch_size=2, mixed_precision="bf16"))
    taken: list[int] = []

    def rows() -> Any:
        for row in rows_of(*["abc"] * 6):
            taken.append(row.id)
            yield row

    assert next(model.samples(rows()))["id"] in (0, 1)
    assert len(taken) < 6


@pytest.mark.parametrize(
    ("sampler", "mask_and_mode"),
    [
        ({"name": "sdar", "temperature": 0.0}, (1, None, 4)),
        ({"name": "sdar", "block_length": 8, "temperature": 0.0}, (1, None, 8)),
        ({"name": "block_refinement", "gen_length": 10}, (1, "2d", 32)),
        (
            {"name": "block_refinement", "attention_mask_mode": "4d", "block_length": 4},
            (1, "4d", 4),
        ),
    ],
)
def test_block_samplers_take_what_the_model_says(
    sampler: dict[str, Any], mask_and_mode: tuple[int, str | None, int], model_id: str
) -> None:
    fields: dict[str, Any] = {"num_samples": 1, "prompt": ["abc"], "model_id": model_id}
    built: Any = CompletionSetup.of(generate_config(sampler=sampler, **fields), None).sampler
    mode = getattr(built, "attention_mask_mode", None)
    assert (built.mask_token_id, mode, built.block_length) == mask_and_mode
    assert built.stop_token_ids == (2, 17)


def test_eos_early_stop_false_stops_nowhere(model_id: str) -> None:
    sampler = {"name": "block_refinement", "gen_length": 12, "eos_early_stop": False}
    config = generate_config(model_id=model_id, sampler={**sampler, "block_length": 4})
    assert CompletionSetup.of(config, None).sampler.stop_token_ids == ()
    records = CompletionModel(config).sample(rows_of("abc", "bcd", "fgh"))
    assert all(len(record["tokens"]) == 15 for record in records)
    assert all(record["finish_reason"] == "length" for record in records)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("a" * 55, "prompt 'aaa.*has 55 tokens; with 10 new ones that exceeds the 64"),
        ([{"role": "tool", "content": "x"}], "refuses them"),
    ],
)
def test_prompts_that_the_model_cannot_take_are_refused(
    prompt: Any, says: str, model_id: str
) -> None:
    setup = CompletionSetup.of(config_of(model_id), None)
    with pytest.raises(InputError, match=says):
        setup.request(*rows_of(prompt))
    assert len(setup.request(*rows_of("a" * 54)).prompt) == 54  # 64 with the new ones


def test_whole_blocks_must_fit_and_a_prompt_must_hold_no_mask(model_id: str) -> None:
    sampler = {"name": "sdar", "max_new_tokens": 10, "block_length": 48}
    setup = CompletionSetup.of(generate_config(model_id=model_id, sampler=sampler), None)
    with pytest.raises(InputError, match="in whole blocks of 48, that exceeds the 64"):
        setup.request(*rows_of("a" * 40))
    setup = CompletionSetup.of(
        generate_config(model_id=model_id, sampler={**sampler, "block_length": 4}), None
    )
    with pytest.raises(InputError, match=r"'ab.MASK.c' holds the mask token '.MASK.'"):
        setup.request(*rows_of("ab[MASK]c"))


def without_tokens(folder: Path, model_id: str, *names: str) -> str:
    """The model with a tokenizer that lacks some of its special tokens."""
    tokenizer = letter_tokenizer(V)
    for name in names:
        setattr(tokenizer, name, None)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text((Path(model_id) / "config.json").read_text())
    return str(folder)


def test_rows_of_one_id_are_refused(model_id: str) -> None:
    """One of them would be returned twice, and the other one lost."""
    alike = [GenerationRow(id=7, prompt=prompt) for prompt in "ab"]
    for batch_size in (1, 2):
        model = CompletionModel(config_of(model_id, batch_size=batch_size))
        with pytest.raises(InputError, match="two rows have the id 7"):
            model.sample(alike)
    whole = generate_config(model_id=model_id, seq_len=8, sampler={"name": "ancestral"})
    with pytest.raises(InputError, match="'ancestral' fills rows; open the model with Sampling"):
        CompletionModel(whole)


def test_an_eos_of_the_models_that_its_tokenizer_lacks_is_never_written(
    tmp_path: Path, model_id: str
) -> None:
    folder = without_tokens(tmp_path, model_id)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": [5, V]}))
    assert CompletionSetup.of(config_of(folder), None).sampler.stop_token_ids == (2, 5)


def test_what_a_tokenizer_lacks_is_said(tmp_path: Path, model_id: str) -> None:
    # [MASK] stays in the vocabulary, and would be found there.
    vocabulary = {f"t{index}": index for index in range(V)}
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary)))
    folder = without_tokens(tmp_path, model_id)
    bare.save_pretrained(folder)
    with pytest.raises(InputError, match="neither its config nor its tokenizer names a mask token"):
        CompletionSetup.of(generate_config(model_id=folder, sampler={"name": "sdar"}), None)
    setup = CompletionSetup.of(config_of(folder), None)
    with pytest.raises(InputError, match=r"nothing to continue.*give a prompt"):
        setup.request(*rows_of(None))
    with pytest.raises(InputError, match=f"stop_token_ids {V}: .* has ids below {V}"):
        CompletionSetup.of(config_of(folder, {"stop_token_ids": [V]}), None)
    with pytest.raises(InputError, match=r"use_chat_template.*no chat template"):
        CompletionSetup.of(config_of(folder, use_chat_template=True), None)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_id": "m", "checkpoint_path": "c", "sampler": "ar"}, "both name the model"),
        ({"model_id": "m"}, "sampler 'ancestral' with a model_id needs the length of"),
        ({"trust_remote_code": True}, "trust_remote_code True has no effect with no model_id"),
        ({"sampler": "ar", "seq_len": 9}, "seq_len 9 has no effect with sampler 'ar'"),
        ({"add_generation_prompt": True}, "add_generation_prompt True has no effect"),
        ({"sampler": {"name": "ar", "temperature": 0.0, "top_k": 2}}, "top_k and top_p have no"),
        (
            {
                "sampler": {
                    "name": "sdar",
                    "confidence_threshold": 0.5,
                    "remasking_strategy": "sequential",
                }
            },
            "confidence_threshold 0.5 has no effect with remasking_strategy 'sequential'",
        ),
        (
            {"sampler": {"name": "sdar", "entropy_threshold": 0.1}},
            "entropy_threshold 0.1 has no effect with remasking_strategy 'low_confidence_dynamic'",
        ),
        (
            {"sampler": {"name": "block_refinement", "max_post_steps": 3}},
            "max_post_steps 3 has no effect with editing_threshold null",
        ),
        (
            {
                "sampler": {
                    "name": "block_refinement",
                    "eos_early_stop": False,
                    "stop_token_ids": [3],
                }
            },
            "stop_token_ids .3. has no effect with eos_early_stop false",
        ),
        (
            {"sampler": {"name": "block_refinement", "minimal_topk": 9, "gen_length": 8}},
            "minimal_topk 9 must not exceed gen_length 8",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        generate_config(**fields)


# Checkpoints of ours.


def block_checkpoint(folder: Path, *, seed: int = 0, **process: Any) -> Path:
    """A committed checkpoint as jobs.train leaves it, the model untrained."""
    fields = {
        "forward_process": "absorbing",
        "vocab_size": V,
        "mask_token_id": 1,
        "max_length": 64,
        "objective": "block_refinement",
        "block_length": 4,
        "attention_mask_mode": "2d",
        "clean_context": False,
        "eos_token_id": 2,
    }
    folder.mkdir()
    model = tiny_causal(vocab_size=V, max_position_embeddings=64, seed=seed).float()
    model.save_pretrained(folder)
    letter_tokenizer(V).save_pretrained(folder)
    NoiseProcess(**{**fields, **process}).save(folder)
    commit(folder, kind="checkpoint", metadata={})
    return open_checkpoint(folder)


def checkpoint_config(name: str, **sampler: Any) -> GenerateConfig:
    length = "gen_length" if name == "block_refinement" else "max_new_tokens"
    return generate_config(sampler={"name": name, "temperature": 0.0, length: 20, **sampler})


def test_a_checkpoint_says_how_it_is_decoded(tmp_path: Path) -> None:
    folder = block_checkpoint(tmp_path / "4d", attention_mask_mode="4d", block_length=8)
    for name in ("sdar", "block_refinement"):
        setup = CompletionSetup.of(checkpoint_config(name), folder)
        built: Any = setup.sampler
        assert (built.block_length, built.mask_token_id, built.stop_token_ids) == (8, 1, (2,))
        assert getattr(built, "attention_mask_mode", "4d") == "4d"
        assert not setup.encoder.keeps_prefix, "trained on text and EOS alone"
        assert setup.request(*rows_of(None)).prompt == (2,)
    built = CompletionSetup.of(checkpoint_config("sdar", block_length=4), folder).sampler
    assert built.block_length == 4
    with pytest.raises(InputError, match=r"mode '2d': .* trained with '4d'; leave it at auto"):
        CompletionSetup.of(checkpoint_config("block_refinement", attention_mask_mode="2d"), folder)


_BLOCKS = {"objective": "block_diffusion", "attention_mask_mode": "4d", "clean_context": True}
_BY_TOKEN = {**_BLOCKS, "context_attention": "causal"}


@pytest.mark.parametrize(
    ("name", "process", "expected"),
    [
        ("sdar", _BLOCKS, {"predicts_next": False, "context_is_causal": False}),
        ("sdar", {**_BLOCKS, "predict": "next"}, {"predicts_next": True}),
        ("sdar", _BY_TOKEN, {"context_is_causal": True, "keeps_base": False}),
        ("sdar", {**_BY_TOKEN, "keeps_base": True}, {"keeps_base": True}),
        ("self_speculation", _BY_TOKEN, {"keeps_base": False, "never_token_id": 1}),
        ("self_speculation", {**_BY_TOKEN, "predict": "next"}, {"predicts_next": True}),
        (
            "self_speculation",
            {**_BY_TOKEN, "keeps_base": True},
            {"keeps_base": True, "never_token_id": None},
        ),
        ("ar", _BY_TOKEN, {"never_token_id": 1}),
        ("ar", {**_BY_TOKEN, "keeps_base": True}, {"never_token_id": None}),
        ("canvas", {**_BLOCKS, "forward_process": "uniform"}, {"prediction": "loo"}),
        (
            "canvas",
            {**_BY_TOKEN, "forward_process": "uniform", "prediction": "posterior"},
            {"prediction": "posterior", "context_is_causal": True},
        ),
    ],
)
def test_what_a_checkpoint_says_of_its_training_reaches_the_sampler(
    tmp_path: Path, name: str, process: dict[str, Any], expected: dict[str, Any]
) -> None:
    checkpoint = block_checkpoint(tmp_path / "c", **process)
    built = CompletionSetup.of(generate_config(sampler={"name": name}), checkpoint).sampler
    assert {field: getattr(built, field) for field in expected} == expected


def test_blocks_start_where_training_on_answers_began_to_count_them(tmp_path: Path) -> None:
    def starts(block_start: str | None, prompt: Any) -> tuple[int, ...]:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        checkpoint = block_checkpoint(folder, attention_mask_mode="4d", block_start=block_start)
        tokenizer = letter_tokenizer(V)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
        (folder / "MANIFEST.json").unlink()
        commit(folder, kind="checkpoint", metadata={})
        config = checkpoint_config("block_refinement", gen_length=4)
        config = config.model_copy(update={"add_generation_prompt": True})
        setup = CompletionSetup.of(config, checkpoint)
        assert getattr(setup.sampler, "sees_tail", None) == (block_start is not None)
        return setup.request(*rows_of(prompt)).block_starts

    # Written out: ub def c, ab ghi c, ub d c, ab; answers begin behind "ab" and end with "c".
    asked = [{"role": "user", "content": "def"}]
    talk = [*asked, {"role": "assistant", "content": "ghi"}, {"role": "user", "content": "d"}]
    assert starts("answer", talk) == (8, 12, 18)
    assert starts("last_answer", talk) == (18,)
    assert starts("answer", asked) == (8,)
    assert starts("answer", "defdef") == (6,)
    assert starts(None, talk) == ()
    special = [*talk[:2], {"role": "user", "content": "[EOS]"}]
    assert len(starts("answer", special)) == 1, "earlier answers cannot be told"


@pytest.mark.parametrize(
    ("name", "process", "says"),
    [
        ("sdar", {}, "trained with attention_mask_mode '2d'.*use sampler 'block_refinement'"),
        ("ar", {}, "predicts the token at its own position .objective 'block_refinement'.*use"),
        (
            "block_refinement",
            {
                "objective": "mdlm",
                "block_length": None,
                "attention_mask_mode": None,
                "clean_context": None,
            },
            "is a denoiser of whole rows .objective 'mdlm'.; use sampler 'ancestral'",
        ),
    ],
)
def test_a_sampler_that_a_checkpoint_does_not_go_with_is_refused(
    name: str, process: dict[str, Any], says: str, tmp_path: Path
) -> None:
    folder = block_checkpoint(tmp_path / "c", **process)
    with pytest.raises(InputError, match=says):
        CompletionSetup.of(checkpoint_config(name), folder)


def test_averaged_weights_are_those_that_are_decoded_with(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    config = checkpoint_config("block_refinement", gen_length=12)
    other: Any = tiny_causal(vocab_size=V, max_position_embeddings=64, seed=7).float()
    plain = block_checkpoint(tmp_path / "plain", seed=7)
    averaged = block_checkpoint(tmp_path / "averaged")
    rows = rows_of("abc", "fgh")

    def tokens_of(folder: Path) -> list[list[int]]:
        return [r["tokens"] for r in CompletionModel(config, checkpoint=folder).sample(rows)]

    expected, without = tokens_of(plain), tokens_of(averaged)
    save_file(dict(other.named_parameters()), averaged / "ema.safetensors")
    assert tokens_of(averaged) == expected != without


# The job.


def test_the_job_continues_prompts_with_any_causal_model(
    in_this_process: None, tmp_path: Path, model_id: str
) -> None:
    from tokendiff.cluster.generate import generate
    from tokendiff.data.samples import read_samples

    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "user", "content": "abc"}]}\n')
    events: list[str] = []
    run: Callable[..., Any] = generate
    written = {}
    for output_format, batch_size in (("jsonl", 2), ("parquet", 3)):
        config = config_of(
            model_id,
            {"name": "ar", "temperature": 1.0},
            prompt=["abc", "defgh"],
            prompts=[str(tmp_path / "p.jsonl")],
            num_samples=2,
            batch_size=batch_size,
            output_format=output_format,
        )
        manifest = run(
            config,
            ClusterConfig(cpus_per_worker=0.5),
            checkpoint_path=None,
            output_dir=tmp_path / output_format,
            on_event=lambda event, **fields: events.append(event),
        )
        figures = manifest.metadata
        assert figures["checkpoint"] == model_id
        assert (figures["rows"], figures["seq_len"]) == (6, None)
        records = read_samples(tmp_path / output_format)
        assert figures["num_model_calls"] == sum(r["num_model_calls"] for r in records)
        assert figures["tokens_per_forward"] == pytest.approx(1.0)
        written[output_format] = records
    expected = CompletionModel(config).sample(generation_rows(config))
    for record in expected:
        del record["seconds"]
    for records in written.values():  # whatever the batch
        assert [{name: r[name] for name in expected[0]} for r in records] == expected
    with pytest.raises(InputError, match="exceeds the 64"):
        run(
            config_of(model_id, prompt=["a" * 60]),
            ClusterConfig(cpus_per_worker=0.5),
            checkpoint_path=None,
            output_dir=tmp_path / "long",
            on_event=lambda event, **fields: None,
        )


def test_canvas_asks_for_a_checkpoint_of_uniform_noise(model_id: str) -> None:
    with pytest.raises(InputError, match="is no checkpoint that was trained with uniform noise"):
        CompletionSetup.of(config_of(model_id, {"name": "canvas", "temperature": 1.0}), None)
