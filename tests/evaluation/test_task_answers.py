"""Texts that tasks ask of denoisers, where blocks are filled in behind the context."""

from pathlib import Path
from typing import Any

import pytest

from tests.builders import letter_tokenizer, random_rows, token_folder
from tests.models.published import V, llada
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.train import TrainConfig
from tokendiff.data.prompts import GenerationRow
from tokendiff.data.rows import TokenData
from tokendiff.errors import InputError
from tokendiff.evaluation.tasks.answering import TaskModel
from tokendiff.evaluation.tasks.requests import TaskRequest
from tokendiff.evaluation.tasks.setup import TaskSetup
from tokendiff.models.sampling import SamplingModel
from tokendiff.training.run import train_in_process

LENGTH, NEW = 12, 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model that takes 64 tokens, trained on rows of 12."""
    folder = tmp_path_factory.mktemp("task_answers")
    llada(folder / "source")
    rows = token_folder(
        folder / "data",
        files=[random_rows(16, LENGTH)],
        max_length=LENGTH,
        tokenizer=letter_tokenizer(V),
    )
    config = TrainConfig.model_validate(
        {
            "model_name_or_path": str(folder / "source"),
            "max_train_steps": 1,
            "per_device_train_batch_size": 4,
            "objective": {"name": "mdlm"},
        }
    )
    final = train_in_process(config, TokenData.open(rows, split="train"), folder / "run")
    return Path(final)


def config_of(checkpoint: Path, **changes: Any) -> GenerateConfig:
    sampler = {"name": "blockwise", "block_size": 4, "num_inference_steps": 2}
    fields = {"checkpoint_path": str(checkpoint), "num_samples": 1, "seed": 5, "sampler": sampler}
    return GenerateConfig.model_validate(fields | changes)


def asked(context: str) -> TaskRequest:
    settings = {"max_gen_toks": NEW, "temperature": 0.0, "until": []}
    return TaskRequest(kind="generate_until", context=context, settings=settings)


def test_blockwise_texts_are_the_answers_that_generation_writes(checkpoint: Path) -> None:
    """Of contexts shorter and longer than the rows that were trained on."""
    setup = TaskSetup.of(config_of(checkpoint), checkpoint)
    requests = [asked(text) for text in ("a", "bcd", "abcdefghijkl", "ab" * 12)]
    model = TaskModel(setup, num_mask_samples=1, device="cpu")
    answers = model.answers(requests)
    assert setup.writing(requests[0])[0].max_new_tokens == NEW
    sampler = {"name": "blockwise", "block_size": 4, "num_inference_steps": 2}
    sampler |= {"max_new_tokens": NEW, "temperature": 0.0}
    written = SamplingModel(checkpoint, config_of(checkpoint, sampler=sampler), device="cpu")
    rows = [GenerationRow(id=r.noise_id, prompt=r.context) for r in requests]
    expected = [record["completion"] for record in written.sample(rows)]
    assert answers == [{"text": text} for text in expected]
    assert len(set(expected)) > 1


def test_an_answer_that_the_model_has_no_positions_for_is_named(checkpoint: Path) -> None:
    setup = TaskSetup.of(config_of(checkpoint), checkpoint)
    with pytest.raises(InputError, match=r"59 tokens; with 6 new ones that exceeds the 64"):
        setup.row(asked("a" * 59))
    in_one_length = TaskSetup.of(config_of(checkpoint, sampler="ancestral"), checkpoint)
    with pytest.raises(InputError, match=r"7 tokens and 6 new ones exceed the 12 tokens"):
        in_one_length.row(asked("a" * 7))
