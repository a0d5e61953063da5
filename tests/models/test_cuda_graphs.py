"""Passes that are recorded and replayed, on the CPU: what is replayed there are the operations that
ran (`benchmarks.recorded_passes`), on the memory that they ran on.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.models import PROVEN, whole_row_denoiser
from benchmarks.gpu.samplers import FIXED, OPEN_ENDED, completions_by, decoder_for, rows_by
from benchmarks.recorded_passes import OperationRecorder
from tests.builders import letter_tokenizer, tiny_causal
from tests.models.published import dream
from tests.samplers import test_dflash_walk
from tests.samplers.test_decoding import ARCHITECTURES, V, causal_model, completed, requests_of
from tokendiff.config.generate import GenerateConfig
from tokendiff.data.prompts import GenerationRow
from tokendiff.diffusion.attention_masks import block_causal_by_position, causal_by_position
from tokendiff.models import cuda_graphs, ragged_cache
from tokendiff.models.causal import CausalModel
from tokendiff.models.completion import CompletionModel
from tokendiff.models.cuda_graphs import RECORDED_AT, Recorder, Replays
from tokendiff.models.grouped_attention import grouped_attention
from tokendiff.models.kept_base import put_draft_adapters
from tokendiff.models.sampling import SamplingModel
from tokendiff.samplers.autoregressive import AutoregressiveSampler
from tokendiff.samplers.dflash import DFlashSampler
from tokendiff.samplers.sdar import SDARSampler
from tokendiff.samplers.self_speculation import SelfSpeculationSampler

MASK = V - 1


def replaying(model: Any, recorder: Recorder) -> Any:
    """The model, or its target with the draft beside it, with its passes replayed."""
    getattr(model, "target", model).replay_by(recorder)
    return model


def assert_replayed(recorder: OperationRecorder) -> None:
    assert recorder.is_working
    assert recorder.num_recorded > 0
    assert recorder.num_replayed > 2 * recorder.num_recorded


# Text is what it was.


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of tests are short."""
    monkeypatch.setattr(cuda_graphs, "RECORDED_AT", 3)


@pytest.mark.parametrize("name", OPEN_ENDED)
def test_continuations_are_those_without(soon: None, name: str) -> None:
    sampler, recorder = OPEN_ENDED[name], OperationRecorder()
    expected = completions_by(sampler, decoder_for(sampler, "cpu", torch.float64))
    model = replaying(decoder_for(sampler, "cpu", torch.float64), recorder)
    assert completions_by(sampler, model) == expected
    assert_replayed(recorder)


