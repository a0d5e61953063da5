"""Answers of denoisers of whole rows: block by block behind prompts of any length, to EOS."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig

from tests.builders import TableDenoiser, letter_tokenizer
from tests.models.published import EOS, FAMILIES, MASK, V, llada, reference_logits
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.samplers import BlockwiseConfig
from tokendiff.data.prompts import GenerationRow
from tokendiff.diffusion.kernels import AbsorbingKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.diffusion.schedules import Cosine
from tokendiff.errors import InputError
from tokendiff.models.denoiser import TransformersDenoiser, check_windows
from tokendiff.models.sampling import PromptCheck, SamplingModel, build_sampler
from tokendiff.samplers.blockwise import BlockwiseSampler

NEW, BLOCK = 10, 4
PROMPTS = ["abcde", "f", "ghi", "jk"]
GREEDY: dict[str, Any] = {"temperature": 0.0, "remasking_strategy": "low_confidence_static"}


def config_of(folder: Path, *, batch_size: int = 4, **sampler: Any) -> GenerateConfig:
    fields = {"name": "blockwise", "block_size": BLOCK, "num_inference_steps": 2}
    return GenerateConfig.model_validate(
        {
            "model_id": str(folder),
            "num_samples": 1,
            "batch_size": batch_size,
            "sampler": {**fields, "max_new_tokens": NEW, **sampler},
        }
    )


def records_of(config: GenerateConfig, prompts: list[str] = PROMPTS) -> list[dict[str, Any]]:
    rows = [GenerationRow(id=number, prompt=prompt) for number, prompt in enumerate(prompts)]
    return list(SamplingModel(None, config, device="cpu").samples(rows))


def ids_of(prompt: str) -> list[int]:
    ids: list[int] = letter_tokenizer(V)(prompt)["input_ids"]
    return ids


def published_decoding(model: Any, prompt: list[int], *, shift: int, steps: int) -> list[int]:
    """LLaDA's greedy decoding of one row as its paper describes it, position by position."""
    row = prompt + [MASK] * NEW
    for begin in range(len(prompt), len(row), BLOCK):
        block = range(begin, min(begin + BLOCK, len(row)))
        for step in range(steps):
            masked = [at for at in block if row[at] == MASK]
            logits = reference_logits(model, torch.tensor([row]))[0]
            logits[:, MASK] = -torch.inf
            told = {at: logits[max(at - shift, 0)].softmax(-1) for at in masked}
            surest = sorted(masked, key=lambda at: -float(told[at].max()))
            count = len(block) // steps + (step < len(block) % steps)
            for at in surest[:count]:
                row[at] = int(told[at].argmax())
        if EOS in row[begin:]:
            break
    end = row.index(EOS, len(prompt)) + 1 if EOS in row[len(prompt) :] else len(row)
    return row[:end]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", ["llada", "Dream"])  # whose random weights end some answers
def test_greedy_answers_are_those_of_the_published_decoding(
    name: str, steps: int, tmp_path: Path
) -> None:
    model = FAMILIES[name](tmp_path)
    prompts = [a + b for a in ("", "ab", "cd[EOS]gh") for b in "abcdefghijkl"]
    records = records_of(config_of(tmp_path, **GREEDY, num_inference_steps=steps), prompts)
    expected = [
        published_decoding(model, ids_of(prompt), shift=int(name == "Dream"), steps=steps)
        for prompt in prompts
    ]
    assert [record["tokens"] for record in records] == expected
    reasons = [record["finish_reason"] for record in records]
    assert reasons == ["stop" if tokens[-1] == EOS else "length" for tokens in expected]
    assert set(reasons) == {"stop", "length"}, "both are tried"
    assert not any(MASK in record["tokens"] for record in records)


@pytest.mark.parametrize(
    "sampler",
    [
        {"temperature": 0.8, "remasking_strategy": "low_confidence_dynamic"},
        {"remasking_strategy": "entropy_bounded", "entropy_threshold": 2.0},
        {"remasking_strategy": "sequential", "guidance_scale": 1.5},
        {},
    ],
)
def test_a_row_alone_is_what_it_is_beside_longer_ones(
    sampler: dict[str, Any], tmp_path: Path
) -> None:
    llada(tmp_path)
    together = records_of(config_of(tmp_path, **sampler))
    alone = records_of(config_of(tmp_path, batch_size=1, **sampler))
    for record in (*together, *alone):
        del record["seconds"]
    assert together == alone
    assert len({len(record["tokens"]) for record in together}) > 1


