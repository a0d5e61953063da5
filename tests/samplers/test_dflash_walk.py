"""Decoding with a draft whose selector walks over candidates (DFlash 2): the law of a walk and of
the text by enumeration, and the target's own text with transformers models.
"""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.builders import tiny_causal
from tests.samplers.test_dflash import (
    _TARGET,
    ARCHITECTURES,
    BLOCK,
    PROMPT_LENGTHS,
    SIZE,
    STOPS,
    D,
    N,
    TableModel,
    V,
    completed,
    requests_of,
)
from tokendiff.diffusion.attention_masks import causal_by_position
from tokendiff.diffusion.candidates import Candidates
from tokendiff.diffusion.interfaces import DecodingCache, Request
from tokendiff.models.causal import CausalModel
from tokendiff.models.dflash.decoder import DraftedModel
from tokendiff.models.dflash.model import DFlash2DraftModel
from tokendiff.models.dflash.planning import new_draft_config
from tokendiff.samplers.autoregressive import AutoregressiveSampler
from tokendiff.samplers.dflash import DFlashSampler
from tokendiff.samplers.speculation import GAINS
from tokendiff.verification.oracles import chi_square

# Two candidates of three tokens at each place, which depend on the anchor: the third is impossible.
_TOKENS = torch.tensor([[[0, 1], [2, 1]], [[1, 2], [0, 2]], [[2, 0], [1, 0]]])
_LOGITS = torch.tensor(
    [[[0.9, 0.1], [0.3, 0.4]], [[0.0, 0.7], [0.2, 0.0]], [[1.0, 0.5], [0.1, 1.2]]]
)
_FEATURES = torch.tensor([[[1.0, 0.5], [0.2, 1.5]]]).expand(V, D, 2)
_BEFORE = torch.tensor([[1.0, -1.0], [0.4, 1.3], [-0.8, 0.6]])
_BEHIND = torch.tensor([[0.7, 0.2], [-1.1, 0.5], [0.3, -0.9]])


def candidates_of(anchors: Tensor) -> Candidates:
    return Candidates(
        tokens=_TOKENS[anchors],
        logits=_LOGITS[anchors].double(),
        features=_FEATURES[anchors].double(),
        predecessors=_BEFORE.double(),
        successors=_BEHIND.double(),
        vocab_size=V,
    )


class WalkingTable(TableModel):
    def draft(self, anchors: Tensor, cache: DecodingCache, rows: Tensor) -> Any:
        return candidates_of(anchors)


