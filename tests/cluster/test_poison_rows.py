"""Rows at which the sampling actor dies each time: the job ends, with all others sampled once."""

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import generate as generate_job
from tests.builders import letter_tokenizer, random_rows, token_folder
from tokendiff.artifacts.manifest import load_manifest
from tokendiff.cluster import generate as cluster_generate
from tokendiff.cluster.generate import _PartSampler
from tokendiff.config.cluster import ClusterConfig
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.train import TrainConfig
from tokendiff.data.rows import TokenData
from tokendiff.data.samples import read_samples
from tokendiff.models.sampling import SamplingModel
from tokendiff.training.run import train_in_process

LENGTH = 12


class KilledByA(_PartSampler):
    """Dies as of a signal of the system's, which no Python code hears of."""

    def _samples(self, rows: list[Any], part: int) -> Any:
        if any(row.prompt == "aa" for row in rows):
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._samples(rows, part)


class KilledOnce(_PartSampler):
    """Dies as it samples rows 12 to 15 for the first time."""

    def _samples(self, rows: list[Any], part: int) -> Any:
        note, flag = self._note, self._output_dir / "run" / "has-died"

        def noted(what: str) -> None:
            note(what)
            if what.startswith("rows 12,") and not flag.exists():
                flag.write_bytes(b"")
                os.kill(os.getpid(), signal.SIGKILL)

        self._note = noted
        return super()._samples(rows, part)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    data = token_folder(
        folder / "data",
        files=[random_rows(8, LENGTH)],
        max_length=LENGTH,
        tokenizer=letter_tokenizer(),
    )
    config = TrainConfig(model_name_or_path="builtin:bert-tiny", max_train_steps=1)
    return train_in_process(config, TokenData.open(data, split="train"), folder / "out")


@pytest.fixture
def prompts(tmp_path: Path) -> list[str]:
    texts = ["abc"[: 1 + number % 3] for number in range(20)]
    texts[13] = "aa"
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    return texts