@pytest.mark.parametrize("name", FIXED)
def test_rows_of_one_length_are_those_without(soon: None, name: str) -> None:
    sampler, recorder = FIXED[name], OperationRecorder()
    expected = rows_by(sampler, whole_row_denoiser(PROVEN, "cpu", torch.float64))
    model = whole_row_denoiser(PROVEN, "cpu", torch.float64)
    model.replay_by(recorder)
    assert rows_by(sampler, model) == expected
    assert_replayed(recorder)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_text_of_every_kind_of_layer_while_the_cache_grows(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows, learned positions and capped logits; and a cache that moves when it grows."""
    monkeypatch.setattr(ragged_cache, "_GROWTH", 8)
    sampler = AutoregressiveSampler(max_new_tokens=20, stop_token_ids=(7, 12))
    expected = completed(sampler, causal_model(name), requests_of())
    recorder = OperationRecorder()
    model = replaying(causal_model(name), recorder)
    assert completed(sampler, model, requests_of()) == expected
    assert recorder.is_working
    assert recorder.num_replayed > 0


def with_adapters() -> CausalModel:
    """A model with adapters that count in drafts alone."""
    made = causal_model()
    adapters: Any = {
        "rank": 2,
        "alpha": 4.0,
        "target_modules": ["q_proj", "v_proj"],
        "mask_token_id": MASK,
        "is_new_token": False,
    }
    put_draft_adapters(made, adapters)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("model", [causal_model, with_adapters])
def test_text_of_a_model_that_drafts_for_itself(
    soon: None, model: Callable[[], CausalModel]
) -> None:
    sampler = SelfSpeculationSampler(
        mask_token_id=MASK, block_length=4, max_new_tokens=20, keeps_base=model is with_adapters
    )
    expected = completed(sampler, model(), requests_of())
    recorder = OperationRecorder()
    assert completed(sampler, replaying(model(), recorder), requests_of()) == expected
    assert_replayed(recorder)


@torch.no_grad()
def test_whatever_a_caller_may_change_between_passes_counts() -> None:
    """Where adapters count, which rows there are, how many tokens of each, what they see, which
    layers are asked for.
    """
    plain, recorder = with_adapters(), OperationRecorder()
    model = replaying(with_adapters(), recorder)
    caches = [each.new_cache(3) for each in (plain, model)]
    generator = torch.Generator().manual_seed(4)
    for number in range(48):
        rows = torch.tensor([[0, 1], [2, 0], [1, 2]][number % 3])
        tokens = torch.randint(0, V, (2, 3), generator=generator)
        counts = torch.randint(1, 4, (2,), generator=generator)
        is_draft = torch.rand(2, 3, generator=generator) < 0.5
        rule = (causal_by_position, block_causal_by_position(3))[number % 2]
        found = [
            each.encode_layers(
                tokens,
                counts,
                cache,
                rows,
                rule,
                layers=[(0,), (1,)][number // 24],
                is_draft=None if number % 4 == 0 else is_draft,
            )
            for each, cache in zip((plain, model), caches, strict=True)
        ]
        (expected, states), (hidden, again) = found
        is_there = torch.arange(3) < counts[:, None]
        torch.testing.assert_close(hidden[is_there], expected[is_there])
        torch.testing.assert_close(again[0][is_there], states[0][is_there])
        if number % 2:
            for cache in caches:
                cache.extend(rows, counts)
    assert_replayed(recorder)


@pytest.mark.slow
@pytest.mark.parametrize("window", [6, 2048])
def test_text_of_a_draft_that_walks_over_candidates(window: int) -> None:
    sampler = DFlashSampler(max_new_tokens=20, temperature=0.0)
    walking = test_dflash_walk.walking_model
    expected = completed(sampler, walking("qwen3", window=window), requests_of())  # type: ignore
    recorder = OperationRecorder()
    model = replaying(walking("qwen3", window=window), recorder)
    assert completed(sampler, model, requests_of()) == expected
    assert recorder.is_working
    assert recorder.num_replayed > 0


@pytest.mark.parametrize("length", [1, 3])
def test_grouped_attention_is_that_of_copied_keys(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(2, 6, length, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 9, 8, generator=generator, dtype=torch.float64)
    is_seen = torch.rand(2, 1, length, 9, generator=generator) < 0.5
    is_seen[..., 0] = True
    for mask in (is_seen, torch.zeros(is_seen.shape).double().masked_fill(~is_seen, -9.0)):
        keys, values = (states.repeat_interleave(3, dim=1) for states in (key, value))
        expected = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.3)
        found, _ = grouped_attention(torch.nn.Identity(), query, key, value, mask, scaling=0.3)
        torch.testing.assert_close(found, expected.transpose(1, 2))
    # What transformers' own does: a mask for each head, a bias, and keys that nobody shares.
    module: Any = torch.nn.Identity()
    bias = torch.rand(1, 6, length, 9, generator=generator).double()
    module.num_key_value_groups = 3
    how: dict[str, Any] = {"attn_mask": mask + bias, "scale": 0.3}
    expected = scaled_dot_product_attention(query, keys, values, **how).transpose(1, 2)
    found, _ = grouped_attention(module, query, key, value, mask + bias, scaling=0.3)
    torch.testing.assert_close(found, expected)
    found, _ = grouped_attention(module, query, key, value, mask, scaling=0.3, position_bias=bias)
    torch.testing.assert_close(found, expected)
    module.num_key_value_groups = 1
    found, _ = grouped_attention(module, query, keys, values, mask + bias, scaling=0.3)
    torch.testing.assert_close(found, expected)


# A pass that cannot be recorded.


def sdar() -> SDARSampler:
    return SDARSampler(
        mask_token_id=MASK, block_length=4, max_new_tokens=16, confidence_threshold=0.3
    )


class _Asking(OperationRecorder):
    """Of a model that asks the device for a number, as one with experts may."""

    def record(self, run: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        def asking() -> list[Tensor]:
            results = run()
            bool(results[0].sum() > 0)
            return results

        return super().record(asking)


class _Wrong(OperationRecorder):
    """Of a card that replays something else, over what was written before."""

    def record(self, run: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        replay = super().record(run)

        def wrong() -> list[Tensor]:
            results = [result + 1 for result in replay()]
            for written in self.written:
                written.fill_(9.0)
            return results

        return wrong

    def __init__(self) -> None:
        super().__init__()
        self.written: list[Tensor] = []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recorder", "reason"),
    [(_Asking(), "asks the device for a value"), (_Wrong(), "gave other numbers")],
)
def test_it_decodes_without_and_says_so_once(
    recorder: Recorder, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = completed(sdar(), causal_model(), requests_of())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model = replaying(causal_model(), recorder)
            assert completed(sdar(), model, requests_of()) == expected
    (said,) = caplog.messages
    assert reason in said
    assert "decodes slower" in said
    assert recorder.num_recorded == 0


@torch.no_grad()
def test_what_a_rejected_recording_has_written_is_written_anew() -> None:
    recorder, kept = _Wrong(), torch.zeros(3)
    recorder.written.append(kept)
    replays = Replays(recorder)

    def run(given: dict[str, Any]) -> list[Tensor]:
        kept.copy_(given["x"])
        return [2 * given["x"]]

    for number in range(2 * RECORDED_AT):
        x = torch.full((3,), float(number))
        (found,) = replays(run, {"x": x}, num_tokens=3)
        assert torch.equal(found, 2 * x)
        assert torch.equal(kept, x)
    assert not recorder.is_working


@torch.no_grad()
def test_a_model_that_gave_up_holds_no_recordings() -> None:
    recorder, given = OperationRecorder(), {"x": torch.ones(2, 3), "y": None}
    replays = Replays(recorder)
    for _ in range(RECORDED_AT):
        replays(doubled, given, num_tokens=6)
    (recording,) = map(weakref.ref, replays._recordings.values())
    recorder.give_up("for a reason")
    replays(doubled, given, num_tokens=6)
    assert recording() is None


@torch.no_grad()
def test_a_pass_without_room_gets_that_of_the_recordings() -> None:
    recorder, given = OperationRecorder(), {"x": torch.ones(2, 3), "y": None}
    replays = Replays(recorder)
    for _ in range(RECORDED_AT):
        replays(doubled, given, num_tokens=6)

    def large(given: dict[str, Any]) -> list[Tensor]:
        if replays._recordings:
            raise torch.OutOfMemoryError("out of memory")
        return doubled(given)

    found = replays(large, {**given, "x": torch.ones(9, 3)}, num_tokens=27)
    assert all(map(torch.equal, found, doubled({**given, "x": torch.ones(9, 3)})))
    assert recorder.is_working

    def too_large(given: dict[str, Any]) -> list[Tensor]:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        replays(too_large, given, num_tokens=6)


class _WithoutRoom(OperationRecorder):
    """Of a card whose memory suffices for the recordings that are numbered here.

    Attributes:
        num_asked: recordings that were tried.
        error: of those that there is no room for.
    """

    error: RuntimeError = torch.OutOfMemoryError("out of memory")

    def __init__(self, *fitting: int) -> None:
        super().__init__()
        self.num_asked, self._fitting = 0, fitting

    def record(self, run: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        self.num_asked += 1
        if self.num_asked - 1 not in self._fitting:
            run()
            raise self.error
        return super().record(run)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory"),
        torch.AcceleratorError("CUDA error: out of memory"),  # of what CUDA itself takes for one
    ],
)
@torch.no_grad()
def test_a_recording_without_room_gets_that_of_the_others_and_is_tried_again(
    error: RuntimeError, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = _WithoutRoom(0, 2, 3)
    recorder.error = error
    replays = Replays(recorder)
    narrow = {"x": torch.ones(2, 3), "y": None}
    wide: dict[str, Any] = {"x": torch.ones(2, 5), "y": None}
    for given in (narrow, wide):
        for _ in range(RECORDED_AT):
            assert all(map(torch.equal, replays(doubled, given, num_tokens=6), doubled(given)))
    assert (recorder.num_asked, recorder.num_recorded) == (2, 1)
    assert not replays._recordings, "they gave their memory back"
    for given in (wide, narrow):
        for _ in range(RECORDED_AT + 1):
            assert all(map(torch.equal, replays(doubled, given, num_tokens=6), doubled(given)))
    assert recorder.is_working
    assert (recorder.num_recorded, recorder.num_replayed) == (3, 3 + 2)
    assert not caplog.messages


@torch.no_grad()
def test_recordings_that_never_have_room_are_not_tried_for_ever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorder, given = _WithoutRoom(), {"x": torch.ones(2, 3), "y": None}
    replays = Replays(recorder)
    for _ in range(5 * RECORDED_AT):
        assert all(map(torch.equal, replays(doubled, given, num_tokens=6), doubled(given)))
    assert recorder.num_asked == cuda_graphs._MOST_WITHOUT_ROOM < 5
    assert not recorder.is_working
    (said,) = caplog.messages
    assert "out of memory" in said


@torch.no_grad()
def test_a_replay_without_room_is_run_anew() -> None:
    recorder, given = OperationRecorder(), {"x": torch.ones(2, 3), "y": None}
    replays = Replays(recorder)
    for _ in range(RECORDED_AT):
        replays(doubled, given, num_tokens=6)
    ((key, recording),) = replays._recordings.items()

    def full() -> list[Tensor]:
        raise torch.OutOfMemoryError("out of memory")

    replays._recordings[key] = replace(recording, replay=full)
    assert all(map(torch.equal, replays(doubled, given, num_tokens=6), doubled(given)))
    assert recorder.is_working
    assert not replays._recordings


class _Pools:
    """The memory pools of CUDA graphs, as torch counts who uses them (`create_or_incref_pool` and
    `releasePool` of its caching allocator): a pool that nobody uses goes with its last tensor, and
    cannot be taken up again before that.
    """

    def __init__(self) -> None:
        self.num_handles = 0
        self.used: list[int] = []  # pools of the recordings, in order
        self.has_tensors: set[int] = set()
        self._num_users: Counter[int] = Counter()

    def handle(self) -> int:
        self.num_handles += 1
        return self.num_handles

    @contextmanager
    def graph(self, graph: Any, *, pool: int, **how: Any) -> Iterator[None]:
        if pool in self.has_tensors and not self._num_users[pool]:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
        self._num_users[pool] += 1
        self.used.append(pool)
        weakref.finalize(graph, self._num_users.subtract, [pool])
        yield


class _Graph:
    def replay(self) -> None:
        pass


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> _Pools:
    """A card whose streams and graphs do nothing."""
    made, cuda = _Pools(), torch.cuda
    monkeypatch.setattr(cuda, "graph_pool_handle", made.handle)
    monkeypatch.setattr(cuda, "graph", made.graph)
    monkeypatch.setattr(cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(cuda, "Stream", mock.Mock)
    monkeypatch.setattr(cuda, "default_generators", mock.MagicMock())
    for name in ("current_stream", "current_device", "get_sync_debug_mode", "set_sync_debug_mode"):
        monkeypatch.setattr(cuda, name, mock.Mock())
    for name in ("device", "stream"):
        monkeypatch.setattr(cuda, name, lambda which: nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", mock.Mock(), raising=False)
    return made


@torch.no_grad()
def test_recordings_share_memory_that_is_not_taken_up_again_once_they_are_gone(
    pools: _Pools,
) -> None:
    """Two caches of a model; something keeps a tensor of every recording's memory."""
    recorder = Recorder(torch.device("cuda", 0))
    caches = [Replays(recorder) for _ in range(2)]

    def record(replays: Replays, width: int) -> int:
        """Record a pass; the pool that it is recorded in."""
        before = recorder.num_recorded
        for _ in range(RECORDED_AT):
            replays(doubled, {"x": torch.ones(2, width), "y": None}, num_tokens=6)
        assert recorder.is_working
        assert recorder.num_recorded == before + 1
        pools.has_tensors.add(pools.used[-1])
        return pools.used[-1]

    assert [record(cache, 3) for cache in caches] == [1, 1]
    caches[0].forget()
    assert record(caches[0], 3) == 1, "the other cache has recordings"
    for cache in caches:
        cache.forget()
    assert [record(cache, width) for cache in caches for width in (3, 4)] == [2, 2, 2, 2]
    del caches[0]
    assert record(caches[0], 5) == 2
    caches.clear()
    del cache
    assert record(Replays(recorder), 3) == 3


# When a pass is recorded.


def doubled(given: dict[str, Any]) -> list[Tensor]:
    return [2 * given["x"], given["x"] + (0 if given["y"] is None else given["y"])]


@torch.no_grad()
def test_what_has_come_before_is_replayed_and_results_stay() -> None:
    recorder = OperationRecorder()
    replays, results = Replays(recorder), []
    for number in range(RECORDED_AT + 3):
        given = {"x": torch.full((2, 3), float(number)), "y": None}
        results.append(replays(doubled, given, num_tokens=6))
    # The call that records sees that the recording gives the same.
    assert (recorder.num_recorded, recorder.num_replayed) == (1, 1 + 3)
    for number, (first, second) in enumerate(results):
        assert torch.equal(first, torch.full((2, 3), 2.0 * number))
        assert torch.equal(second, torch.full((2, 3), float(number)))


@torch.no_grad()
def test_what_is_no_number_in_both_is_the_same() -> None:
    """A query that sees nothing gives none, and nobody reads it."""
    recorder = OperationRecorder()
    replays, x = Replays(recorder), torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    for _ in range(RECORDED_AT + 1):
        (found,) = replays(lambda given: [given["x"] / given["x"]], {"x": x}, num_tokens=2)
        torch.testing.assert_close(found, x / x, equal_nan=True)
    assert recorder.is_working
    assert (recorder.num_recorded, recorder.num_replayed) == (1, 2)


@torch.no_grad()
def test_what_differs_is_recorded_by_itself() -> None:
    recorder = OperationRecorder()
    replays = Replays(recorder)
    x = torch.ones(2, 3)
    kinds: list[tuple[Any, tuple[int, ...]]] = [
        ({"x": x, "y": None}, ()),
        ({"x": x, "y": x}, ()),
        ({"y": x, "x": 3 * x}, ()),  # what is the same but for which is which
        ({"x": x, "y": 1}, ()),
        ({"x": x, "y": 1.0}, ()),
        ({"x": x, "y": 2}, ()),
        ({"x": x.double(), "y": None}, ()),
        ({"x": x[:1], "y": None}, ()),
        ({"x": x, "y": None}, (1,)),
    ]
    for _ in range(RECORDED_AT + 1):
        for given, facts in kinds:
            found = replays(doubled, given, num_tokens=6, facts=facts)
            assert all(map(torch.equal, found, doubled(given)))
    assert recorder.num_recorded == len(kinds)
    with torch.autocast("cpu", torch.bfloat16):
        replays(doubled, kinds[0][0], num_tokens=6)
    assert recorder.num_replayed == 2 * len(kinds)


@torch.no_grad()
def test_what_is_better_launched_anew() -> None:
    recorder = OperationRecorder()
    replays, given = Replays(recorder), {"x": torch.ones(2, 3), "y": None}
    mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 8, 8, device="cpu")
    for _ in range(RECORDED_AT + 1):
        replays(doubled, given, num_tokens=100_000)
        replays(doubled, {**given, "z": mask}, num_tokens=6)
        replays(doubled, {**given, "x": torch.ones(2**23)}, num_tokens=6)
        with torch.enable_grad():
            replays(doubled, given, num_tokens=6)
    assert recorder.num_recorded == 0