def test_the_seed_decides_of_rows_in_flight_as_of_a_batch(tmp_path: Path) -> None:
    llada(tmp_path)
    rows = [GenerationRow(id=number, prompt=prompt) for number, prompt in enumerate(PROMPTS)]
    found = []
    for seed in (0, 1):
        config = config_of(tmp_path).model_copy(update={"seed": seed})
        model = SamplingModel(None, config, device="cpu")
        found.append([record["tokens"] for record in model.samples(rows)])
        assert [record["tokens"] for record in model.sample(rows)] == found[-1]
    assert found[0] != found[1]


def test_rows_in_flight_are_sampled_in_the_precision_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is done between two of them, in that of whoever does it."""
    llada(tmp_path)
    seen: list[bool] = []
    encode = TransformersDenoiser.encode

    def noting(*args: Any, **options: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return encode(*args, **options)

    monkeypatch.setattr(TransformersDenoiser, "encode", noting)
    for precision in ("no", "bf16"):
        config = config_of(tmp_path).model_copy(update={"mixed_precision": precision})
        rows = [GenerationRow(id=number, prompt=prompt) for number, prompt in enumerate(PROMPTS)]
        seen.clear()
        for _ in SamplingModel(None, config, device="cpu").samples(rows):
            assert not torch.is_autocast_enabled("cpu")
        assert set(seen) == {precision == "bf16"}


def test_progress_counts_the_batches_before(tmp_path: Path) -> None:
    llada(tmp_path)
    fields = {"model_id": str(tmp_path), "num_samples": 5, "batch_size": 2, "seq_len": 8}
    sampler = {"name": "ancestral", "num_inference_steps": 4}
    config = GenerateConfig.model_validate({**fields, "sampler": sampler})
    model = SamplingModel(None, config, device="cpu")
    told: list[tuple[float, float]] = []
    rows = [GenerationRow(id=number, prompt="ab") for number in range(5)]
    records = list(model.samples(rows, on_progress=lambda figures: told.append(figures())))
    assert told == sorted(told)
    num_new = sum(len(record["tokens"]) - record["num_prompt_tokens"] for record in records)
    assert told[-1] == (5, num_new)


def test_a_notebook_is_refused_what_a_job_is(tmp_path: Path) -> None:
    """Otherwise answers would go on beyond the positions of the model, and rows be lost."""
    llada(tmp_path)
    model = SamplingModel(None, config_of(tmp_path), device="cpu")
    longest = PromptCheck.of(None, config_of(tmp_path)).max_length
    assert longest is not None
    for prompt, says in (
        ("a" * longest, f"with {NEW} new ones that exceeds the {longest} that the model takes"),
        ("ab[MASK]", "holds the mask token"),
    ):
        row = GenerationRow(id=0, prompt=prompt)
        with pytest.raises(InputError, match=says):
            model.sample([row])
        with pytest.raises(InputError, match=says):
            list(model.samples([row]))
        with pytest.raises(InputError, match=says):
            model.num_tokens(row)
    alike = [GenerationRow(id=7, prompt=prompt) for prompt in "ab"]
    with pytest.raises(InputError, match="two rows have the id 7"):
        list(model.samples(alike))
    assert model.sample([]) == []
    config = GenerateConfig.model_validate({"model_id": "x", "sampler": {"name": "ar"}})
    with pytest.raises(InputError, match="'ar' continues prompts; open the model with Completion"):
        SamplingModel(None, config, device="cpu")


def test_a_row_that_has_ended_costs_nothing_more(tmp_path: Path) -> None:
    llada(tmp_path)
    fields: dict[str, Any] = {**GREEDY, "num_inference_steps": 1}
    for record in records_of(config_of(tmp_path, **fields), list("abcdefghijkl")):
        new = len(record["tokens"]) - 1
        assert record["num_model_calls"] == -(-new // BLOCK)
        assert record["tokens_per_forward"] == new / record["num_model_calls"]


@pytest.mark.slow
def test_another_sampler_on_the_same_weights_is_a_model_opened_with_it(tmp_path: Path) -> None:
    llada(tmp_path)
    rows = [GenerationRow(id=number, prompt=prompt) for number, prompt in enumerate("abcdefghijkl")]
    begun = SamplingModel(None, config_of(tmp_path, stop_token_ids=[5]), device="cpu")
    in_one_length = {"model_id": str(tmp_path), "seq_len": 12, "sampler": "ancestral"}
    for config in (
        config_of(tmp_path, **GREEDY),
        config_of(tmp_path, stop_token_ids=[7], temperature=0.7),
        GenerateConfig.model_validate(in_one_length),
    ):
        changed, fresh = (
            [{**record, "seconds": 0.0} for record in model.samples(rows)]
            for model in (
                begun.with_sampler(config),
                SamplingModel(None, config, device="cpu"),
            )
        )
        assert changed == fresh
        assert (config.seq_len is None) == ("stop" in {r["finish_reason"] for r in fresh})
    table = copy.copy(begun)
    table._source = dataclasses.replace(begun._source, config=BertConfig())
    with pytest.raises(InputError, match="type 'bert', which keeps no keys and values"):
        table.with_sampler(config_of(tmp_path, cache="dual"))


def test_listed_tokens_end_an_answer_too(tmp_path: Path) -> None:
    llada(tmp_path)
    plain = records_of(config_of(tmp_path, **GREEDY))
    written = next(r for r in plain if r["finish_reason"] == "length")["tokens"]
    stop = written[-2]
    records = records_of(config_of(tmp_path, **GREEDY, stop_token_ids=[stop]))
    for record in records:
        behind = record["tokens"][record["num_prompt_tokens"] :]
        assert not {EOS, stop} & set(behind[:-1])
    assert sum(record["tokens"][-1] == stop for record in records) >= 1


def test_what_does_not_go_with_answers_is_said(tmp_path: Path) -> None:
    llada(tmp_path)
    check = PromptCheck.of(None, config_of(tmp_path))
    with pytest.raises(InputError, match=r"60 tokens; with 10 new ones that exceeds the 64 that"):
        check.request(GenerationRow(id=0, prompt="a" * 60))
    with pytest.raises(InputError, match=r"holds the mask token '\[MASK\]'; gaps are"):
        check.request(GenerationRow(id=0, prompt=check.encoder.tokenizer.mask_token))
    with pytest.raises(InputError, match=f"stop_token_ids {V}: .* has ids below {V}"):
        PromptCheck.of(None, config_of(tmp_path, stop_token_ids=[V]))
    for changes, says in (
        ({"seq_len": 20}, "seq_len 20 has no effect with max_new_tokens 10"),
        ({"sampler": {"name": "blockwise", "stop_token_ids": [1]}}, "with max_new_tokens null"),
        ({"sampler": {"name": "blockwise", "confidence_threshold": 0.5}}, "remasking_strategy 'a"),
        ({"sampler": {"name": "blockwise", "remasking_strategy": "best"}}, "remasking_strategy"),
    ):
        with pytest.raises(ValueError, match=says):
            GenerateConfig.model_validate(config_of(tmp_path).model_dump() | changes)


def test_progress_ends_with_all_rows_where_blocks_are_full_early(tmp_path: Path) -> None:
    """Four steps fill a block of which every candidate passes the threshold in one."""
    llada(tmp_path)
    fields = {"remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.0}
    config = config_of(tmp_path, batch_size=2, **fields, num_inference_steps=4)
    rows = [GenerationRow(id=number, prompt=prompt) for number, prompt in enumerate("abc")]
    told: list[tuple[float, float]] = []
    model = SamplingModel(None, config, device="cpu")
    records = list(model.samples(rows, on_progress=lambda figures: told.append(figures())))
    num_tokens = sum(len(record["tokens"]) - 1 for record in records)
    assert told[-1] == (3, num_tokens)
    assert sorted(row for row, _ in told) == [row for row, _ in told]


@pytest.mark.parametrize("noise", ["absorbing", "uniform"])
def test_what_a_sampler_refuses_is_laid_to_the_checkpoint_where_it_is_its_noise(noise: str) -> None:
    process = NoiseProcess(forward_process=noise, vocab_size=V, mask_token_id=MASK, max_length=64)
    config = BlockwiseConfig().model_copy(update={"cache_refresh_steps": 0})
    says = {
        "absorbing": "^sampler 'blockwise': cache_refresh_steps must be at least 1, got 0; change",
        "uniform": "does not go with this checkpoint, whose forward_process is 'uniform'",
    }
    with pytest.raises(InputError, match=says[noise]):
        build_sampler(config, process)


def test_older_keys_stay() -> None:
    fields = GenerateConfig.model_validate({"sampler": "blockwise"}).result_fields()["sampler"]
    assert set(fields) == {
        *("name", "temperature", "top_k", "top_p", "guidance_scale"),
        *("num_inference_steps", "block_size"),
    }


# Keys and values that are kept.

RULES: list[dict[str, Any]] = [
    {**GREEDY, "num_inference_steps": 4},
    {"remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.3},
    {"guidance_scale": 1.5, "num_inference_steps": 3},
]


def without_calls(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timing = ("seconds", "num_model_calls", "tokens_per_forward")
    return [{k: v for k, v in record.items() if k not in timing} for record in records]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_that_every_pass_renews_changes_nothing(
    name: str, cache: str, rule: dict[str, Any], tmp_path: Path
) -> None:
    FAMILIES[name](tmp_path)
    plain = records_of(config_of(tmp_path, **rule))
    renewed = records_of(config_of(tmp_path, **rule, cache=cache, cache_refresh_steps=1))
    assert without_calls(renewed) == without_calls(plain)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize(
    ("name", "layers"), [("llada", "n_layers"), ("Dream", "num_hidden_layers")]
)
def test_of_one_layer_what_is_kept_is_exact(
    name: str, layers: str, cache: str, rule: dict[str, Any], tmp_path: Path
) -> None:
    """The keys of a first layer depend on their own tokens alone, which have not changed."""
    changes: dict[str, Any] = {layers: 1}
    FAMILIES[name](tmp_path, **changes)
    plain = records_of(config_of(tmp_path, **rule))
    for refresh in (None, 2):
        kept = records_of(config_of(tmp_path, **rule, cache=cache, cache_refresh_steps=refresh))
        assert without_calls(kept) == without_calls(plain)


@pytest.mark.parametrize(
    ("cache", "refresh", "widths"),
    [
        ("dual", None, [15, 4, 4, 15, 4, 4, 15, 2]),
        ("prefix", None, [15, 10, 10, 15, 6, 6, 15, 2]),
        ("dual", 2, [15, 4, 15, 15, 4, 15, 15, 2]),
    ],
)
def test_a_pass_reads_no_more_than_it_must(
    cache: str,
    refresh: int | None,
    widths: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five tokens of a prompt, and blocks of 4, 4 and 2 in three steps at most."""
    llada(tmp_path)
    read: list[int] = []
    encode = TransformersDenoiser.encode_window

    def counted(self: Any, tokens: torch.Tensor, positions: torch.Tensor, *rest: Any) -> Any:
        read.append(positions.shape[1])
        return encode(self, tokens, positions, *rest)

    monkeypatch.setattr(TransformersDenoiser, "encode_window", counted)
    fields: dict[str, Any] = {"remasking_strategy": "sequential", "num_inference_steps": 3}
    fields |= {"cache": cache, "cache_refresh_steps": refresh, "temperature": 0.0}
    model = SamplingModel(None, config_of(tmp_path, **fields), device="cpu")
    object.__setattr__(model._sampler, "stop_token_ids", ())
    model.sample([GenerationRow(id=0, prompt="abcde")])
    assert read == widths


