"""Tasks by document: those of a group together, and what makes two evaluations comparable."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tokendiff.evaluation.paired import paired_standard_error
from tokendiff.evaluation.tasks.requests import TaskRequest

pytest.importorskip("lm_eval", reason="the extra eval")

from lm_eval.tasks import TaskManager

from tokendiff.evaluation.tasks.harness import AnsweredModel
from tokendiff.evaluation.tasks.suite import SuiteResult, ask_tasks, load_tasks

NUM_DOCUMENTS = {"first": 7, "second": 3}


def write_tasks(folder: Path, *, has_groups: bool = False, **fields: Any) -> str:
    folder.mkdir()
    for name, number in NUM_DOCUMENTS.items():
        documents = [{"q": f"{n} is", "choices": [" odd", " even"], "a": n % 2} for n in range(9)]
        lines = [json.dumps(document) for document in documents[:number]]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
            "test_split": "test",
            "doc_to_text": "{{q}}",
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "a",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
            **fields,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    for group, by_size in (("both", True), ("alike", False)) if has_groups else ():
        pooling = [{"metric": "acc", "aggregation": "mean", "weight_by_size": by_size}]
        listed = {"group": group, "task": list(NUM_DOCUMENTS), "aggregate_metric_list": pooling}
        (folder / f"{group}.yaml").write_text(yaml.safe_dump(listed))
    return str(folder)


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tasks(tmp_path_factory.mktemp("groups") / "tasks", has_groups=True)


def asked(tasks_path: str, *names: str, **fields: Any) -> SuiteResult:
    """A model that finds " odd" likelier, but of two documents."""

    def answer(requests: list[TaskRequest]) -> list[Any]:
        answers = []
        for request in requests:
            is_odd = (request.continuation == " odd") != (request.context[:1] in "35")
            answers.append((request.digest, {"nats": 2.0 - is_odd, "is_greedy": False}))
        return answers

    loaded = load_tasks(names or list(NUM_DOCUMENTS), tasks_path=tasks_path)
    return ask_tasks(loaded, AnsweredModel(answer, tokenizer=None), **fields)


def test_a_group_has_the_documents_of_its_tasks(groups: str) -> None:
    result = asked(groups, "both")
    right = {0: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0, 6: 1.0}  # by the number asked about
    of_first = [right.get(n, 0.0) for n in range(7)]
    expected = np.mean([*of_first, *of_first[:3]])
    columns = result.documents["both"]
    assert len(set(columns["row_id"].tolist())) == 10
    assert columns["both/acc"].mean() == pytest.approx(expected)
    assert result.metrics["both/acc"] == pytest.approx(expected)
    assert result.num_documents == {"first": 7, "second": 3, "both": 10}
    everywhere = {**columns, "both/acc": np.full(10, 0.5)}
    error = paired_standard_error("both/acc", columns, everywhere)
    assert error == pytest.approx(np.std(columns["both/acc"], ddof=1) / 10**0.5)


def test_a_group_that_weighs_its_tasks_alike_is_no_mean_over_documents(groups: str) -> None:
    result = asked(groups, "alike")
    assert result.metrics["alike/acc"] == pytest.approx((6 / 7 + 2 / 3) / 2)
    assert set(result.documents["alike"]) == {"row_id"}


def test_the_harness_own_tasks_are_looked_for_where_a_group_needs_them(
    groups: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are thousands of them, so that to look takes seconds."""
    own = Path(write_tasks(tmp_path / "harness"))
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(own / "manager.py"))
    members: tuple[list[Any], ...] = (["first", {"task": "second"}], ["both"])
    for number, listed in enumerate(members):
        folder = tmp_path / str(number)
        folder.mkdir()
        pooling = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
        group = {"group": "mine", "task": listed, "aggregate_metric_list": pooling}
        (folder / "mine.yaml").write_text(yaml.safe_dump(group))
    assert asked(str(tmp_path / "0"), "mine").num_documents["mine"] == 10
    (own / "both.yaml").write_text((Path(groups) / "both.yaml").read_text())
    assert asked(str(tmp_path / "1"), "mine").num_documents["mine"] == 10
    made: list[bool] = []

    def noted(*, include_defaults: bool, **fields: Any) -> TaskManager:
        made.append(include_defaults)
        return TaskManager(include_defaults=include_defaults, **fields)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", noted)
    whole = write_tasks(tmp_path / "whole", has_groups=True)
    of_one = {"group": "one", "task": [{"task": "first"}], "aggregate_metric_list": pooling}
    (Path(whole) / "one.yaml").write_text(yaml.safe_dump(of_one))
    within = {"group": "two", "task": [{"group": "inner", "task": list(NUM_DOCUMENTS)}]}
    (Path(whole) / "two.yaml").write_text(yaml.safe_dump(within))
    asked(whole, "alike")
    assert asked(whole, "two").num_documents["first"] == 7
    assert made == [False]


def test_evaluations_are_comparable_that_asked_and_answered_alike(
    groups: str, tmp_path: Path
) -> None:
    ours = asked(groups, "both").identities
    assert set(ours) == {"first", "second", "both"}
    assert asked(groups, "both").identities == ours

    def differ(path: str, *names: str, **fields: Any) -> set[str]:
        theirs = asked(path, *names, **fields).identities
        return {name for name in theirs if ours[name] != theirs[name]}

    sampler = {"name": "sdar", "denoising_steps": 1}
    assert differ(groups, "both", answered_with=sampler) == {"first", "second", "both"}
    assert differ(groups, "both", max_documents=3) == {"first", "both"}
    assert differ(write_tasks(tmp_path / "same")) == set()
    # The same documents in other words.
    other_words: tuple[dict[str, Any], ...] = (
        {"doc_to_text": "Number {{q}}"},
        {"doc_to_choice": [" an odd one", " even"]},
    )
    for number, fields in enumerate(other_words):
        path = write_tasks(tmp_path / f"words-{number}", **fields)
        assert differ(path) == {"first", "second"}