@torch.no_grad()
def test_the_recording_that_was_not_used_for_longest_goes() -> None:
    recorder, count = OperationRecorder(), cuda_graphs._MOST_RECORDINGS
    replays = Replays(recorder)

    def use(width: int, times: int = 1) -> int:
        """How many passes are recorded meanwhile."""
        before = recorder.num_recorded
        for _ in range(times):
            replays(doubled, {"x": torch.ones(2, width), "y": None}, num_tokens=6)
        return recorder.num_recorded - before

    assert sum(use(width, RECORDED_AT) for width in range(1, count + 1)) == count
    use(1)
    assert use(count + 1, RECORDED_AT) == 1
    assert use(1, RECORDED_AT) == 0
    assert use(2, RECORDED_AT - 1) == 0  # as if it were new, or 33 shapes would record in turn
    assert use(2) == 1
    replays.forget()
    assert use(1, RECORDED_AT) == 1


@torch.no_grad()
def test_a_weight_that_autocast_has_cast_is_not_part_of_a_recording() -> None:
    """Autocast keeps what it has cast until it ends, and a recording would go on reading that."""
    layer, recorder = torch.nn.Linear(4, 4), OperationRecorder()
    layer.requires_grad_(True)
    replays = Replays(recorder)

    def run(given: dict[str, Any]) -> list[Tensor]:
        with torch.enable_grad():  # so that the cast is kept
            return [layer(given["x"]).detach()]

    for number in range(RECORDED_AT + 2):
        x = torch.full((1, 4), float(number))
        with torch.autocast("cpu", torch.bfloat16):
            if number == RECORDED_AT + 1:
                layer.weight.mul_(2)
                layer.bias.zero_()
            (found,) = replays(run, {"x": x}, num_tokens=1)
        weights = layer.weight.bfloat16(), layer.bias.bfloat16()
        expected = torch.nn.functional.linear(x.bfloat16(), *weights)
        torch.testing.assert_close(found, expected)
    assert (recorder.num_recorded, recorder.num_replayed) == (1, 3)
    assert torch.is_autocast_cache_enabled()


