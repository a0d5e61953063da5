"""Tasks as part of an evaluation; neither a kill nor more actors change what they write."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.in_this_process import jobs_here
from tokendiff.artifacts.locations import Location, files_under, location
from tokendiff.artifacts.manifest import load_manifest
from tokendiff.config.cluster import ClusterConfig
from tokendiff.config.evaluate import EvaluateConfig
from tokendiff.config.generate import GenerateConfig
from tokendiff.errors import InputError

pytest.importorskip("lm_eval", reason="the extra eval")

TASKS = ["local_choice", "local_writing", "local_text"]


def evaluate_tasks(
    checkpoint: Path,
    output_dir: Location,
    tasks_path: str | None,
    *,
    num_actors: int = 1,
    **fields: Any,
) -> list[dict[str, Any]]:
    """Its events."""
    from tokendiff.cluster.evaluate import evaluate

    events: list[dict[str, Any]] = []
    config = {"batch_size": 4, "num_mask_samples": 2, "tasks": TASKS, "tasks_path": tasks_path}
    evaluate(
        EvaluateConfig.model_validate({**config, **fields}),
        ClusterConfig(cpus_per_worker=0.5, threads_per_worker=1, num_actors=num_actors),
        title="toy",
        checkpoint_path=str(checkpoint),
        data_path=None,
        samples_path=None,
        training_log=[],
        config_yaml="",
        output_dir=output_dir,
        on_event=lambda event, **fields: events.append({"event": event, **fields}),
    )
    return events


def contents(folder: Path) -> dict[str, bytes]:
    """All that tasks wrote, by name."""
    names = [name for name in files_under(folder) if name.startswith(("tasks", "answers", "doc"))]
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("objective", ["mdlm", "block_diffusion", "ar", "joint"])
def test_every_kind_of_checkpoint_answers(
    objective: str, checkpoints: dict[str, Path], tasks_path: str, tmp_path: Path
) -> None:
    events = evaluate_tasks(checkpoints[objective], tmp_path, tasks_path)
    metrics = load_manifest(tmp_path).metadata["metrics"]
    for name in ("local_choice/acc", "local_writing/exact_match"):
        assert 0.0 <= metrics[name] <= 1.0
        assert metrics[f"{name}_standard_error"] >= 0.0
    assert 1.0 < metrics["local_text/bits_per_byte"] < 40.0
    # Both choices of one document, and what is to be written behind it; its text is cut up.
    assert metrics["unserved_requests"] == 3
    (warning,) = [event["message"] for event in events if event["event"] == "warning"]
    assert "3 requests of tasks could not be served" in warning
    written = json.loads((tmp_path / "tasks.json").read_text())
    assert len(written["unserved"]) == 3
    assert all("too long" in request for request in written["unserved"])
    page = (tmp_path / "report" / "index.html").read_text()
    assert "local_choice" in page
    assert "Requests that could not be served: 3" in page


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_blockwise_writes_the_answers_of_tasks(
    checkpoints: dict[str, Path], tasks_path: str, tmp_path: Path
) -> None:
    """Each a prompt and the tokens that the task asks for, as `jobs.generate` writes them."""
    from tokendiff.data.prompts import GenerationRow
    from tokendiff.evaluation.tasks.requests import TaskRequest
    from tokendiff.models.sampling import SamplingModel

    sampler = {"name": "blockwise", "block_size": 2, "temperature": 1.0}
    evaluate_tasks(
        checkpoints["mdlm"], tmp_path, tasks_path, tasks=["local_writing"], sampler=sampler
    )
    assert load_manifest(tmp_path).metadata["metrics"]["unserved_requests"] == 1
    (part,) = {name for name in files_under(tmp_path) if name.endswith("part-00000.jsonl")}
    answers = {json.loads(line)["text"] for line in (tmp_path / part).read_text().splitlines()}
    settings = {"until": ["."], "max_gen_toks": 6, "temperature": 0.0}
    asked = {"max_new_tokens": 6}
    config = GenerateConfig.model_validate({"sampler": {**sampler, **asked}})
    model = SamplingModel(checkpoints["mdlm"], config, device="cpu")
    rows = []
    for n in range(12):
        request = TaskRequest(kind="generate_until", context=f"{n} and {n}", settings=settings)
        rows.append(GenerationRow(id=request.noise_id, prompt=request.context))
    written = {r["text"].removeprefix(f"{r['prompt']}").split(".")[0] for r in model.samples(rows)}
    assert answers <= written
    assert len(answers) > 1


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_settings_that_make_answers_differ_are_in_the_identity(
    checkpoints: dict[str, Path], tasks_path: str, tmp_path: Path
) -> None:
    """Two checkpoints stay comparable; a sampler that was set, and another one, do not."""
    found = []
    evaluations: list[tuple[str, dict[str, Any]]] = [
        ("block_diffusion", {}),
        ("joint", {}),
        ("block_diffusion", {"sampler": {"name": "sdar", "denoising_steps": 1}}),
        ("block_diffusion", {"sampler": {"name": "sdar", "denoising_steps": 2}}),
    ]
    for number, (objective, fields) in enumerate(evaluations):
        folder, choice = tmp_path / str(number), {"tasks": ["local_choice"], **fields}
        events = evaluate_tasks(checkpoints[objective], folder, tasks_path, **choice)
        assert not any("num_fewshot" in str(event) for event in events)
        found.append(load_manifest(folder).metadata["tasks"]["local_choice"])
    assert found[0] == found[1]
    assert len(set(found)) == 3


@pytest.mark.usefixtures("in_this_process")
def test_examples_that_a_task_cannot_show_are_said(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"tasks": ["builtin_arithmetic"], "max_task_documents": 2}
    events = evaluate_tasks(checkpoints["ar"], tmp_path, None, num_fewshot=2, **fields)
    (said,) = [e["message"] for e in events if "num_fewshot" in str(e.get("message"))]
    assert said.startswith("num_fewshot 2 has no effect on builtin_arithmetic: ")


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_joint_checkpoint_is_read_as_the_sampler_reads_it(
    checkpoints: dict[str, Path], tasks_path: str, tmp_path: Path
) -> None:
    """Its weights are those of the checkpoint of objective ar."""
    figures = {}
    for objective, sampler in (
        ("ar", "ar"),
        ("joint", "ar"),
        ("joint", "self_speculation"),
        ("joint", "sdar"),
    ):
        fields: dict[str, Any] = {"tasks": ["local_text", "local_writing"]}
        fields["sampler"] = {"name": sampler}
        folder = tmp_path / objective / sampler
        evaluate_tasks(checkpoints[objective], folder, tasks_path, **fields)
        metrics = load_manifest(folder).metadata["metrics"]
        figures[objective, sampler] = metrics["local_text/bits_per_byte"]
    assert figures["joint", "ar"] == pytest.approx(figures["ar", "ar"], rel=1e-6)
    assert figures["joint", "self_speculation"] == pytest.approx(figures["ar", "ar"], rel=1e-6)
    assert figures["joint", "sdar"] != pytest.approx(figures["ar", "ar"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_killed_twice_it_answers_nothing_again_and_the_same(
    checkpoints: dict[str, Path],
    tasks_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tokendiff.evaluation.tasks.answering import TaskModel
    from tokendiff.evaluation.tasks.requests import TaskRequest

    checkpoint = checkpoints["block_diffusion"]
    evaluate_tasks(checkpoint, tmp_path / "whole", tasks_path)

    answered: Counter[str] = Counter()
    left = 0
    answer = TaskModel.answers

    def until_killed(self: TaskModel, requests: Sequence[TaskRequest], **kwargs: Any) -> Any:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        answered.update(request.digest for request in requests)
        return answer(self, requests, **kwargs)

    monkeypatch.setattr(TaskModel, "answers", until_killed)
    for left in (3, 5):  # counted down above
        with pytest.raises(KeyboardInterrupt):
            evaluate_tasks(checkpoint, tmp_path / "killed", tasks_path)
        assert not left
    left = 1000
    evaluate_tasks(checkpoint, tmp_path / "killed", tasks_path)
    assert set(answered.values()) == {1}
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")

    evaluate_tasks(checkpoint, tmp_path / "killed", tasks_path, seed=1)  # nothing of another seed
    assert contents(tmp_path / "killed").keys() != contents(tmp_path / "whole").keys()
    assert answered.total() == 2 * len(answered)


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_behind_a_uri_it_goes_on_too(
    checkpoints: dict[str, Path], tasks_path: str, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokendiff.evaluation.tasks.answering import TaskModel

    folder = location(f"{s3}/evaluation")
    choice: dict[str, Any] = {"tasks": ["local_choice"]}
    answer, left = TaskModel.answers, 3

    def until_killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return answer(*args, **kwargs)

    monkeypatch.setattr(TaskModel, "answers", until_killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(checkpoints["ar"], folder, tasks_path, **choice)
    left = 4  # of 26 requests in parts of four
    evaluate_tasks(checkpoints["ar"], folder, tasks_path, **choice)
    assert left == 0
    monkeypatch.undo()
    files = load_manifest(folder).files
    assert {"tasks.json", "documents/local_choice.parquet"} <= files.keys()
    assert sum(name.startswith("answers/") for name in files) == 7


@pytest.mark.ray
def test_on_three_actors_the_files_are_the_same(
    ray_session: None, checkpoints: dict[str, Path], tasks_path: str, tmp_path: Path
) -> None:
    checkpoint = checkpoints["block_diffusion"]
    choice: dict[str, Any] = {
        "tasks": ["local_choice"]
    }  # a pool of actors starts for each kind of request
    evaluate_tasks(checkpoint, tmp_path / "three", tasks_path, num_actors=3, **choice)
    with jobs_here():
        evaluate_tasks(checkpoint, tmp_path / "one", tasks_path, **choice)
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


@pytest.mark.parametrize(
    ("objective", "fields", "message"),
    [
        ("mdlm", {"sampler": {"name": "sdar"}}, "sampler 'sdar'"),
        ("block_diffusion", {"sampler": {"name": "ar"}}, "sampler 'ar'"),
        ("ar", {"sampler": {"name": "ancestral"}}, "ancestral|noise"),
        ("ar", {"sampler": {"name": "dflash"}}, "dflash"),
        ("ar", {"apply_chat_template": True}, "no chat template"),
    ],
)
def test_what_does_not_fit_is_said_before_a_cluster_starts(
    objective: str, fields: Any, message: str, checkpoints: dict[str, Path], tasks_path: str
) -> None:
    from tokendiff.evaluation.inputs import EvaluationInputs

    config = EvaluateConfig.model_validate({"tasks": TASKS, "tasks_path": tasks_path, **fields})
    with pytest.raises(InputError, match=message):
        EvaluationInputs.open(
            config, checkpoint_path=str(checkpoints[objective]), data_path=None, samples_path=None
        )


def test_the_job_takes_names_with_commas() -> None:
    from jobs.cli import parse

    arguments = ["--tasks", "a,b", "c", "--sampler", "sdar", "--denoising_steps", "2"]
    config = parse(arguments, prog="jobs.evaluate", description="", sections=("evaluate",)).config
    assert config.evaluate is not None
    assert config.evaluate.tasks == ["a", "b", "c"]
    assert config.evaluate.sampler is not None
    assert config.evaluate.sampler.model_dump()["denoising_steps"] == 2
    with pytest.raises(InputError, match="none is named; add --sampler NAME"):
        parse(arguments[:3] + arguments[-2:], prog="", description="", sections=("evaluate",))
    with pytest.raises(InputError, match="no tasks"):
        parse(["--num_fewshot", "1"], prog="jobs.evaluate", description="", sections=("evaluate",))