def law_of_walks(anchor: int, temperature: float) -> dict[tuple[int, ...], float]:
    """Probability of each path, by plain sums."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for k in range(D):
        longer = {}
        for path, mass in law.items():
            before = path[-1] if path else anchor
            weights = {}
            for j, c in enumerate(_TOKENS[anchor, k].tolist()):
                pair = sum(
                    float(_BEFORE[before, r] * _FEATURES[anchor, k, r] * _BEHIND[c, r])
                    for r in range(2)
                )
                weights[c] = np.exp((float(_LOGITS[anchor, k, j]) + pair) / temperature)
            for c, weight in weights.items():
                longer[(*path, c)] = mass * weight / sum(weights.values())
        law = longer
    return law


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_walk_is_drawn_from_what_it_says_and_that_is_its_law(temperature: float) -> None:
    count = 6000
    sampler = DFlashSampler(max_new_tokens=N, temperature=temperature)
    for anchor in range(V):
        generator = torch.Generator().manual_seed(anchor)
        uniforms = torch.rand(count, D, generator=generator)
        anchors = torch.full((count,), anchor)
        path, logits = sampler._walk(candidates_of(anchors), anchors, uniforms)
        assert logits is not None
        law = law_of_walks(anchor, temperature)
        said = logits.softmax(-1)
        for line, q in zip(path[:50].tolist(), said[:50], strict=True):
            chance = float(q[range(D), line].prod())
            assert chance == pytest.approx(law[tuple(line)])
        assert ((said > 0).sum(-1) == 2).all()
        found = Counter(map(tuple, path.tolist()))
        assert set(found) <= set(law)
        expected = count * np.array(list(law.values()))
        often = expected > 5
        observed = np.array([found[line] for line in law])
        assert chi_square(observed[often], expected[often]) < 3.0


@pytest.mark.parametrize("draft_temperature", [0.0, None, 0.5])
def test_sampled_text_has_the_distribution_of_the_target(draft_temperature: float | None) -> None:
    """All 3^4 continuations, from rows that pass through fewer slots."""
    count = 4000
    sampler = DFlashSampler(max_new_tokens=N, draft_temperature=draft_temperature)
    requests = [Request(id=index, prompt=(0, 1)) for index in range(count)]
    done = list(sampler.complete(WalkingTable(), requests, key=2, num_slots=1000))
    texts = Counter(tuple(completion.tokens) for completion in done)
    gains = np.sum([completion.counts[GAINS] for completion in done], axis=0)
    assert (gains > 0).all(), "drafts of every length were accepted"
    every = list(itertools.product(range(V), repeat=N))
    expected = []
    for continuation in every:
        text = (0, 1, *continuation)
        steps = [float(_TARGET[text[k], text[k + 1], text[k + 2]]) for k in range(N)]
        expected.append(count * float(np.prod(steps)))
    observed = np.array([texts[continuation] for continuation in every])
    possible = np.array(expected) > 0
    assert not observed[~possible].any()
    assert chi_square(observed[possible], np.array(expected)[possible]) < 1.6


def walking_model(model_type: str, *, window: int = 2048, seed: int = 1) -> DraftedModel:
    """One whose selector has much to say."""
    layers = {"n_layer": 3} if model_type == "gpt2" else {"num_hidden_layers": 3}
    target = tiny_causal(model_type, vocab_size=SIZE, **layers, **ARCHITECTURES[model_type])
    config = new_draft_config(
        target.config,
        target_model_id="target",
        num_layers=2,
        block_size=BLOCK,
        mask_token_id=SIZE - 1,
        target_layer_ids=[-1, 1],
        layout="dflash2",
    )
    config.sliding_window = window
    torch.manual_seed(seed)
    draft = DFlash2DraftModel(config).double().eval()
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return DraftedModel(CausalModel(target, vocab_size=SIZE), draft)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3", "gpt2", "gemma2"])
def test_text_is_that_of_the_target_alone_in_ragged_batches(model_type: str) -> None:
    cases: list[dict[str, Any]] = [
        {"temperature": 0.0, "stop_token_ids": STOPS},
        {"temperature": 0.7, "top_k": 5, "draft_temperature": 0.0},
    ]
    for options in cases:
        model = walking_model(model_type, window=6)
        alone = {name: value for name, value in options.items() if name != "draft_temperature"}
        own = AutoregressiveSampler(max_new_tokens=12, **alone)
        expected = completed(own, model.target)
        sampler = DFlashSampler(max_new_tokens=12, **options)
        for num_slots in (1, 4):
            done = completed(sampler, model, num_slots=num_slots)
            for row, completion in expected.items():
                assert done[row].tokens == completion.tokens


@pytest.mark.slow
@pytest.mark.parametrize("window", [5, 2048])
@torch.no_grad()
def test_drafts_of_a_ragged_batch_are_those_of_the_whole_text(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn text does not depend on the batch, and candidates are those of one call of the draft on
    hidden states of the whole text, whose windows are cut by the model itself.
    """
    model = walking_model("qwen3", window=window)
    shape = model._draft.config
    shape.output_multiplier, shape.final_logit_softcapping = 0.7, 3.0
    sampler = DFlashSampler(max_new_tokens=12)
    calls: list[tuple[int, int, Candidates, int]] = []
    original = DraftedModel.draft

    def spy(self: Any, anchors: Tensor, cache: Any, rows: Tensor) -> Any:
        found: Any = original(self, anchors, cache, rows)
        lengths = cache.lengths[rows].tolist()
        calls.extend((int(a), lengths[n], found, n) for n, a in enumerate(anchors.tolist()))
        return found

    monkeypatch.setattr(DraftedModel, "draft", spy)
    done = completed(sampler, model, num_slots=4)
    monkeypatch.undo()
    for row, completion in completed(sampler, model, num_slots=1).items():
        assert done[row].tokens == completion.tokens
    texts = [(*r.prompt, *done[r.id].tokens) for r in requests_of(PROMPT_LENGTHS)]
    draft, target = model._draft, model.target.model
    num_checked = 0
    for anchor, length, found, n in calls:
        text = [t for t in texts if len(t) > length and t[length] == anchor]
        if len(text) != 1 or length == 0:
            continue
        tokens = torch.tensor([text[0][: length + 1]])
        states = target(tokens[:, :length], output_hidden_states=True).hidden_states
        context = torch.cat([states[0], states[2]], dim=-1)
        block = torch.tensor([[anchor, *[SIZE - 1] * (BLOCK - 1)]])
        output = draft(target.get_input_embeddings()(block), context).last_hidden_state[0, 1:]
        best = target.get_output_embeddings()(output).topk(16)
        logits = 3.0 * torch.tanh(0.7 * best.values / 3.0)
        torch.testing.assert_close(found.logits[n], logits, rtol=1e-4, atol=1e-5)
        assert draft.candidate_selector is not None
        torch.testing.assert_close(
            found.features[n], draft.candidate_selector(output), rtol=1e-4, atol=1e-5
        )
        num_checked += 1
    assert num_checked > 10


@torch.no_grad()
def test_a_window_hides_the_first_token_as_soon_as_it_is_full() -> None:
    length = 6
    model = walking_model("qwen3", window=length + BLOCK - 1)
    tokens, rows = torch.arange(length)[None] % SIZE, torch.arange(1)
    cache, counts = model.new_cache(1), torch.tensor([length])
    model.encode(tokens, counts, cache, rows, causal_by_position)
    cache.extend(rows, counts)
    found: Any = model.draft(torch.tensor([3]), cache, rows)
    draft, target = model._draft, model.target.model
    states = target(tokens, output_hidden_states=True).hidden_states
    block = torch.tensor([[3, *[SIZE - 1] * (BLOCK - 1)]])
    context = torch.cat([states[0], states[2]], dim=-1)
    output = draft(target.get_input_embeddings()(block), context).last_hidden_state[:, 1:]
    assert draft.candidate_selector is not None
    torch.testing.assert_close(found.features, draft.candidate_selector(output))
