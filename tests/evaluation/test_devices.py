"""Evaluation on a device, which is emulated: the same figures, and one wait per batch of rows. (In
the last digits some differ: off the CPU a denoiser is given another form of the mask of padding.)
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.device_reads import count_waits, emulated_device
from tests.builders import letter_tokenizer
from tests.models.test_models import tiny_denoiser
from tests.objectives import test_dflash as drafts
from tests.objectives.test_block_objectives import EOS, MASK, V, tiny_model
from tests.samplers.test_decoding import causal_model
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.config.evaluate import EvaluateConfig
from tokendiff.data.rows import TokenRows
from tokendiff.diffusion.random import RowGenerator
from tokendiff.diffusion.splitmix import key_from
from tokendiff.evaluation import evaluator
from tokendiff.evaluation.draft_acceptance import DraftEvaluator
from tokendiff.evaluation.evaluator import Evaluator
from tokendiff.evaluation.tasks.scoring import (
    TokenPair,
    bounded_nats,
    exact_nats,
    greedily_written,
)
from tokendiff.objectives.dflash import DFlash
from tokendiff.training.watching import yardstick_of

ROWS, LENGTH = 5, 14
CONFIG = EvaluateConfig(batch_size=2, num_mask_samples=3)


def process_of(forward_process: str, **fields: Any) -> NoiseProcess:
    common: dict[str, Any] = {"vocab_size": V, "mask_token_id": MASK, "max_length": 64}
    return NoiseProcess(forward_process=forward_process, **{**common, **fields})


def blocks_of(mode: str, forward_process: str = "absorbing", **fields: Any) -> NoiseProcess:
    by_blocks: dict[str, Any] = {"block_length": 4, "attention_mask_mode": mode}
    return process_of(forward_process, clean_context=True, eos_token_id=EOS, **by_blocks, **fields)


WHOLE_ROWS = {
    "mdlm": process_of("absorbing", alpha_schedule="cosine"),
    "mdlm, next": process_of("absorbing", predict="next"),
    "udlm": process_of("uniform", alpha_schedule="cosine"),
    "hybrid": process_of("hybrid", p_uniform=0.2, prediction="posterior"),
}
BY_BLOCKS = {
    "block_refinement 2d": blocks_of("2d"),
    "block_diffusion": blocks_of("4d"),
    "block_diffusion, answers": blocks_of("4d", block_start="answer"),
    "block_diffusion, joint": blocks_of("4d", context_attention="causal", predict="next"),
    "block_uniform": blocks_of("4d", "uniform", prompt_length=3),
}
PROCESSES: dict[str, NoiseProcess | None] = {**WHOLE_ROWS, **BY_BLOCKS, "ar": None}


def rows_to_judge(vocab_size: int = V) -> TokenRows:
    """Rows of packed documents, some padded, of which parts are answers."""
    rng = np.random.default_rng(1)
    lengths = np.array([LENGTH, 9, LENGTH, 12, LENGTH], dtype=np.int32)
    is_there = np.arange(LENGTH) < lengths[:, None]
    is_start = (np.arange(LENGTH) % 8 == 0) & is_there
    is_target = (np.arange(LENGTH) % 8 > 2) & is_there
    tokens = rng.integers(4, vocab_size, (ROWS, LENGTH)).astype(np.int32)
    return TokenRows(
        tokens=np.where(is_there, tokens, 0),
        lengths=lengths,
        is_start=is_start,
        is_target=is_target,
        row_ids=np.arange(ROWS) + 7,
        num_bytes=np.full(ROWS, 20, dtype=np.int32),
        num_filler=np.zeros(ROWS, dtype=np.int32),
        isolates_documents=False,
    )


def denoiser_of(process: NoiseProcess | None) -> Any:
    by_blocks = process is None or process.block_length is not None
    # On CUDA there is flex in place of tiles, which ask what they are to compute.
    model: Any = tiny_model("dense") if by_blocks else tiny_denoiser("bert", vocab_size=V)
    return model.double().eval()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is named by its process."""

    def load_for_inference(checkpoint: Path) -> tuple[Any, Any, Any]:
        process = PROCESSES[str(checkpoint)]
        return denoiser_of(process), letter_tokenizer(V), process

    is_ar = {"ar": "ar"}
    monkeypatch.setattr(evaluator, "objective_of", lambda checkpoint: is_ar.get(str(checkpoint)))
    monkeypatch.setattr(evaluator, "load_for_inference", load_for_inference)
    monkeypatch.setattr(evaluator, "load_autoregressive", lambda c: load_for_inference(c)[:2])