@pytest.mark.ray
def test_a_row_that_kills_its_actor_is_set_aside(
    ray_session: None,
    checkpoint: Path,
    prompts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster_generate, "_PartSampler", KilledByA)
    events: list[dict[str, Any]] = []
    config = GenerateConfig.model_validate(
        {
            "prompts": [str(tmp_path / "prompts.txt")],
            "num_samples": 1,
            "batch_size": 4,
            "max_row_failures": 3,
            "sampler": {"num_inference_steps": 3},
        }
    )
    cluster = ClusterConfig(cpus_per_worker=0.5, threads_per_worker=1)
    cluster_generate.generate(
        config,
        cluster,
        checkpoint_path=str(checkpoint),
        output_dir=tmp_path / "samples",
        on_event=lambda event, **fields: events.append({"event": event, **fields}),
    )
    records = list(read_samples(tmp_path / "samples"))
    ids = Counter(record["id"] for record in records)
    assert ids == Counter(row for row in range(20) if row != 13)  # none lost, none twice
    (line,) = (tmp_path / "samples" / "set_aside" / "part-00003.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (found["id"], found["prompt"]) == (13, "aa")
    assert "died 3 times" in found["reason"]
    metadata = load_manifest(tmp_path / "samples").metadata
    assert (metadata["rows"], metadata["set_aside"]) == (19, 1)
    assert sum("set aside, see" in e.get("message", "") for e in events) == 1
    assert not (tmp_path / "samples" / "run" / "attempts").exists()


@pytest.mark.ray
def test_the_rows_that_an_actor_died_at_are_named(
    ray_session: None,
    checkpoint: Path,
    prompts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster_generate, "_PartSampler", KilledOnce)
    said: list[str] = []
    config = GenerateConfig.model_validate(
        {
            "prompts": [str(tmp_path / "prompts.txt")],
            "num_samples": 1,
            "batch_size": 4,
            "sampler": {"num_inference_steps": 3},
        }
    )
    cluster_generate.generate(
        config,
        ClusterConfig(cpus_per_worker=0.5, threads_per_worker=1),
        checkpoint_path=str(checkpoint),
        output_dir=tmp_path / "samples",
        on_event=lambda event, **fields: said.append(fields.get("message", "")),
    )
    (message,) = [text for text in said if "died" in text]
    assert message.startswith("an actor died at rows 12, 13, 14, 15 (4 at a time), which were")
    assert len(list(read_samples(tmp_path / "samples"))) == 20
    assert not list((tmp_path / "samples" / "run").glob("at-*"))


def test_the_job_says_so_and_ends_with_exit_code_1(
    in_this_process: None,
    checkpoint: Path,
    prompts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is known of earlier deaths counts when the job is started again."""
    output, row = tmp_path / "samples", 13
    arguments = [
        *("--checkpoint_path", str(checkpoint), "--prompts", str(tmp_path / "prompts.txt")),
        *("--num_samples", "1", "--batch_size", "4", "--output_dir", str(output)),
        *("--num_inference_steps", "3", "--json", "-o", "tracking.enabled=false"),
    ]
    note = _PartSampler._samples

    def knows_of_deaths(sampler: Any, rows: list[Any], part: int) -> Any:
        assert part != 3 or row not in [each.id for each in rows]
        return note(sampler, rows, part)

    monkeypatch.setattr(_PartSampler, "_samples", knows_of_deaths)
    attempts = output / "run" / "attempts"
    attempts.mkdir(parents=True)
    state = {"job": "earlier", "in_flight": [], "failures": {"12": 3, "13": 4}}
    (attempts / "part-00003.json").write_text(json.dumps(state))
    assert generate_job.main(arguments) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["set_aside"] == 1
    assert "1 rows were set aside" in captured.err
    assert len(list(read_samples(output))) == 19


def test_rows_that_memory_does_not_suffice_for_are_named(
    in_this_process: None,
    checkpoint: Path,
    prompts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Other parts are kept, and the same command goes on."""
    output = tmp_path / "samples"
    arguments = [
        *("--checkpoint_path", str(checkpoint), "--prompts", str(tmp_path / "prompts.txt")),
        *("--num_samples", "1", "--batch_size", "2", "--output_dir", str(output)),
        *("--num_inference_steps", "3", "-o", "tracking.enabled=false"),
    ]
    sample = SamplingModel.sample

    def hungry(model: SamplingModel, rows: list[Any], **kwargs: Any) -> list[dict[str, Any]]:
        if any(row.id == 13 for row in rows):
            torch.empty(1 << 46)
        return sample(model, rows, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SamplingModel, "sample", hungry)
        assert generate_job.main(arguments) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "error: rows 12, 13 (2 at a time): memory ran out" in error
    assert "lower batch_size" in error
    assert generate_job.main(arguments) == 0
    assert len(list(read_samples(output))) == 20


@pytest.mark.parametrize("killed_at", ["a part", "what follows a part", "the manifest"])
def test_killed_as_a_file_is_written_nothing_of_it_is_lost(
    in_this_process: None,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_at: str,
) -> None:
    """Neither a prompt of no use, nor a row that is set aside, nor the deaths that it is for."""
    output, write = tmp_path / "samples", cluster_generate.write_part
    texts = ["a", "b", "c", "a", "b", "a" * (LENGTH + 1), "c", "a"]
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    attempts = output / "run" / "attempts"
    attempts.mkdir(parents=True)
    state = {"job": "earlier", "in_flight": [], "failures": {"6": 3}}
    (attempts / "part-00001.json").write_text(json.dumps(state))
    fields = {"prompts": [str(tmp_path / "prompts.txt")], "num_samples": 1, "batch_size": 4}
    config = GenerateConfig.model_validate(
        {**fields, "max_row_failures": 3, "sampler": {"num_inference_steps": 1}}
    )

    def generate() -> dict[str, Any]:
        manifest = cluster_generate.generate(
            config,
            ClusterConfig(),
            checkpoint_path=str(checkpoint),
            output_dir=output,
            on_event=lambda event, **fields: None,
        )
        return manifest.metadata

    def killed(path: Any, *args: Any, **fields: Any) -> None:
        if killed_at == "the manifest" or (killed_at, path.stem) == ("a part", "part-00001"):
            raise KeyboardInterrupt
        write(path, *args)
        if path.stem == "part-00001":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        name = "commit" if killed_at == "the manifest" else "write_part"
        patch.setattr(cluster_generate, name, killed)
        with pytest.raises(KeyboardInterrupt):
            generate()
    metadata = generate()
    assert [metadata[name] for name in ("rows", "errors", "set_aside")] == [6, 1, 1]
    assert [record["id"] for record in read_samples(output)] == [0, 1, 2, 3, 4, 7]
    assert not attempts.exists()
