"""Drafted blocks: the acceptance rules against exact enumeration, and decoding against the target
alone.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.builders import tiny_causal
from tokendiff.diffusion.attention_masks import MaskRule, causal_by_position
from tokendiff.diffusion.interfaces import Completion, Decoder, DecodingCache, Request
from tokendiff.models.causal import CausalModel
from tokendiff.models.dflash.decoder import DraftedModel
from tokendiff.models.dflash.model import DFlashDraftModel
from tokendiff.models.dflash.planning import new_draft_config
from tokendiff.samplers import autoregressive
from tokendiff.samplers.acceptance import accept_drawn, accept_own
from tokendiff.samplers.autoregressive import AutoregressiveSampler
from tokendiff.samplers.categorical import draw
from tokendiff.samplers.dflash import DFlashSampler
from tokendiff.samplers.open_ended import OpenEndedSampler
from tokendiff.samplers.speculation import GAINS
from tokendiff.verification.oracles import chi_square

# The target over three tokens, given the last two; eighths, so that every threshold that a uniform
# number is compared with is a multiple of 1/120, and midpoints of that grid integrate exactly.
_TARGET = (
    torch.tensor(
        [
            [[4, 2, 2], [1, 6, 1], [0, 3, 5]],
            [[2, 2, 4], [5, 0, 3], [1, 1, 6]],
            [[6, 1, 1], [3, 4, 1], [2, 5, 1]],
        ],
        dtype=torch.float64,
    )
    / 8
)
# The draft's beliefs at two places, given the last token: no belief of the target's, and at places
# exact zeros where the target has none.
_DRAFT = (
    torch.tensor(
        [
            [[2, 1, 1], [1, 2, 1]],
            [[1, 1, 2], [2, 0, 2]],
            [[0, 2, 2], [1, 1, 2]],
        ],
        dtype=torch.float64,
    )
    / 4
)
V, D, N = 3, 2, 4
_GRID = (torch.arange(120, dtype=torch.float64) + 0.5) / 120


def target_rows(last: int, anchor: int, drafted: Tensor) -> Tensor:
    """[B, D + 1, V]: the target behind the anchor and behind each drafted token [B, D]."""
    before = torch.tensor([last, anchor]).expand(len(drafted), 2)
    tokens = torch.cat([before, drafted], dim=1)
    return torch.stack([_TARGET[tokens[:, k], tokens[:, k + 1]] for k in range(D + 1)], dim=1)


def block_law(rule: str, last: int, anchor: int) -> dict[tuple[int, ...], float]:
    """Probability of everything that one block may append, integrated exactly over drafted tokens
    and uniform numbers by running the rule on all of them.
    """
    drafted = torch.tensor(list(itertools.product(range(V), repeat=D)))
    q = _DRAFT[anchor]
    if rule == "own":
        drafted = q.argmax(-1)[None]  # what a draft proposes where it does not draw
        weight = torch.ones(1, dtype=torch.float64)
        own = torch.tensor(list(itertools.product(range(V), repeat=D + 1)))
        drafted, own = drafted.repeat(len(own), 1), own
        p = target_rows(last, anchor, drafted)
        weight = p.gather(-1, own[..., None])[..., 0].prod(-1)
        verdict = accept_own(drafted, own)
    else:
        weight = q[0, drafted[:, 0]] * q[1, drafted[:, 1]]
        # An acceptance threshold p/q is a multiple of 1/4 or of 1/2; the residual's of 1/1..1/8.
        judge = torch.tensor(list(itertools.product(_GRID[5::10].tolist(), repeat=D)))
        judge = judge.double()
        index = torch.cartesian_prod(
            torch.arange(len(drafted)), torch.arange(len(judge)), torch.arange(len(_GRID))
        )
        drafted, weight = drafted[index[:, 0]], weight[index[:, 0]] / (len(judge) * len(_GRID))
        verdict = accept_drawn(
            drafted,
            draft_logits=q.log().expand(len(drafted), D, V),
            target_logits=target_rows(last, anchor, drafted).log(),
            judge=judge[index[:, 1]],
            redraw=_GRID[index[:, 2], None].expand(len(index), D + 1),
        )
    law: dict[tuple[int, ...], float] = defaultdict(float)
    for row, count, token, mass in zip(
        drafted.tolist(),
        verdict.num_accepted.tolist(),
        verdict.next_token.tolist(),
        weight.tolist(),
        strict=True,
    ):
        law[(*row[:count], token)] += mass
    return law


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["own", "drawn"])
def test_every_continuation_has_the_targets_probability(rule: str) -> None:
    """Blocks are appended until there are N tokens, and what is over is cut off, as in decoding."""
    last, anchor = 0, 1
    blocks = {(a, b): block_law(rule, a, b) for a in range(V) for b in range(V)}
    done: dict[tuple[int, ...], float] = defaultdict(float)
    open_texts: dict[tuple[int, ...], float] = {(last, anchor): 1.0}
    while open_texts:
        longer: dict[tuple[int, ...], float] = defaultdict(float)
        for text, mass in open_texts.items():
            for block, share in blocks[text[-2], text[-1]].items():
                grown = text + block
                if len(grown) >= N + 2:
                    done[grown[2 : N + 2]] += mass * share
                else:
                    longer[grown] += mass * share
        open_texts = longer
    for continuation in itertools.product(range(V), repeat=N):
        text = (last, anchor, *continuation)
        expected = torch.tensor(
            [float(_TARGET[text[k], text[k + 1], text[k + 2]]) for k in range(N)]
        )
        assert done[continuation] == pytest.approx(float(expected.double().prod()), abs=1e-9)


def test_drawn_tokens_are_accepted_as_often_as_the_distributions_overlap() -> None:
    law = block_law("drawn", 0, 1)
    first = torch.minimum(_TARGET[0, 1], _DRAFT[1, 0]).sum()
    longer = sum(mass for block, mass in law.items() if len(block) > 1)
    assert longer == pytest.approx(float(first), abs=1e-9)


def test_a_draft_that_is_the_target_is_always_accepted() -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, D + 1, 50, dtype=torch.float64)
    uniform = torch.rand(64, D, dtype=torch.float64)
    drafted = draw(logits[:, :D].reshape(-1, 50).softmax(-1), uniform.reshape(-1)).reshape(64, D)
    verdict = accept_drawn(
        drafted,
        draft_logits=logits[:, :D],
        target_logits=logits,
        judge=torch.rand(64, D, dtype=torch.float64),
        redraw=torch.rand(64, D + 1, dtype=torch.float64),
    )
    assert verdict.num_accepted.tolist() == [D] * 64


# Decoding on the table: the target knows the last two tokens, the draft the anchor.


class TableCache:
    """Keeps tokens in place of keys and values."""

    def __init__(self, num_rows: int) -> None:
        self.tokens = torch.zeros(num_rows, 64, dtype=torch.int64)
        self.lengths = torch.zeros(num_rows, dtype=torch.int64)

    def extend(self, rows: Tensor, counts: Tensor) -> None:
        self.lengths[rows] += counts

    def crop(self, rows: Tensor, lengths: Tensor) -> None:
        self.lengths[rows] = torch.minimum(self.lengths[rows], lengths)

    def move(self, source: int, target: int) -> None:
        self.tokens[target], self.lengths[target] = self.tokens[source], self.lengths[source]


class TableModel:
    """Hidden states are log-probabilities, and the head leaves them as they are."""

    device = torch.device("cpu")
    block_size = D + 1

    def new_cache(self, num_rows: int) -> TableCache:
        return TableCache(num_rows)

    def encode(
        self,
        tokens: Tensor,
        num_tokens: Tensor,
        cache: DecodingCache,
        rows: Tensor,
        rule: MaskRule,
    ) -> Tensor:
        assert isinstance(cache, TableCache)
        at = cache.lengths[rows, None] + torch.arange(tokens.shape[1])
        cache.tokens[rows[:, None], at] = tokens
        before = cache.tokens[rows[:, None], (at - 1).clamp(min=0)]
        return _TARGET[before, tokens].log()

    def head(self, hidden: Tensor) -> Tensor:
        return hidden

    def draft(self, anchors: Tensor, cache: DecodingCache, rows: Tensor) -> Tensor:
        return _DRAFT[anchors].log()


@pytest.mark.parametrize("draft_temperature", [0.0, None, 0.5])
def test_sampled_text_has_the_distribution_of_the_target(draft_temperature: float | None) -> None:
    """All 3^4 continuations, from rows that pass through fewer slots."""
    count = 4000
    sampler = DFlashSampler(max_new_tokens=N, draft_temperature=draft_temperature)
    requests = [Request(id=index, prompt=(0, 1)) for index in range(count)]
    texts = Counter(
        tuple(completion.tokens)
        for completion in sampler.complete(TableModel(), requests, key=2, num_slots=1000)
    )
    expected = []
    for continuation in itertools.product(range(V), repeat=N):
        text = (0, 1, *continuation)
        steps = [float(_TARGET[text[k], text[k + 1], text[k + 2]]) for k in range(N)]
        expected.append(count * float(np.prod(steps)))
    observed = [texts[continuation] for continuation in itertools.product(range(V), repeat=N)]
    possible = np.array(expected) > 0
    assert not np.array(observed)[~possible].any()
    assert chi_square(np.array(observed)[possible], np.array(expected)[possible]) < 1.6


# Decoding with transformers models, in float64: the target's argmax is no matter of rounding.

SIZE, BLOCK, MASK = 48, 4, 47
STOPS = (1, 2, 7, 12, 20, 33)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "gpt2": {"n_positions": 46},  # no more than prompt and text
    "gemma2": {"sliding_window": 6, "final_logit_softcapping": 5.0, "tie_word_embeddings": False},
}
PROMPT_LENGTHS = (1, 9, 3, 17, 5, 2, 30)


class Cribbing(DraftedModel):
    """Proposes what it was told the target writes, mostly: the draft that there is runs beside, and
    its caches with it.
    """

    crib: dict[tuple[int, int], Tensor]

    def draft(self, anchors: Tensor, cache: DecodingCache, rows: Tensor) -> Tensor:
        hidden = super().draft(anchors, cache, rows)
        assert isinstance(hidden, Tensor)
        weight = self.target.model.get_output_embeddings().weight
        lengths = cache.lengths[rows].tolist()
        for row, place in enumerate(zip(lengths, anchors.tolist(), strict=True)):
            if (known := self.crib.get(place)) is not None:
                cribbed = torch.linalg.pinv(weight).T[known] * 100
                hidden[row, : len(known)] = self.target.before_head(cribbed)
        return hidden

    @classmethod
    def of(cls, model: DraftedModel, texts: Sequence[tuple[int, ...]]) -> "Cribbing":
        cribbing = cls(model.target, model._draft)
        cribbing.crib = {
            (at, text[at]): torch.tensor(text[at + 1 : at + BLOCK])
            for text in texts
            for at in range(len(text) - 1)
        }
        return cribbing


def drafted_model(
    model_type: str = "qwen3", *, seed: int = 1, size: int = SIZE, **changes: Any
) -> DraftedModel:
    layers = {"n_layer": 3} if model_type == "gpt2" else {"num_hidden_layers": 3}
    target = tiny_causal(model_type, vocab_size=size, **layers, **changes)
    config = new_draft_config(
        target.config,
        target_model_id="target",
        num_layers=2,
        block_size=BLOCK,
        mask_token_id=size - 1,
        target_layer_ids=[-1, 1],
    )
    torch.manual_seed(seed)
    draft = DFlashDraftModel(config).double().eval()
    return DraftedModel(CausalModel(target, vocab_size=size), draft)


def requests_of(lengths: Sequence[int] = PROMPT_LENGTHS) -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(id=index, prompt=tuple(rng.integers(8, SIZE, size=length).tolist()))
        for index, length in enumerate(lengths)
    ]


def completed(
    sampler: OpenEndedSampler, model: Decoder, *, num_slots: int = 3
) -> dict[int, Completion]:
    done = list(sampler.complete(model, requests_of(), key=5, num_slots=num_slots))
    assert len(done) == len(PROMPT_LENGTHS)
    return {completion.id: completion for completion in done}


def generated(model: DraftedModel, prompt: Sequence[int], **options: Any) -> list[int]:
    """What transformers itself writes."""
    output = model.target.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def cribbed(model: DraftedModel, done: dict[int, Completion]) -> Cribbing:
    """A draft that knows these texts, but for every eighth of their tokens."""
    texts = []
    for request in requests_of():
        text = [*request.prompt, *done[request.id].tokens]
        texts.append(tuple(9 if at % 8 == 5 else token for at, token in enumerate(text)))
    return Cribbing.of(model, texts)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3", "gpt2", "gemma2"])
def test_greedy_text_is_that_of_transformers_with_any_draft(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ARCHITECTURES[model_type]
    model = drafted_model(model_type, **changes)
    unstopped = generated(model, requests_of()[3].prompt, max_new_tokens=16)
    stops = (*STOPS, unstopped[6])
    options = {"max_new_tokens": 16, "eos_token_id": list(stops)}
    expected = {r.id: generated(model, r.prompt, **options) for r in requests_of()}
    assert len({len(tokens) for tokens in expected.values()}) > 1, "rows end at different times"
    sampler = DFlashSampler(max_new_tokens=16, temperature=0.0, stop_token_ids=stops)
    alone = completed(sampler, model, num_slots=1)
    for other in (model, drafted_model(model_type, seed=2, **changes), cribbed(model, alone)):
        gains = np.zeros(BLOCK, dtype=int)
        for num_slots, chunk in ((3, 512), (10, 3)):
            monkeypatch.setattr(autoregressive, "PREFILL_CHUNK", chunk)
            for row, completion in completed(sampler, other, num_slots=num_slots).items():
                assert completion.tokens == expected[row]
                is_stopped = completion.tokens[-1] in stops
                assert completion.finish_reason == ("stop" if is_stopped else "length")
                gains += completion.counts[GAINS]
    assert (gains > 0).all(), "blocks of every length were accepted"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8, "stop_token_ids": STOPS}],
)
def test_sampled_text_is_that_of_the_target_alone_with_any_draft(options: dict[str, Any]) -> None:
    """The same random numbers, and so the same tokens: not only their distribution."""
    model = drafted_model()
    expected = completed(AutoregressiveSampler(max_new_tokens=14, **options), model.target)
    sampler = DFlashSampler(max_new_tokens=14, draft_temperature=0.0, **options)
    for other in (model, cribbed(model, expected)):
        for num_slots in (1, 4):
            done = completed(sampler, other, num_slots=num_slots)
            for row, completion in expected.items():
                assert done[row].tokens == completion.tokens
                assert done[row].finish_reason == completion.finish_reason


@pytest.mark.slow
def test_text_from_drawn_proposals_is_a_matter_of_the_row_alone() -> None:
    model = drafted_model()
    sampler = DFlashSampler(max_new_tokens=20, draft_temperature=0.8, stop_token_ids=STOPS)
    alone = completed(sampler, model, num_slots=1)
    assert completed(sampler, model, num_slots=4) == alone
    assert completed(sampler, drafted_model(seed=2)) != alone, "another draft, another text"


def test_blocks_account_for_every_token_and_every_pass() -> None:
    model = drafted_model()
    sampler = DFlashSampler(max_new_tokens=19, temperature=0.0, stop_token_ids=STOPS)
    done = completed(sampler, cribbed(model, completed(sampler, model)))
    for request in requests_of():
        completion = done[request.id]
        gains = np.array(completion.counts[GAINS])
        by_prefill = int(len(request.prompt) > 1)  # a prompt of one token is an anchor itself
        assert gains @ np.arange(1, BLOCK + 1) + by_prefill == len(completion.tokens)
        assert gains.sum() + by_prefill == completion.num_model_calls
    assert sum(c.num_model_calls for c in done.values()) < sum(len(c.tokens) for c in done.values())


@pytest.mark.parametrize("length", [2, 9])
def test_blocks_are_those_of_transformers_own_decoder(length: int) -> None:
    """The same text in the same number of the target's passes, with a draft as it is."""
    model = drafted_model(size=5)
    request = Request(id=0, prompt=tuple(index % 4 for index in range(length)))
    calls: list[int] = []
    hook = model.target.model.register_forward_hook(lambda *_: calls.append(1))
    expected = generated(
        model,
        request.prompt,
        max_new_tokens=40,
        assistant_model=model._draft,
        speculation_type="dflash",
    )
    hook.remove()
    sampler = DFlashSampler(max_new_tokens=40, temperature=0.0)
    [completion] = sampler.complete(model, [request], key=0, num_slots=1)
    assert completion.tokens == expected
    assert completion.num_model_calls == len(calls)
    gains = completion.counts[GAINS]
    assert isinstance(gains, list)
    assert sum(gains[1:]) > 0, "some proposals were accepted"