@pytest.mark.parametrize("name", PROCESSES)
def test_a_batch_is_waited_for_once_and_its_bound_is_that_of_the_cpu(
    opened: None, name: str
) -> None:
    rows, checkpoint = rows_to_judge(), Path(name)
    expected = Evaluator(checkpoint, CONFIG, device="cpu").bounds(rows)
    device = emulated_device()
    with count_waits() as waits:
        judge = Evaluator(checkpoint, CONFIG, device=str(device))
        waits.sent.clear()
        found = judge.bounds(rows)
    batches = -(-ROWS // CONFIG.batch_size)
    # What a model tells token by token is read at the end.
    assert waits.reads == batches + ("ar_nats" in expected), waits.places()
    assert not waits.sends, waits.places()
    assert found.keys() == expected.keys()
    for column in expected:
        np.testing.assert_allclose(found[column], expected[column], rtol=1e-9)
    assert ("ar_nats" in expected) == (name == "block_diffusion, joint")


def draft_evaluator(device: str | torch.device) -> DraftEvaluator:
    judge: Any = DraftEvaluator.__new__(DraftEvaluator)
    judge._trainee = drafts.tiny_trainee().to(device).eval()
    judge._device, judge._config = torch.device(device), CONFIG
    judge._objective = DFlash(block_size=drafts.BLOCK, mask_token_id=drafts.MASK, num_anchors=3)
    made: DraftEvaluator = judge
    return made


def test_a_batch_of_a_draft_is_waited_for_once() -> None:
    rows = rows_to_judge(drafts.V)
    expected = draft_evaluator("cpu").acceptance(rows)
    assert expected["blocks"].sum()
    device = emulated_device()
    with count_waits() as waits:
        judge = draft_evaluator(device)
        waits.sent.clear()
        found = judge.acceptance(rows)
    assert waits.reads == -(-ROWS // CONFIG.batch_size), waits.places()
    assert not waits.sends, waits.places()
    for column in expected:
        np.testing.assert_array_equal(found[column], expected[column])


@pytest.mark.parametrize("name", ["mdlm", "block_diffusion", "ar", "draft"])
def test_rows_that_are_judged_in_training_are_not_waited_for(name: str) -> None:
    is_draft = name == "draft"
    objective: Any = None
    if is_draft:
        objective = DFlash(block_size=drafts.BLOCK, mask_token_id=drafts.MASK, num_anchors=3)
    process = None if is_draft else PROCESSES[name]
    yardstick = yardstick_of(objective, process)
    rows = rows_to_judge(drafts.V if is_draft else V)
    generator = RowGenerator.for_rows(key_from(0), torch.as_tensor(rows.row_ids))
    model = drafts.tiny_trainee() if is_draft else denoiser_of(process)
    expected = yardstick.judge(model, rows, rows.batch(), generator)
    device = emulated_device()
    with count_waits() as waits:
        model.to(device)
        waits.sent.clear()
        found = yardstick.judge(model, rows, rows.batch(), generator)
        assert not waits.places()
        torch.testing.assert_close(found.to("cpu"), expected, rtol=1e-9, atol=0.0)


PAIRS = [
    TokenPair(context=[4, 5, 6], continuation=[7, 8], noise_id=1),
    TokenPair(context=[9, 4], continuation=[5, 6, 7, 8, 9], noise_id=2),
]


@pytest.mark.parametrize("name", ["mdlm", "udlm", "block_refinement 2d", "block_diffusion"])
def test_a_task_is_scored_without_waiting_and_its_greedy_text_waits_once_a_step(name: str) -> None:
    process = PROCESSES[name]
    assert process is not None
    model, options = denoiser_of(process), {"key": key_from(0), "num_mask_samples": 2}
    expected = bounded_nats(model, process, PAIRS, **options)
    is_greedy = greedily_written(model, process, PAIRS)
    device = emulated_device()
    with count_waits() as waits:
        model.to(device)
        waits.sent.clear()
        found = bounded_nats(model, process, PAIRS, **options)
        assert not waits.places()
        assert greedily_written(model, process, PAIRS).tolist() == is_greedy.tolist()
        most = max(len(pair.continuation) for pair in PAIRS)
        assert waits.reads <= most, waits.places()
        assert not waits.sends, waits.places()
        torch.testing.assert_close(found.to("cpu"), expected, rtol=1e-9, atol=0.0)


def test_an_exact_score_is_not_waited_for() -> None:
    model: Any = causal_model()
    expected = exact_nats(model, PAIRS)
    device = emulated_device()
    with count_waits() as waits:
        model.to(device)
        waits.sent.clear()
        found = exact_nats(model, PAIRS)
        assert not waits.places()
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.to("cpu"), other)