def test_on_a_cpu_nothing_is_recorded() -> None:
    assert Recorder.on(torch.device("cpu")) is None
    assert isinstance(Recorder.on(torch.device("cuda", 0)), Recorder)


def test_what_jobs_sample_with_is_replayed(
    soon: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A denoiser, and a causal model, as an actor opens them; the texts are those without."""
    dream(tmp_path / "dream")
    tiny_causal("qwen3", vocab_size=len(letter_tokenizer())).float().save_pretrained(
        tmp_path / "ar"
    )
    letter_tokenizer().save_pretrained(tmp_path / "ar")
    fields: dict[str, Any] = {"num_samples": 3, "batch_size": 3}
    whole = {"model_id": str(tmp_path / "dream"), "seq_len": 12, "sampler": "first_hitting"}
    ar = {"model_id": str(tmp_path / "ar"), "sampler": {"name": "ar", "max_new_tokens": 12}}

    def tokens() -> list[Any]:
        sampled = SamplingModel(None, GenerateConfig.model_validate(fields | whole), device="cpu")
        continued = CompletionModel(GenerateConfig.model_validate(fields | ar))
        rows = [GenerationRow(id=n, prompt=None) for n in range(3)]
        prompted = [GenerationRow(id=n, prompt=text) for n, text in enumerate(("ab", "c", "d"))]
        records = [*sampled.samples(rows), *continued.sample(prompted)]
        return [record["tokens"] for record in records]

    expected, recorders = tokens(), []

    def on(device: torch.device) -> Recorder:
        recorders.append(OperationRecorder())
        return recorders[-1]

    monkeypatch.setattr(Recorder, "on", on)
    assert tokens() == expected
    assert len(recorders) == 2
    assert all(recorder.num_replayed > 1 for recorder in recorders)
