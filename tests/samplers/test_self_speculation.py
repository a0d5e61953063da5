"""A model that drafts for itself writes what it writes alone: each token, or in distribution."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import tiny_causal
from tests.samplers import test_dflash as drafts
from tests.samplers.test_decoding import CountingModel, causal_model, completed, requests_of
from tokendiff.diffusion.attention_masks import MaskRule
from tokendiff.diffusion.interfaces import Decoder, DecodingCache, Request
from tokendiff.samplers.autoregressive import AutoregressiveSampler
from tokendiff.samplers.self_speculation import SelfSpeculationSampler
from tokendiff.samplers.slots import Slots
from tokendiff.samplers.speculation import GAINS

V, MASK, BLOCK = 48, 3, 4
LENGTHS = (1, 9, 4, 17, 8, 2, 30)
STOPS = (1, 2, 7, 12, 20)


def sampler(**changes: Any) -> SelfSpeculationSampler:
    fields: dict[str, Any] = {
        "mask_token_id": MASK,
        "block_length": BLOCK,
        "max_new_tokens": 14,
        "temperature": 0.0,
        "stop_token_ids": STOPS,
    }
    return SelfSpeculationSampler(**{**fields, **changes})


def alone(of: SelfSpeculationSampler) -> AutoregressiveSampler:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "stop_token_ids")
    return AutoregressiveSampler(**{name: getattr(of, name) for name in names})


def model() -> CountingModel:
    return CountingModel(tiny_causal(vocab_size=V), vocab_size=V)


@dataclass(frozen=True, kw_only=True)
class Noting(SelfSpeculationSampler):
    """Notes which rows the drafts that are proposed are of."""

    now: dict[str, Any] = field(default_factory=dict)

    def _uniforms(self, slots: Slots, rows: Tensor) -> Tensor:
        self.now.update(slots=slots, rows=rows, lengths=slots["length"][rows].tolist())
        return super()._uniforms(slots, rows)


@dataclass(frozen=True, kw_only=True)
class Cribbing(Noting):
    """Drafts what is known to come, but for every third position."""

    texts: dict[int, list[int]] = field(default_factory=dict)

    def _proposed(
        self, model: Decoder, states: Tensor, uniforms: Tensor, begin: int
    ) -> tuple[Tensor, Tensor | None]:
        drafted, logits = super()._proposed(model, states, uniforms, begin)
        for index, row in enumerate(self.now["rows"].tolist()):
            request = self.now["slots"]._requests[row]
            done = self.now["lengths"][index] - len(request.prompt) + begin
            known = self.texts[request.id][done : done + drafted.shape[1]]
            for place, token in enumerate(known):
                if (done + place) % 3:
                    drafted[index, place] = token
        return drafted, logits


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, next": {"predicts_next": True},
    "greedy, blocks of 2": {"block_length": 2},
    "greedy, one token": {"max_new_tokens": 1},
    "greedy, no stops": {"stop_token_ids": (), "max_new_tokens": 9},
    "greedy, three draft steps": {"draft_steps": 3},
    "greedy, two draft steps, next": {"draft_steps": 2, "predicts_next": True},
    "greedy, ahead": {"draft_ahead": True},
    "greedy, ahead, next": {"draft_ahead": True, "predicts_next": True},
    "greedy, ahead, one token": {"draft_ahead": True, "max_new_tokens": 1},
    "greedy, ahead, blocks of 2": {"draft_ahead": True, "block_length": 2},
    "sampled, ahead": {"temperature": 0.8, "draft_temperature": 0.0, "draft_ahead": True},
    "sampled": {"temperature": 0.8, "draft_temperature": 0.0},
    "sampled, filtered, next": {
        "temperature": 1.2,
        "draft_temperature": 0.0,
        "top_k": 20,
        "predicts_next": True,
        "stop_token_ids": (),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_its_text_is_that_of_the_model_alone(name: str) -> None:
    drafting, requests = sampler(**SETTINGS[name]), requests_of(LENGTHS)
    expected = completed(alone(drafting), model(), requests)
    texts = {index: done.tokens for index, done in expected.items()}
    names = [f.name for f in drafting.__dataclass_fields__.values()]
    cribbing = Cribbing(**{n: getattr(drafting, n) for n in names}, texts=texts)
    for speculating in (drafting, cribbing):
        for num_slots in (1, 3, 7):
            found = completed(speculating, model(), requests, num_slots=num_slots)
            assert {index: done.tokens for index, done in found.items()} == texts
            reasons = {index: done.finish_reason for index, done in found.items()}
            assert reasons == {index: done.finish_reason for index, done in expected.items()}


@pytest.mark.parametrize("architecture", ["qwen3", "mistral, sliding", "gpt2"])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("predicts_next", [False, True])
@torch.no_grad()
def test_a_draft_is_what_masks_behind_the_text_tell(
    predicts_next: bool, ahead: bool, architecture: str
) -> None:
    """Held against one row without a cache; the token before the draft is not among what they see,
    since it is told in the same pass.
    """
    fields = {"predicts_next": predicts_next, "draft_ahead": ahead}
    drafting = sampler(**fields, stop_token_ids=(), max_new_tokens=12)
    seen: list[tuple[int, Tensor]] = []

    class Watching(Noting):
        def _proposed(
            self, model: Decoder, states: Tensor, *others: Any
        ) -> tuple[Tensor, Tensor | None]:
            seen.extend(
                (length - 1, row)
                for length, row in zip(self.now["lengths"], model.head(states), strict=True)
            )
            return super()._proposed(model, states, *others)

    def cached() -> CountingModel:
        return causal_model(architecture)

    names = [f.name for f in drafting.__dataclass_fields__.values()]
    watching = Watching(**{n: getattr(drafting, n) for n in names})
    window = getattr(cached().model.config, "sliding_window", None)
    for request in requests_of((1, 6)):
        seen.clear()
        (done,) = completed(watching, cached(), [request]).values()
        text = [*request.prompt, *done.tokens]
        assert len(seen) >= 3
        for length, logits in seen:
            x = torch.tensor([[*text[:length], *[MASK] * BLOCK]])
            place = torch.arange(x.shape[1])
            is_seen = (place <= place[:, None]) | (place >= length)[:, None]
            if window is not None:
                is_seen &= place[:, None] - place < window
            positions = place[None]
            expected = (
                cached()
                .model(x, attention_mask=is_seen[None, None], position_ids=positions)
                .logits[0]
            )
            told_by = length + 1 - int(predicts_next)
            here = expected[told_by : told_by + BLOCK - 1]
            torch.testing.assert_close(logits, here, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_each_step_of_a_draft_sees_what_the_steps_before_settled() -> None:
    fields = {"draft_steps": 3, "stop_token_ids": (), "max_new_tokens": 12}
    steps: list[tuple[int, Tensor, Tensor]] = []

    class Watching(Noting):
        def _proposed(
            self, model: Decoder, states: Tensor, *others: Any
        ) -> tuple[Tensor, Tensor | None]:
            found = super()._proposed(model, states, *others)
            steps.append((self.now["lengths"][0], model.head(states[0]), found[0][0]))
            return found

    drafting = sampler(**fields)
    names = [f.name for f in drafting.__dataclass_fields__.values()]
    watching = Watching(**{n: getattr(drafting, n) for n in names})
    (request,) = requests_of((6,))
    (done,) = completed(watching, model(), [request]).values()
    text = [*request.prompt, *done.tokens]
    assert len(steps) % 3 == 0
    for index, (length, logits, _) in enumerate(steps):
        place = index % 3  # each of the three steps settles one of the three tokens
        assert len(logits) == 1
        if not place:
            continue
        settled = [int(steps[index - place + n][2][0]) for n in range(place)]
        x = torch.tensor([[*text[:length], *settled, *[MASK] * (BLOCK - 1 - place)]])
        at = torch.arange(x.shape[1])
        is_seen = (at <= at[:, None]) | (at >= length - 1)[:, None]
        expected = model().model(x, attention_mask=is_seen[None, None]).logits[0, length + place]
        torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)
    assert done.num_model_calls >= 1 + 4 * (len(steps) // 3)


@pytest.mark.slow
def test_one_pass_gives_a_token_at_least_where_it_drafts_ahead() -> None:
    fields = {"stop_token_ids": (), "max_new_tokens": 21, "draft_ahead": True}
    drafting, requests = sampler(**fields), requests_of(LENGTHS)
    texts = {i: c.tokens for i, c in completed(alone(drafting), model(), requests).items()}
    names = [f.name for f in drafting.__dataclass_fields__.values()]
    cribbing = Cribbing(**{n: getattr(drafting, n) for n in names}, texts=texts)
    for speculating, least in ((drafting, 1.0), (cribbing, 1.5)):
        for index, done in completed(speculating, model(), requests).items():
            gains = done.counts[GAINS]
            assert isinstance(gains, Sequence)
            assert len(gains) == BLOCK
            first = int(len(requests[index].prompt) > 1)
            assert sum(k * count for k, count in enumerate(gains, 1)) == 21 - first
            assert done.num_model_calls == first + sum(gains)
            assert (21 - first) / sum(gains) >= least


@pytest.mark.slow
def test_two_passes_give_two_tokens_at_least_and_block_and_one_at_most() -> None:
    drafting, requests = sampler(stop_token_ids=(), max_new_tokens=21), requests_of(LENGTHS)
    texts = {i: c.tokens for i, c in completed(alone(drafting), model(), requests).items()}
    names = [f.name for f in drafting.__dataclass_fields__.values()]
    fields = {n: getattr(drafting, n) for n in names}
    counting = model()
    for speculating, least in ((drafting, 2.0), (Cribbing(**fields, texts=texts), 2.3)):
        for index, done in completed(speculating, counting, requests).items():
            gains = done.counts[GAINS]
            assert isinstance(gains, Sequence)
            assert len(gains) == BLOCK + 1
            # The pass over the prompt has written the first token, unless that is one token long.
            first = int(len(requests[index].prompt) > 1)
            assert sum(k * count for k, count in enumerate(gains, 1)) == 21 - first
            cycles, cut = sum(gains), gains[0]  # a last token needs no second pass
            assert done.num_model_calls == first + 2 * cycles - cut
            assert cut <= 1
            assert (21 - first - cut) / max(cycles - cut, 1) >= least


# Distribution: a target that knows the last two tokens, and masks that know what stands before.

_GENERATOR = torch.Generator().manual_seed(0)
_NUM, _N, _K = 3, 4, 3  # tokens beside the mask, written, of a block
_TARGET = torch.zeros(_NUM + 1, _NUM + 1, _NUM + 1, dtype=torch.float64)
_TARGET[:, :, :_NUM] = torch.rand(_NUM + 1, _NUM + 1, _NUM, generator=_GENERATOR).double() ** 2
_TARGET /= _TARGET.sum(-1, keepdim=True)
_DRAFT = torch.rand(_NUM, _K + 1, _NUM + 1, generator=_GENERATOR).double() ** 2


class TableModel(drafts.TableModel):
    max_length = None

    def encode(
        self,
        tokens: Tensor,
        num_tokens: Tensor,
        cache: DecodingCache,
        rows: Tensor,
        rule: MaskRule,
        *,
        positions: Tensor | None = None,
        is_draft: Tensor | None = None,
    ) -> Tensor:
        assert isinstance(cache, drafts.TableCache)
        if is_draft is not None:  # masks, and nothing but masks, where a draft takes one pass
            assert torch.equal(is_draft, tokens == _NUM)
        if tokens.shape[1] > _K + 1:  # a verification, and masks behind each of its tokens
            text, place = tokens[:, :_K], torch.arange(1, _K + 1)
            told = self.encode(text, num_tokens.clamp(max=_K), cache, rows, rule)
            of_masks = _DRAFT[text[:, :, None].clamp(max=_NUM - 1), place].flatten(1, 2)
            return torch.cat([told, of_masks.log()], dim=1)
        at = cache.lengths[rows, None] + torch.arange(tokens.shape[1])
        cache.tokens[rows[:, None], at] = tokens
        before = cache.tokens[rows[:, None], (at - 1).clamp(min=0)]
        place = torch.arange(tokens.shape[1]).clamp(max=_K)
        of_mask = _DRAFT[tokens[:, :1].clamp(max=_NUM - 1), place]
        states = torch.where((tokens == _NUM)[..., None], of_mask, _TARGET[before, tokens])
        return states.log()


def filtered(drafting: SelfSpeculationSampler) -> Tensor:
    """The target's law after temperature and filters, entry by entry."""
    law = _TARGET ** (1.0 / drafting.temperature)
    law = law / law.sum(-1, keepdim=True)
    for row in law.view(-1, _NUM + 1):
        order = row.argsort(descending=True)
        kept = order[: drafting.top_k or _NUM]
        if drafting.top_p is not None:
            mass, kept = 0.0, []
            for token in order.tolist():
                if mass < drafting.top_p:
                    kept.append(token)
                mass += float(row[token])
        is_out = torch.ones(_NUM + 1, dtype=torch.bool)
        is_out[kept] = False
        row[is_out] = 0.0
        row /= row.sum()
    return law


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [
        {},
        {"draft_temperature": 0.0},
        {"predicts_next": True},
        {"draft_steps": 2},
        {"draft_steps": 2, "draft_temperature": 0.0, "predicts_next": True},
        {"draft_ahead": True, "keeps_base": True},
        {"draft_ahead": True, "predicts_next": True},
        {"draft_ahead": True, "draft_temperature": 0.0},
        {"keeps_base": True, "predicts_next": True},
        {"top_k": 2, "temperature": 0.7, "draft_temperature": 1.3},
        {"top_p": 0.7, "draft_ahead": True, "draft_temperature": 0.6},
    ],
    ids=str,
)
def test_sampled_text_has_the_distribution_of_the_model_alone(way: dict[str, Any]) -> None:
    count, prompt = 12_000, (0, 1)
    drafting = SelfSpeculationSampler(
        **{
            "mask_token_id": _NUM,
            "block_length": _K,
            "max_new_tokens": _N,
            "temperature": 1.0,
            **way,
        }
    )
    target = filtered(drafting)
    requests = [Request(id=index, prompt=prompt) for index in range(count)]
    table: Any = TableModel()
    found = torch.zeros((_NUM,) * _N, dtype=torch.float64)
    for done in drafting.complete(table, requests, key=1, num_slots=4000):
        found[tuple(done.tokens)] += 1
    distance = degrees = 0.0
    for continuation in itertools.product(range(_NUM), repeat=_N):
        text = (*prompt, *continuation)
        pairs = (float(target[text[k], text[k + 1], text[k + 2]]) for k in range(_N))
        expected = count * float(torch.tensor(list(pairs)).double().prod())
        assert expected > 0.0 or not found[continuation]
        if expected >= 5.0:
            distance += (float(found[continuation]) - expected) ** 2 / expected
            degrees += 1
    # Chi-square is normal for so many degrees, about.
    assert distance < degrees + 4.0 * (2.0 * degrees) ** 0.5, (distance, degrees)


