"""Causal models decoded with a cache: rows of their own lengths, slots that they pass through."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.builders import letter_tokenizer, tiny_causal
from tokendiff.diffusion.attention_masks import block_causal_by_position, causal_by_position
from tokendiff.diffusion.interfaces import Completion, Request
from tokendiff.errors import InputError
from tokendiff.models.causal import CausalModel
from tokendiff.models.decoding import (
    check_decoding,
    find_mask_token,
    find_stop_tokens,
    open_causal,
)
from tokendiff.samplers import autoregressive
from tokendiff.samplers.autoregressive import AutoregressiveSampler
from tokendiff.samplers.open_ended import OpenEndedSampler

V = 48
PROMPT_LENGTHS = (1, 9, 3, 17, 5, 2, 30)
STOPS = (1, 2, 7, 12, 20, 33)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {}),
    "mistral, sliding": ("mistral", {"sliding_window": 5}),
    "qwen2, some layers sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "gemma2, logits capped": (
        "gemma2",
        {"sliding_window": 6, "final_logit_softcapping": 5.0, "tie_word_embeddings": False},
    ),
}


class CountingModel(CausalModel):
    """Counts forward passes, the rows in them and the tokens, padding included."""

    num_calls = num_rows = num_tokens = 0

    def encode(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.num_calls += 1
        self.num_rows += len(tokens)
        self.num_tokens += tokens.numel()
        return super().encode(tokens, *args, **kwargs)


def causal_model(name: str = "qwen3", **changes: Any) -> CountingModel:
    model_type, fields = ARCHITECTURES[name]
    model = tiny_causal(model_type, vocab_size=V, **fields, **changes)
    return CountingModel(model, vocab_size=V)


def requests_of(lengths: Sequence[int] = PROMPT_LENGTHS, *, seed: int = 0) -> list[Request]:
    rng = np.random.default_rng(seed)
    return [
        Request(id=index, prompt=tuple(rng.integers(8, V, size=length).tolist()))
        for index, length in enumerate(lengths)
    ]


def completed(
    sampler: OpenEndedSampler,
    model: CausalModel,
    requests: Sequence[Request],
    *,
    num_slots: int = 3,
    key: int = 5,
) -> dict[int, Completion]:
    done = list(sampler.complete(model, requests, key=key, num_slots=num_slots))
    assert len(done) == len(requests)
    return {completion.id: completion for completion in done}


def generated(model: CausalModel, prompt: Sequence[int], *, max_new_tokens: int) -> list[int]:
    """What transformers itself writes."""
    output = model.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(STOPS),
        pad_token_id=0,
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


# Token after token.


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_text_is_that_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_model(name)
    requests = requests_of()
    expected = {r.id: generated(model, r.prompt, max_new_tokens=20) for r in requests}
    assert len({len(tokens) for tokens in expected.values()}) > 1, "rows end at different times"
    sampler = AutoregressiveSampler(max_new_tokens=20, temperature=0.0, stop_token_ids=STOPS)
    for num_slots, chunk in ((1, 512), (3, 512), (3, 4), (10, 7)):
        monkeypatch.setattr(autoregressive, "PREFILL_CHUNK", chunk)
        done = completed(sampler, model, requests, num_slots=num_slots)
        for request in requests:
            completion = done[request.id]
            assert completion.tokens == expected[request.id]
            is_stopped = completion.tokens[-1] in STOPS
            assert completion.finish_reason == ("stop" if is_stopped else "length")
            further_chunks = -(-len(request.prompt) // chunk) - 1
            assert completion.num_model_calls == len(completion.tokens) + further_chunks


@pytest.mark.slow
def test_sampled_text_is_a_matter_of_the_row_alone() -> None:
    model, requests = causal_model(), requests_of()
    sampler = AutoregressiveSampler(max_new_tokens=12, top_k=20, top_p=0.9, stop_token_ids=STOPS)
    alone = completed(sampler, model, requests, num_slots=1)
    assert completed(sampler, model, requests, num_slots=4) == alone
    assert completed(sampler, model, requests[::-1], num_slots=3) == alone
    assert completed(sampler, model, requests[3:5], num_slots=2) == {i: alone[i] for i in (3, 4)}
    other = completed(sampler, model, requests, key=6)
    assert all(other[i].tokens != alone[i].tokens for i in alone if len(alone[i].tokens) > 2)
    same_prompt = [Request(id=i, prompt=requests[0].prompt) for i in range(5)]
    texts = [tuple(c.tokens) for c in completed(sampler, model, same_prompt).values()]
    assert len(set(texts)) > 1


def test_sampled_text_has_the_distribution_of_the_model() -> None:
    model = CausalModel(
        tiny_causal(vocab_size=4, initializer_range=0.2), vocab_size=3
    )  # the fourth id cannot occur in text
    prompt, count, temperature = (0, 2), 6000, 0.7
    first = model.model(torch.tensor([prompt])).logits[0, -1, :3] / temperature
    follow = torch.tensor([[*prompt, v] for v in range(3)])
    second = model.model(follow).logits[:, -1, :3] / temperature
    expected = (first.softmax(-1)[:, None] * second.softmax(-1)).detach().numpy() * count
    sampler = AutoregressiveSampler(max_new_tokens=2, temperature=temperature)
    requests = [Request(id=index, prompt=prompt) for index in range(count)]
    observed = np.zeros((3, 3))
    for completion in sampler.complete(model, requests, key=1, num_slots=2000):
        observed[tuple(completion.tokens)] += 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert statistic < 26.1  # 8 degrees of freedom, p = 0.001


def test_a_finished_row_costs_nothing_and_slots_are_used_again() -> None:
    model = causal_model()
    sampler = AutoregressiveSampler(max_new_tokens=20, temperature=0.0, stop_token_ids=STOPS)
    done = completed(sampler, model, requests_of(), num_slots=3)
    assert model.num_rows == sum(completion.num_model_calls for completion in done.values())
    written = sum(len(completion.tokens) for completion in done.values())
    # One token per call, but for prompts that are read side by side.
    assert model.num_tokens <= written + 3 * sum(PROMPT_LENGTHS)
    lazily = iter(requests_of())
    next(sampler.complete(model, lazily, key=0, num_slots=2))
    assert len(list(lazily)) >= len(PROMPT_LENGTHS) - 4, "requests are taken as slots become free"


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="row 7: an empty prompt"):
        completed(AutoregressiveSampler(), causal_model(), [Request(id=7, prompt=())])


# The cache.


@pytest.mark.parametrize("rule", [causal_by_position, block_causal_by_position(4)])
def test_cache_that_is_cropped_moved_and_reused_gives_what_no_cache_gives(rule: Any) -> None:
    model = causal_model()
    texts = torch.randint(8, V, (3, 16), generator=torch.Generator().manual_seed(0))
    every = torch.arange(3)

    def full(tokens: Tensor) -> Tensor:
        count = torch.full((len(tokens),), tokens.shape[1])
        rows = torch.arange(len(tokens))
        return model.encode(tokens, count, model.new_cache(len(tokens)), rows, rule)

    expected = full(texts)
    cache = model.new_cache(3)
    lengths = torch.tensor([4, 12, 8])
    model.encode(texts[:, :12], lengths, cache, every, rule)
    cache.extend(every, lengths)
    assert cache.lengths.tolist() == [4, 12, 8]
    # What is encoded without extend leaves no trace, whatever it was.
    model.encode(texts.flip(0)[:, :8], torch.tensor([8, 2, 5]), cache, every, rule)
    cache.crop(every, torch.tensor([9, 4, 8]))
    assert cache.lengths.tolist() == [4, 4, 8]
    rows = torch.tensor([2, 0])
    behind = torch.stack([texts[2, 8:16], texts[0, 4:12]])
    hidden = model.encode(behind, torch.tensor([8, 8]), cache, rows, rule)
    torch.testing.assert_close(hidden[0], expected[2, 8:16])
    torch.testing.assert_close(hidden[1], expected[0, 4:12])
    cache.extend(rows, torch.tensor([8, 4]))
    cache.move(2, 1)
    cache.crop(torch.tensor([0]), torch.tensor([0]))
    again = torch.cat([texts[:2], texts[1:2]])
    hidden = model.encode(again[:, :8], torch.tensor([8, 0, 0]), cache, every, rule)
    torch.testing.assert_close(hidden[0], expected[0, :8])
    longer = torch.cat([texts[2], texts[0]])[None]
    hidden = model.encode(texts[:1], torch.tensor([16]), cache, torch.tensor([1]), rule)
    torch.testing.assert_close(hidden, full(longer)[:, 16:])


def test_hidden_states_of_chosen_layers() -> None:
    model = causal_model(num_hidden_layers=3)
    tokens, rows = torch.randint(8, V, (2, 6)), torch.arange(2)
    expected = model.model(tokens, output_hidden_states=True).hidden_states
    last, states = model.encode_layers(
        tokens,
        torch.tensor([6, 6]),
        model.new_cache(2),
        rows,
        causal_by_position,
        layers=(0, 1, -1, 2, -1),
    )
    for given, index in zip(states, (1, 2, 0, 3, 0), strict=True):
        torch.testing.assert_close(given, expected[index])
    torch.testing.assert_close(last, expected[-1])


# Opening a model.


def saved(folder: Path, model: Any, **changes: Any) -> str:
    """A folder as `save_pretrained` makes it, with a tokenizer and changes to its config.json."""
    model.float().save_pretrained(folder)
    letter_tokenizer(V).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(folder)


def test_sdar_opens_as_the_qwen3_that_it_is(tmp_path: Path) -> None:
    qwen3 = tiny_causal(vocab_size=V)
    name = saved(
        tmp_path,
        qwen3,
        model_type="sdar",
        architectures=["SDARForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        mask_token_id=41,
        fuse_cross_entropy=True,
    )
    (tmp_path / "modeling_sdar.py").write_text("raise AssertionError('remote code ran')")
    model, tokenizer = open_causal(name)
    tokens = torch.randint(V, (2, 7))
    torch.testing.assert_close(model.model(tokens).logits, qwen3(tokens).logits)
    assert find_mask_token(model.model.config, tokenizer) == 41
    assert find_mask_token(qwen3.config, tokenizer) == tokenizer.mask_token_id == 1
    tokenizer.mask_token = None
    assert find_mask_token(qwen3.config, tokenizer) == tokenizer.get_vocab()["[MASK]"]


def test_stop_tokens_are_those_of_tokenizer_and_generation_config(tmp_path: Path) -> None:
    qwen3 = tiny_causal(vocab_size=V)
    qwen3.generation_config.eos_token_id = [9, 11]
    name = saved(tmp_path, qwen3)
    model, tokenizer = open_causal(name)
    config = model.model.config
    assert find_stop_tokens(name, config, tokenizer) == (2, 9, 11)
    (tmp_path / "generation_config.json").unlink()
    config.eos_token_id = 5
    assert find_stop_tokens(name, config, tokenizer) == (2, 5)
    tokenizer.eos_token = config.eos_token_id = None
    assert find_stop_tokens(name, config, tokenizer) == ()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9,')
    with pytest.raises(InputError, match=r"generation_config.json cannot be read \(.*; mend"):
        find_stop_tokens(name, config, tokenizer)


class _Deaf(CausalModel):
    """Goes wrong in one way, as a model might that does not know what it is asked."""

    fault = ""

    def encode_layers(self, tokens: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, list]:
        num_tokens, cache, rows, rule = args
        if self.fault == "causal whatever the mask says":
            rule = causal_by_position
        if self.fault == "sees everything":
            rule = block_causal_by_position(100)
        if self.fault == "forgets":
            cache = self.new_cache(len(rows))
        return super().encode_layers(tokens, num_tokens, cache, rows, rule, **kwargs)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("causal whatever the mask says", "does not see what a mask shows"),
        ("sees everything", "sees what a mask hides|are not those without"),
        ("forgets", "logits with a cache are not those without"),
    ],
)
def test_a_model_that_does_not_decode_as_it_should_is_refused(fault: str, says: str) -> None:
    model = _Deaf(tiny_causal(), vocab_size=V)
    check_decoding(model, "fine")
    model.fault = fault
    with pytest.raises(InputError, match=f"model_id 'here'.*({says})"):
        check_decoding(model, "here")


def test_a_model_without_keys_and_values_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(InputError, match="'mamba' cannot decode"):
        check_decoding(CausalModel(MambaForCausalLM(config).eval(), vocab_size=V), "here")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: str(folder / "nowhere"), "model_id '.*nowhere' cannot be opened"),
        (lambda folder: saved(folder, tiny_causal(vocab_size=V), model_type="sdarr"), "sdarr"),
    ],
)
def test_what_is_no_causal_model_is_refused(make: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        open_causal(make(tmp_path))