def test_drafts_in_a_batch_are_those_of_the_whole_text_at_once() -> None:
    """Cached contexts of rows of different lengths, read in pieces, against one forward pass."""
    model = drafted_model()
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(SIZE, (n,), generator=generator) for n in (1, 14, 6)]
    cache, rows = model.new_cache(3), torch.arange(3)
    cuts = [[0, 0, 0], [1, 7, 2], [1, 9, 5], [1, 14, 6]]  # what is read in each of three pieces
    for before, after in itertools.pairwise(torch.tensor(cuts)):
        counts = after - before
        chosen = rows[counts > 0]
        tokens = torch.zeros(len(chosen), int(counts.max()) + 2, dtype=torch.int64)
        for index, row in enumerate(chosen.tolist()):
            piece = texts[row][before[row] : before[row] + tokens.shape[1]]
            tokens[index, : len(piece)] = piece
        model.encode(tokens, counts[chosen] + 0, cache, chosen, causal_by_position)
        cache.extend(chosen, counts[chosen])
        anchors = torch.tensor([5, 6, 7])[chosen]
        drafted = model.draft(anchors, cache, chosen)
        assert isinstance(drafted, Tensor)
        for index, row in enumerate(chosen.tolist()):
            context = texts[row][: after[row]]
            assert torch.allclose(
                drafted[index], draft_at_once(model, context, int(anchors[index]))
            )