def test_a_model_that_keeps_no_keys_has_no_cache(tmp_path: Path) -> None:
    kernel = AbsorbingKernel(schedule=Cosine(), mask_token_id=MASK)
    fields: dict[str, Any] = {"kernel": kernel, "block_size": 1}
    tokens, table = torch.zeros(1, 2, dtype=torch.int64), torch.ones(4, 4) / 16
    with pytest.raises(ValueError, match="needs a model that can read parts of a row"):
        BlockwiseSampler(**fields, cache="dual").sample(
            TableDenoiser(table, MASK),
            tokens,
            tokens > 0,
            RowGenerator.for_rows(0, torch.arange(1)),
        )
    with pytest.raises(ValueError, match="cache must be none, prefix or dual, got 'all'"):
        BlockwiseSampler(**fields, cache="all")
    with pytest.raises(ValueError, match="cache_refresh_steps must be at least 1, got 0"):
        BlockwiseSampler(**fields, cache="dual", cache_refresh_steps=0)
    with pytest.raises(
        InputError, match="m is of type 'bert', which keeps no keys and values; set"
    ):
        check_windows(BertConfig(), origin="m")
    with pytest.raises(ValueError, match="cache_refresh_steps 2 has no effect with cache 'none'"):
        config_of(tmp_path, cache_refresh_steps=2)


