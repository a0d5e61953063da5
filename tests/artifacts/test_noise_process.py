"""What a scheduler_config.json says of the noise, and what it cannot say."""

import json
from pathlib import Path
from typing import Any

import pytest

from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.diffusion.kernels import UniformKernel
from tokendiff.errors import InputError


def process(**changes: Any) -> NoiseProcess:
    fields = {"forward_process": "absorbing", "vocab_size": 16, "mask_token_id": 1, "max_length": 8}
    return NoiseProcess(**{**fields, **changes})


def blocks(**changes: Any) -> NoiseProcess:
    fields = {"block_length": 4, "attention_mask_mode": "4d", "clean_context": True}
    return process(**{**fields, **changes})


def published(folder: Path, **fields: Any) -> NoiseProcess:
    known = {"_class_name": "TokenDiffusionScheduler", "vocab_size": 16, "mask_token_id": 1}
    text = json.dumps({**known, "max_length": 8, **fields})
    (folder / "scheduler_config.json").write_text(text)
    return NoiseProcess.load(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"block_length": 0}, "block_length must be at least 1, got 0"),
        ({"attention_mask_mode": None}, "attention_mask_mode must be '2d' or '4d', got None"),
        ({"block_start": "question"}, "must be 'answer' or 'last_answer', got 'question'"),
        ({"context_attention": "none"}, "must be 'block' or 'causal', got 'none'"),
        ({"predict": "both"}, "predict must be 'own' or 'next', got 'both'"),
        ({"context_attention": "causal", "attention_mask_mode": "2d"}, "go with attention_mask_"),
        ({"context_attention": "causal", "clean_context": False}, "and a clean context"),
        ({"predict": "next", "clean_context": False}, "and a clean context"),
        ({"forward_process": "uniform", "attention_mask_mode": "2d"}, "noise of blocks is masks"),
        ({"forward_process": "hybrid"}, "the noise of blocks is masks"),
        ({"keeps_base": True}, "keeps_base needs a block_length, and context_attention 'causal'"),
        ({"keeps_base": True, "forward_process": "uniform"}, "needs forward_process 'absorbing'"),
    ],
)
def test_blocks_that_no_model_was_trained_on_are_refused(
    changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        blocks(**changes)


@pytest.mark.parametrize("start", ["answer", "last_answer"])
def test_a_process_is_read_as_it_was_written(start: str, tmp_path: Path) -> None:
    all_fields = blocks(
        objective="block_diffusion",
        prompt_length=2,
        eos_token_id=3,
        block_start=start,
        context_attention="causal",
        predict="next",
        keeps_base=True,
        alpha_schedule="geometric",
        sigma_min=0.25,
        sigma_max=8.0,
        prediction="posterior",
    )
    all_fields.save(tmp_path)
    assert NoiseProcess.load(tmp_path) == all_fields
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert written["_class_name"] == "BlockRefinementScheduler"


def test_what_published_configs_leave_out_is_what_their_classes_have(tmp_path: Path) -> None:
    assert published(tmp_path) == process(
        eps=1e-3, sigma_min=1e-4, sigma_max=20.0, exclude_mask_from_uniform=True, prediction="loo"
    )
    assert published(tmp_path, sigma_max=20).sigma_max == 20.0
    hybrid = {"_class_name": "HybridTokenDiffusionScheduler"}
    for fields, prediction in (({}, "posterior"), ({"prediction": "loo"}, "loo")):
        there = published(tmp_path, **hybrid, **fields)
        assert there == process(
            forward_process="hybrid", prediction=prediction, p_uniform=0.0, gamma=1.0
        )


@pytest.mark.parametrize("is_excluded", [True, False])
def test_the_kernel_is_that_of_the_process(is_excluded: bool) -> None:
    noise = process(
        forward_process="uniform",
        exclude_mask_from_uniform=is_excluded,
        alpha_schedule="geometric",
        sigma_min=0.25,
        sigma_max=8.0,
    )
    kernel = noise.kernel()
    assert isinstance(kernel, UniformKernel)
    assert kernel.exclude_mask is is_excluded
    assert (kernel.schedule.sigma_min, kernel.schedule.sigma_max) == (0.25, 8.0)  # type: ignore[attr-defined]


def test_a_file_that_is_nested_without_end_is_told(tmp_path: Path) -> None:
    (tmp_path / "scheduler_config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"scheduler_config\.json: not JSON"):
        NoiseProcess.load(tmp_path)