def test_pieces_of_few_tokens_are_all_read_without_a_block_between_them() -> None:
    model, rows, most = drafted_model(), torch.arange(2), 6
    texts = torch.randint(SIZE, (2, most), generator=torch.Generator().manual_seed(0))
    cache, anchors = model.new_cache(2), torch.tensor([5, 6])
    for piece in texts.split(2, dim=1):
        counts = torch.full_like(rows, piece.shape[1])
        model.encode(piece, counts, cache, rows, causal_by_position)
        cache.extend(rows, counts)
    cache.move(0, 1)  # with what waits for the next block
    drafted = model.draft(anchors, cache, rows)
    assert isinstance(drafted, Tensor)
    for row in range(2):
        assert torch.allclose(drafted[row], draft_at_once(model, texts[0], int(anchors[row])))


def draft_at_once(model: DraftedModel, context: Tensor, anchor: int) -> Tensor:
    output = model.target.model(context[None], output_hidden_states=True)
    ids = model._draft.config.target_layer_ids
    block = torch.tensor([[anchor, *[MASK] * (BLOCK - 1)]])
    drafted = model._draft(
        noise_embeds=model.target.model.get_input_embeddings()(block),
        context_hidden_states=torch.cat([output.hidden_states[i + 1] for i in ids], dim=-1),
    )
    hidden: Tensor = drafted.last_hidden_state[0, 1:]
    return hidden


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"draft_temperature": -0.5}, "must not be negative, got -0.5"),
        ({"draft_temperature": 0.5, "temperature": 0.0}, "must be 0 at temperature 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DFlashSampler(**fields)


def test_a_model_without_a_draft_is_refused() -> None:
    model = drafted_model()
    with pytest.raises(TypeError, match="needs a model with a draft, got CausalModel"):
        completed(DFlashSampler(), model.target)