@pytest.mark.parametrize("way", [{}, {"draft_ahead": True}, {"draft_temperature": 0.0}])
def test_a_token_that_is_never_to_be_is_not_written(way: dict[str, Any]) -> None:
    """Nor by `ar`, whose text it still is."""

    class Wanting(CountingModel):
        def head(self, hidden: Tensor) -> Tensor:
            logits = super().head(hidden).clone()
            logits[:, MASK] += 20.0
            return logits

    wanting = Wanting(model().model, vocab_size=V)
    fields = {"never_token_id": MASK, "temperature": 1.0, "max_new_tokens": 9, **way}
    drafting = sampler(**fields)
    found = completed(drafting, wanting, requests_of((5, 3)))
    assert not any(MASK in done.tokens for done in found.values())
    ar = replace(alone(drafting), never_token_id=MASK)
    expected = completed(ar, wanting, requests_of((5, 3)))
    assert not any(MASK in done.tokens for done in expected.values())
    if drafting.proposal_temperature == 0.0:
        assert {i: d.tokens for i, d in found.items()} == {i: d.tokens for i, d in expected.items()}
    without = completed(replace(ar, never_token_id=None), wanting, requests_of((5, 3)))
    assert all(MASK in done.tokens for done in without.values())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_is_never_drafted(temperature: float) -> None:
    class Wanting(CountingModel):
        def head(self, hidden: Tensor) -> Tensor:
            logits = super().head(hidden).clone()
            logits[:, MASK] += 1000.0
            return logits

    proposed: list[Tensor] = []

    class Watching(SelfSpeculationSampler):
        def _propose(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            found = super()._propose(*args, **kwargs)
            proposed.append(found[0])
            return found

    drafting = Watching(
        mask_token_id=MASK, block_length=BLOCK, temperature=temperature, max_new_tokens=12
    )
    completed(drafting, Wanting(model().model, vocab_size=V), requests_of((5, 3)))
    assert len(proposed) > 3
    assert not any(bool((tokens == MASK).any()) for tokens in proposed)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"block_length": 1}, "block_length must be at least 2"),
        ({"temperature": 0.0, "draft_temperature": 0.5}, "draft_temperature must be 0"),
        ({"draft_steps": BLOCK}, r"draft_steps must lie in 1\.\.3"),
        ({"draft_steps": 2, "draft_ahead": True}, "draft_steps must be 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(sampler(), **fields)
