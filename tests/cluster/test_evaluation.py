"""What an evaluation hands from one part to the next: which rows, which tokens, which files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import letter_tokenizer, random_rows, token_folder
from tokendiff.artifacts.identity import checkpoint_identity
from tokendiff.artifacts.manifest import commit, load_manifest
from tokendiff.cluster import evaluate as job
from tokendiff.cluster.progress import JobProgress
from tokendiff.config.cluster import ClusterConfig
from tokendiff.config.evaluate import EvaluateConfig
from tokendiff.config.train import TrainConfig
from tokendiff.data.rows import TokenData
from tokendiff.data.samples import KIND as SAMPLES
from tokendiff.data.samples import write_part
from tokendiff.evaluation.evaluator import evaluation_rows
from tokendiff.evaluation.paired import read_rows
from tokendiff.training.run import train_in_process

LENGTH = 12
# A prompt of four tokens with a gap, a draft's text behind two, and one that stopped at once.
RECORDS: list[dict[str, Any]] = [
    {"id": 4, "tokens": [5, 6, 7, 8, 9], "num_prompt_tokens": 4, "gaps": [1]},
    {"id": 7, "tokens": [5, 5, 6, 7, 8], "num_prompt_tokens": 2, "gaps": []},
    {"id": 9, "tokens": [5, 2], "num_prompt_tokens": 1, "gaps": [], "finish_reason": "stop"},
]
for record in RECORDS:
    record.setdefault("finish_reason", "length")
    record |= {"prompt": "a[MASK]", "text": "a b c d", "completion": "c d", "num_model_calls": 2}
    record |= {"tokens_per_forward": 1.0, "blocks_by_gain": [1, 1], "source": "one.txt"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    folder = token_folder(
        tmp_path_factory.mktemp("data") / "tokens",
        files=[random_rows(8, LENGTH)],
        max_length=LENGTH,
        tokenizer=letter_tokenizer(),
        heldout=random_rows(30, LENGTH, seed=1),
    )
    return TokenData.open(folder, split="train")


def test_figures_of_samples_are_of_what_the_model_chose() -> None:
    """In gaps and behind prompts; and the speed is the manifest's."""
    metrics = job.sample_metrics(RECORDS, {"tokens_per_second": 8.0, "speculation": {"speedup": 3}})
    assert metrics["sampled_tokens_per_second"] == 8.0
    assert metrics["speedup"] == 3
    plain = [dict(each, tokens=chosen, num_prompt_tokens=0, gaps=[]) for each, chosen in
             zip(RECORDS, ([6, 9], [6, 7, 8], [2]), strict=True)]  # fmt: skip
    again = job.sample_metrics(plain, {"tokens_per_second": None})
    assert again == {name: metrics[name] for name in again}
    others = [dict(each, finish_reason="length") for each in plain]
    assert job.sample_metrics(others, {"tokens_per_second": None}) != again
    accepted = job._accepted_of(RECORDS)
    assert accepted["num_new_tokens"].tolist() == [2, 3, 1]


def test_bounds_of_other_rows_or_other_noise_are_not_comparable(data: TokenData) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"split": "train"}, {"seed": 1}, {"max_eval_rows": 5}, {"num_mask_samples": 7}
    ]  # fmt: skip
    found = {job.rows_identity(EvaluateConfig.model_validate(each), data) for each in changes}
    assert len(found) == len(changes)
    assert job.rows_identity(EvaluateConfig(batch_size=3), data) in found


def test_the_reference_is_told_what_was_given(
    in_this_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}

    def read(texts: list[str], reference: str, **options: Any) -> dict[str, Any]:
        told.update(texts=texts, reference=reference, **options)
        return {}

    monkeypatch.setattr("tokendiff.evaluation.reference.generative_perplexity", read)
    config = EvaluateConfig(reference_model_name_or_path="some/model", batch_size=3)
    with JobProgress(lambda event, **fields: None) as progress:
        job.score_with_reference(
            config, ClusterConfig(), samples=RECORDS, max_length=LENGTH, progress=progress
        )
    assert told["given"] == [job.given_text(record) for record in RECORDS]
    assert any(told["given"])
    assert (told["batch_size"], told["max_length"]) == (3, LENGTH)


@pytest.mark.slow
def test_a_folder_that_is_evaluated_into_again_holds_that_evaluation_alone(
    in_this_process: None, data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one has samples of a draft, and is killed once as it is committed."""
    train = TrainConfig(model_name_or_path="builtin:bert-tiny", max_train_steps=1)
    final = train_in_process(train, data, tmp_path / "run")
    samples, out = tmp_path / "samples", tmp_path / "out"
    samples.mkdir()
    write_part(samples / "part-00000.jsonl", RECORDS)
    made = {"tokens_per_second": 8.0, "speculation": {"speedup": 3.0}, "conditions": "so"}
    of_final = {"checkpoint_files": checkpoint_identity(final)}
    commit(samples, kind=SAMPLES, metadata={**made, **of_final})

    def evaluate(samples_path: Path | None) -> dict[str, Any]:
        config = EvaluateConfig(num_mask_samples=1, seed=3, max_eval_rows=5)
        return job.evaluate(
            config,
            ClusterConfig(),
            title="toy",
            checkpoint_path=str(final),
            data_path=None,
            samples_path=samples_path,
            training_log=[],
            config_yaml="name: toy\n",
            output_dir=out,
            on_event=lambda event, **fields: None,
        ).metadata

    def killed(*args: Any, **fields: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(samples)
    assert evaluate(samples)["sampled"] == "so"
    heldout = data.other_split("heldout")
    chosen = heldout.read(*evaluation_rows(heldout, seed=3, max_rows=5)).row_ids
    rows = read_rows(out, "nats_per_token")
    assert rows is not None
    assert sorted(rows["row_id"]) == sorted(chosen)
    accepted = read_rows(out, "acceptance_length_mean")
    assert accepted is not None
    assert accepted["row_id"].tolist() == [4, 7, 9]
    for name in (job.DOCUMENTS, job.ANSWERS):  # of an evaluation with tasks
        (out / name).mkdir(exist_ok=True)
        (out / name / "local_choice.parquet").write_bytes(b"")
    for name in (job.TASKS, job.CERTIFICATE):
        (out / name).write_text("{}")
    bound = job.evaluate_bound

    def joint(*args: Any, **fields: Any) -> Any:
        of_all, rows, token_counts = bound(*args, **fields)
        likelihood = {"ar_nats": np.arange(5.0), "ar_tokens": np.arange(1, 6)}
        return of_all, {**rows, **likelihood}, token_counts

    monkeypatch.setattr(job, "evaluate_bound", joint)
    again = evaluate(None)
    assert again["sampled"] is None
    assert again["metrics"]["ar_nats_per_token"] == pytest.approx(10 / 15)
    assert read_rows(out, "acceptance_length_mean") is None
    left = {path.name for path in out.iterdir()}
    assert not left & {job.DOCUMENTS, job.ANSWERS, job.TASKS, job.CERTIFICATE}
    assert load_manifest(out).metadata["metrics"] == json.loads((out / "metrics.json").read_text())
