"""Decoding in blocks: commit rules against loops, and rows in a batch with a cache against one row
without.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import tiny_causal
from tests.samplers import decoding_reference as reference
from tests.samplers.test_decoding import CountingModel, completed, requests_of
from tokendiff.diffusion.interfaces import Request
from tokendiff.samplers import block_cache, commit_rules, slots
from tokendiff.samplers.block_decoding import BlockSampler
from tokendiff.samplers.block_refinement import BlockRefinementSampler
from tokendiff.samplers.sdar import SDARSampler

V, MASK = 48, 3
STOPS = (1, 2, 7, 12, 20)
LENGTHS = (1, 9, 4, 17, 8, 2, 30)


# Commit rules.


def rule_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of 7 with ties, with no mask, with all masks; confidence, entropy, is_masked, quota."""
    generator = torch.Generator().manual_seed(0)
    confidence = torch.randint(0, 6, (200, 7), generator=generator) / 8.0
    entropy = torch.randint(0, 6, (200, 7), generator=generator) / 8.0
    is_masked = torch.rand(200, 7, generator=generator) < torch.linspace(0, 1, 200)[:, None]
    quota = torch.randint(1, 9, (200,), generator=generator)
    return confidence, entropy, is_masked, quota


Loop = Callable[[list[reference.Place], int], set[int]]
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def confident_pair(threshold: float) -> tuple[Rule, Loop]:
    def rule(confidence: Tensor, entropy: Tensor, is_masked: Tensor, quota: Tensor) -> Tensor:
        return commit_rules.commit_confident(confidence, is_masked, quota, threshold=threshold)

    return rule, lambda masked, count: reference.confident(masked, count, threshold)


def entropy_pair(bound: float) -> tuple[Rule, Loop]:
    def rule(confidence: Tensor, entropy: Tensor, is_masked: Tensor, quota: Tensor) -> Tensor:
        return commit_rules.commit_entropy_bounded(entropy, is_masked, bound=bound)

    return rule, lambda masked, count: reference.entropy_bounded(masked, bound)


RULES: dict[str, tuple[Rule, Loop]] = {
    "leftmost": (lambda c, e, m, q: commit_rules.commit_leftmost(m, q), reference.leftmost),
    "most_confident": (
        lambda c, e, m, q: commit_rules.commit_most_confident(c, m, q),
        reference.most_confident,
    ),
    **{f"confident {threshold}": confident_pair(threshold) for threshold in (0.0, 0.25, 0.5, 2.0)},
    **{f"entropy_bounded {b}": entropy_pair(b) for b in (0.0, 0.125, 0.5, 1.0, 100.0)},
}


@pytest.mark.parametrize("name", RULES)
def test_commit_rule_is_the_loop_over_rows(name: str) -> None:
    vectorised, loop = RULES[name]
    confidence, entropy, is_masked, quota = rule_inputs()
    chosen = vectorised(confidence, entropy, is_masked, quota)
    for row in range(len(quota)):
        masked = [
            reference.Place(i, 0, float(confidence[row, i]), float(entropy[row, i]))
            for i in range(7)
            if is_masked[row, i]
        ]
        expected = loop(masked, int(quota[row])) if masked else set()
        assert set(chosen[row].nonzero()[:, 0].tolist()) == expected, (name, row)
        assert bool(chosen[row].any()) == bool(masked), "every step commits something"


def test_quotas_and_edits() -> None:
    for length, steps in ((4, 4), (32, 5), (7, 3), (4, 9)):
        spread = commit_rules.quotas(length, steps)
        assert spread.tolist() == reference.spread(length, steps)
        assert int(spread.cumsum(0)[min(length, steps) - 1]) == length
    with pytest.raises(ValueError, match="block of 4 tokens cannot be spread over 0 steps"):
        commit_rules.quotas(4, 0)
    confidence = torch.tensor([[0.9, 0.9, 0.5, 0.9]])
    edited = commit_rules.edit_confident(
        confidence,
        torch.tensor([[5, 6, 5, 5]]),
        torch.tensor([[6, 6, 6, 6]]),
        torch.tensor([[True, True, True, False]]),
        threshold=0.5,
    )
    assert edited.tolist() == [[True, False, False, False]]


def test_infinite_entropy_does_not_let_a_given_position_in() -> None:
    entropy = torch.tensor([[torch.inf, 0.0, torch.inf]])
    is_masked = torch.tensor([[True, False, True]])
    chosen = commit_rules.commit_entropy_bounded(entropy, is_masked, bound=10.0)
    assert chosen.tolist() == [[True, False, False]]