# Rows in flight.


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler",
    [
        {**GREEDY, "cache": "dual"},
        {"cache": "prefix", "guidance_scale": 1.5},
        {"remasking_strategy": "low_confidence_dynamic", "cache": "dual", "cache_refresh_steps": 2},
    ],
)
@pytest.mark.parametrize("name", ["llada", "Dream"])
def test_more_rows_than_places_are_what_each_is_alone(
    name: str, sampler: dict[str, Any], tmp_path: Path
) -> None:
    """Also with a cache, in which a place holds what was kept of an earlier, longer row."""
    FAMILIES[name](tmp_path)
    prompts = ["abcdefg", "f", "ghi", "jkl", "a", "cdefghij", "k", "b"]
    fields = {"num_inference_steps": 3, **sampler}
    together = records_of(config_of(tmp_path, batch_size=3, **fields), prompts)
    alone = records_of(config_of(tmp_path, batch_size=1, **fields), prompts)
    model = SamplingModel(None, config_of(tmp_path, batch_size=8, **fields), device="cpu")
    rows = [GenerationRow(id=number, prompt=prompt) for number, prompt in enumerate(prompts)]
    one_batch = model.sample(rows)
    for record in (*together, *alone, *one_batch):
        del record["seconds"]
    assert together == alone == one_batch