# Decoders against one row without a cache.


def block_model(*, seed: int = 0, **changes: Any) -> CountingModel:
    model = tiny_causal(vocab_size=V, seed=seed, **changes)
    return CountingModel(model, vocab_size=V)


def sdar(**changes: Any) -> SDARSampler:
    fields: dict[str, Any] = {
        "mask_token_id": MASK,
        "max_new_tokens": 14,
        "block_length": 4,
        "denoising_steps": 4,
        "temperature": 0.0,
        "stop_token_ids": STOPS,
    }
    return SDARSampler(**{**fields, **changes})


def refinement(**changes: Any) -> BlockRefinementSampler:
    fields: dict[str, Any] = {
        "mask_token_id": MASK,
        "max_new_tokens": 14,
        "block_length": 4,
        "num_inference_steps": 4,
        "temperature": 0.0,
        "threshold": 0.4,
        "stop_token_ids": STOPS,
    }
    return BlockRefinementSampler(**{**fields, **changes})


def expected_of(
    sampler: BlockSampler, model: Any, prompt: Sequence[int], block_starts: Sequence[int] = ()
) -> tuple[list[int], int]:
    """The reference with the parameters of `sampler`."""
    common: dict[str, Any] = {
        "block_starts": block_starts,
        "context_is_causal": sampler.context_is_causal,
        "predicts_next": sampler.predicts_next,
        "num_new": sampler.max_new_tokens,
        "block_length": sampler.block_length,
        "mask": sampler.mask_token_id,
        "stops": sampler.stop_token_ids,
    }
    if isinstance(sampler, BlockRefinementSampler):
        steps = min(sampler.num_inference_steps, sampler.max_new_tokens // sampler.minimal_topk)
        quota = reference.spread(sampler.block_length, steps)
        return reference.decode(
            model,
            prompt,
            **common,
            commit=lambda masked, step: reference.confident(
                masked, max(quota[min(step, steps - 1)], sampler.minimal_topk), sampler.threshold
            ),
            is_causal=sampler.attention_mask_mode == "2d",
            hides_tail=True,
            editing_threshold=sampler.editing_threshold,
            max_post_steps=sampler.max_post_steps,
        )
    assert isinstance(sampler, SDARSampler)
    last = sampler.denoising_steps - 1
    quota = reference.spread(sampler.block_length, sampler.denoising_steps)
    strategies: dict[str, Loop] = {
        "sequential": reference.leftmost,
        "low_confidence_static": reference.most_confident,
        "low_confidence_dynamic": lambda masked, count: reference.confident(
            masked, count, sampler.confidence_threshold
        ),
        "entropy_bounded": lambda masked, count: reference.entropy_bounded(
            masked, sampler.entropy_threshold
        ),
    }
    chosen = strategies[sampler.remasking_strategy]
    return reference.decode(
        model,
        prompt,
        **common,
        commit=lambda masked, step: (
            {place.index for place in masked}
            if step >= last
            else chosen(masked, quota[min(step, last)])
        ),
    )


SAMPLERS: dict[str, BlockSampler] = {
    "sequential": sdar(remasking_strategy="sequential", denoising_steps=2),
    "static": sdar(remasking_strategy="low_confidence_static", denoising_steps=3),
    "dynamic": sdar(confidence_threshold=0.3),
    "dynamic, blocks of 1": sdar(block_length=1, denoising_steps=1),
    "dynamic, more steps than tokens": sdar(denoising_steps=9, confidence_threshold=0.9),
    "entropy": sdar(remasking_strategy="entropy_bounded", entropy_threshold=2.0),
    "entropy, few steps": sdar(
        remasking_strategy="entropy_bounded", entropy_threshold=0.1, denoising_steps=2
    ),
    "causal context": sdar(confidence_threshold=0.3, context_is_causal=True),
    "next token": sdar(confidence_threshold=0.3, predicts_next=True),
    "next token, causal context": sdar(context_is_causal=True, predicts_next=True),
    "next token, causal context, blocks of 1": sdar(
        block_length=1, denoising_steps=1, context_is_causal=True, predicts_next=True
    ),
    "2d": refinement(),
    "2d, one by one": refinement(threshold=2.0),
    "2d, edits": refinement(editing_threshold=0.35, max_post_steps=5),
    "2d, edits, no post steps": refinement(editing_threshold=0.35, max_post_steps=0),
    "4d": refinement(attention_mask_mode="4d"),
    "4d, two at least": refinement(attention_mask_mode="4d", minimal_topk=2, threshold=0.9),
    "4d, edits": refinement(attention_mask_mode="4d", editing_threshold=0.35, max_post_steps=5),
    "4d, edits, one post step": refinement(
        attention_mask_mode="4d", editing_threshold=0.3, max_post_steps=1, block_length=8
    ),
    "4d, edits, next token, causal context": refinement(
        attention_mask_mode="4d",
        editing_threshold=0.35,
        max_post_steps=5,
        context_is_causal=True,
        predicts_next=True,
    ),
    "4d, few tokens": refinement(attention_mask_mode="4d", max_new_tokens=3, block_length=8),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_in_a_batch_with_a_cache_are_each_row_alone_without(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, model, requests = SAMPLERS[name], block_model(), requests_of(LENGTHS)
    monkeypatch.setattr(slots, "_GROWTH", 1)  # room for what is needed, and no more
    expected = {r.id: expected_of(sampler, model.model, r.prompt) for r in requests}
    calls: dict[int, list[int]] = {}
    for num_slots, chunk in ((1, 512), (3, 512), (7, 8)):
        monkeypatch.setattr(block_cache, "PREFILL_CHUNK", chunk)
        done = completed(sampler, model, requests, num_slots=num_slots)
        for request in requests:
            completion = done[request.id]
            assert completion.tokens == expected[request.id][0], (name, num_slots, request.id)
            assert MASK not in completion.tokens
            is_stopped = completion.tokens[-1] in STOPS
            assert completion.finish_reason == ("stop" if is_stopped else "length")
            assert is_stopped or len(completion.tokens) == sampler.max_new_tokens
            calls.setdefault(request.id, []).append(completion.num_model_calls)
    for request in requests:
        # One pass for a prompt of more than a block, and then as many as without a cache: finished
        # blocks are encoded anew in the pass in which the next one begins.
        reads = len(request.prompt) // sampler.block_length > 1
        assert calls[request.id][0] == expected[request.id][1] + int(reads)
        assert calls[request.id][1] == calls[request.id][0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_blocks_that_start_anew_in_the_prompt_are_those_of_a_row_alone_without_a_cache(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, model = SAMPLERS[name], block_model()
    # At the prompt's end, where two answers were in it, and inside an answer that goes on.
    starts = ((1,), (9,), (1, 3, 4), (2, 7, 10, 17), (8,), (1,), (1, 4, 9, 23))
    requests = [
        dataclasses.replace(request, block_starts=places)
        for request, places in zip(requests_of(LENGTHS), starts, strict=True)
    ]
    expected = {
        r.id: expected_of(sampler, model.model, r.prompt, r.block_starts)[0] for r in requests
    }
    for num_slots, chunk in ((1, 512), (3, 512), (7, 8)):
        monkeypatch.setattr(block_cache, "PREFILL_CHUNK", chunk)
        done = completed(sampler, model, requests, num_slots=num_slots)
        assert {index: completion.tokens for index, completion in done.items()} == expected
    otherwise = {r.id: expected_of(sampler, model.model, r.prompt)[0] for r in requests}
    # Of single tokens, and where nothing sees what is behind it, it matters less or not at all.
    if "blocks of 1" not in name and "2d" not in name:
        assert otherwise != expected


@pytest.mark.parametrize("starts", [(3, 3), (4, 2), (5,)])
def test_block_starts_that_do_not_rise_or_lie_behind_the_prompt_are_refused(
    starts: tuple[int, ...],
) -> None:
    with pytest.raises(ValueError, match="block_starts must rise and lie in the prompt of 4"):
        Request(id=0, prompt=(5, 6, 7, 8), block_starts=starts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dynamic", "entropy", "2d, edits", "4d"])
def test_sampled_blocks_are_a_matter_of_the_row_alone(name: str) -> None:
    # Without stop tokens: texts that end at once are the same by chance.
    sampler = dataclasses.replace(
        SAMPLERS[name], temperature=0.8, top_p=0.95, max_new_tokens=9, stop_token_ids=()
    )
    model, requests = block_model(), requests_of(LENGTHS)
    alone = completed(sampler, model, requests, num_slots=1)
    assert completed(sampler, model, requests[::-1], num_slots=4) == alone
    other = completed(sampler, model, requests, key=6)
    assert sum(other[i].tokens != alone[i].tokens for i in alone) > len(alone) // 2


def test_one_block_of_one_token_is_drawn_from_the_model_without_the_mask() -> None:
    model = CountingModel(tiny_causal(vocab_size=5, initializer_range=0.3), vocab_size=5)
    count, prompt = 5000, (0, 1)
    logits = model.model(torch.tensor([[*prompt, MASK]])).logits[0, -1]
    p = logits.index_fill(0, torch.tensor([MASK]), -torch.inf).softmax(-1).detach()
    sampler = sdar(block_length=1, denoising_steps=1, max_new_tokens=1, temperature=1.0)
    requests = [Request(id=index, prompt=prompt) for index in range(count)]
    drawn = [c.tokens[0] for c in sampler.complete(model, requests, key=0, num_slots=1000)]
    observed = torch.bincount(torch.tensor(drawn), minlength=5)
    assert observed[MASK] == 0
    kept = torch.tensor([0, 1, 2, 4])
    expected = p[kept] * count
    assert float(((observed[kept] - expected) ** 2 / expected).sum()) < 16.3  # 3 degrees, p = 0.001


class _WantsMasks(CountingModel):
    def head(self, hidden: Tensor) -> Tensor:
        logits = super().head(hidden)
        logits[:, MASK] += 1000.0
        return logits


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_model_that_wants_to_write_masks_finishes_all_the_same(name: str) -> None:
    wanting = _WantsMasks(block_model().model, vocab_size=V)
    requests = requests_of((5, 3))
    done = completed(SAMPLERS[name], wanting, requests)
    assert done == completed(SAMPLERS[name], block_model(), requests)
    assert all(MASK not in completion.tokens for completion in done.values())


def test_the_tail_of_the_last_block_is_no_part_of_the_completion() -> None:
    model, requests = block_model(), requests_of((6,))
    for num_new in (1, 2, 3, 5, 8):
        for sampler in (
            sdar(max_new_tokens=num_new, stop_token_ids=()),
            refinement(max_new_tokens=num_new, stop_token_ids=(), attention_mask_mode="4d"),
        ):
            (completion,) = completed(sampler, model, requests).values()
            assert len(completion.tokens) == num_new
            assert completion.finish_reason == "length"


@pytest.mark.parametrize("name", ["dynamic", "2d, edits", "4d"])
def test_a_stop_token_inside_the_prompt_ends_nothing(name: str) -> None:
    sampler, model = SAMPLERS[name], block_model()
    prompts = [(12,), (9, 12), (8, 20, 12), (12,) * 5, (8, 9, 10, 11, 2, 30)]
    requests = [Request(id=index, prompt=prompt) for index, prompt in enumerate(prompts)]
    done = completed(sampler, model, requests)
    for request in requests:
        expected, _ = expected_of(sampler, model.model, request.prompt)
        assert done[request.id].tokens == expected


def test_causal_attention_caches_tokens_as_they_settle() -> None:
    """With 2d attention, tokens left of the first mask are not encoded again."""
    requests = requests_of((8,))
    causal, whole = block_model(), block_model()
    fields: dict[str, Any] = {"max_new_tokens": 16, "block_length": 8, "stop_token_ids": ()}
    one = refinement(**fields, threshold=2.0, num_inference_steps=8)
    completed(one, causal, requests)
    two = refinement(**fields, threshold=2.0, num_inference_steps=8, attention_mask_mode="4d")
    completed(two, whole, requests)
    assert causal.num_calls == whole.num_calls == 16
    # 4d: 8 masks in each of 16 passes, 8 finished tokens with the first pass of each block.
    assert whole.num_tokens == 16 * 8 + 2 * 8
    assert causal.num_tokens < whole.num_tokens


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: sdar(block_length=0), "block_length"),
        (lambda: sdar(denoising_steps=0), "denoising_steps"),
        (lambda: sdar(remasking_strategy="random"), "remasking_strategy must be one of sequential"),
        (lambda: sdar(confidence_threshold=-0.1), "confidence_threshold"),
        (lambda: sdar(entropy_threshold=float("nan")), "entropy_threshold"),
        (lambda: sdar(max_new_tokens=0), "max_new_tokens"),
        (lambda: sdar(top_p=0.0), "top_p"),
        (lambda: sdar(top_k=0), "top_k"),
        (lambda: sdar(temperature=-1.0), "temperature"),
        (lambda: refinement(num_inference_steps=0), "num_inference_steps"),
        (lambda: refinement(threshold=-0.5), "threshold"),
        (lambda: refinement(editing_threshold=0.0), "editing_threshold"),
        (lambda: refinement(max_post_steps=-1), "max_post_steps"),
        (lambda: refinement(minimal_topk=15), "minimal_topk.*14 new tokens"),
        (lambda: refinement(attention_mask_mode="auto"), "attention_mask_mode"),
    ],
)
def test_bad_parameters_are_refused(make: Callable[[], BlockSampler], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
