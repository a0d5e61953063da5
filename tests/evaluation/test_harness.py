"""lm-evaluation-harness over our models: against its own model `hf`, on tasks of local files."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.builders import tiny_causal
from tokendiff.data.tokenizers import build_tokenizer
from tokendiff.errors import InputError
from tokendiff.evaluation.tasks.requests import TaskRequest, cut_at, generation_settings

pytest.importorskip("lm_eval", reason="the extra eval")

from tokendiff.evaluation.tasks.answering import TaskModel
from tokendiff.evaluation.tasks.harness import AnsweredModel, HarnessModel
from tokendiff.evaluation.tasks.suite import (
    ask_tasks,
    check_tasks,
    load_tasks,
)

QUESTIONS = [
    {"q": "Water is", "choices": [" wet", " dry", " a stone"], "answer": 0},
    {"q": "A dog has ", "choices": ["four legs", "two heads"], "answer": 0},  # a space at its end
    {"q": "Größe heißt", "choices": [" size", " weight", " colour", " 日本"], "answer": 1},
    {"q": "", "choices": ["Begin", "End"], "answer": 1},  # nothing before it
    {"q": "One, two,", "choices": [" three", " four"], "answer": 0},
]
TASKS: dict[str, dict[str, Any]] = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_writing": {
        "output_type": "generate_until",
        "doc_to_text": "Say something: {{q}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "local_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q * 12}} and so on",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


@pytest.fixture(scope="module")
def tasks_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    import yaml

    folder = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps(question, ensure_ascii=False) for question in QUESTIONS]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
    }
    for name, fields in TASKS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **fields}))
    gone: dict[str, Any] = {
        "task": "local_gone",
        "dataset_path": "nobody/nothing",
        "test_split": "test",
    }
    (folder / "gone.yaml").write_text(yaml.safe_dump({**gone, **TASKS["local_choice"]}))
    beams = TASKS["local_writing"] | {"generation_kwargs": {"until": ["."], "num_beams": 4}}
    (folder / "beams.yaml").write_text(yaml.safe_dump({"task": "local_beams", **common, **beams}))
    code = {"task": "local_code", **common, **TASKS["local_writing"], "unsafe_code": True}
    (folder / "code.yaml").write_text(yaml.safe_dump(code))
    return str(folder)


def save_causal(folder: Path, *, begins_with_bos: bool) -> str:
    """A random causal model that takes 64 bytes; its tokenizer may put BOS before a text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer: Any = build_tokenizer("bytes", documents=(), vocab_size=0)[0]
    if begins_with_bos:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
        assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    model = tiny_causal(
        "llama",
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model_id(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_causal(tmp_path_factory.mktemp("model"), begins_with_bos=False)


def responses(model: Any, tasks_path: str, names: list[str]) -> dict[str, list[Any]]:
    """What the model answered to each document of each task, and what the harness made of it."""
    from lm_eval.evaluator import evaluate

    loaded = load_tasks(names, tasks_path=tasks_path)
    samples = evaluate(lm=model, task_dict=loaded, bootstrap_iters=0)["samples"]
    return {
        task: [[s["resps"], {name: s[name] for name in s["metrics"]}] for s in found]
        for task, found in samples.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("begins_with_bos", [False, True])
def test_the_answers_are_those_of_the_harness_own_model(
    begins_with_bos: bool, tasks_path: str, tmp_path: Path
) -> None:
    """Log-likelihoods, choices, texts, and likelihoods of texts longer than the model takes."""
    from lm_eval.models.huggingface import HFLM

    name = save_causal(tmp_path, begins_with_bos=begins_with_bos)
    ours = responses(HarnessModel(model_id=name, batch_size=3), tasks_path, list(TASKS))
    theirs = responses(
        HFLM(pretrained=name, device="cpu", batch_size=2, logits_cache=False),
        tasks_path,
        list(TASKS),
    )
    assert ours.keys() == theirs.keys() == TASKS.keys()
    for (answers, figures), (expected, others) in zip(
        ours["local_choice"], theirs["local_choice"], strict=True
    ):
        assert figures == others
        for ((nats, is_greedy),), ((other, other_is),) in zip(answers, expected, strict=True):
            assert nats == pytest.approx(other, abs=1e-3)
            assert is_greedy == other_is
    for (answers, _), (expected, _) in zip(ours["local_text"], theirs["local_text"], strict=True):
        assert answers[0] == pytest.approx(expected[0], abs=1e-3)
    texts = [answers for answers, _ in ours["local_writing"]]
    assert texts == [answers for answers, _ in theirs["local_writing"]]
    assert len({str(text) for text in texts}) > 2


def test_the_registered_model_is_built_from_model_args(model_id: str, tasks_path: str) -> None:
    from lm_eval.api.registry import get_model

    arguments = f"model_id={model_id},sampler=ar,seed=3"
    built = get_model("tokendiff").create_from_arg_string(arguments, {"batch_size": 2})
    assert isinstance(built, HarnessModel)
    result = ask_tasks(load_tasks(["local_choice"], tasks_path=tasks_path), built)
    assert set(result.metrics) == {
        f"local_choice/{metric}{end}"
        for metric in ("acc", "acc_norm")
        for end in ("", "_standard_error")
    }
    assert result.num_documents == {"local_choice": 5}
    columns = result.documents["local_choice"]
    assert columns["local_choice/acc"].mean() == pytest.approx(result.metrics["local_choice/acc"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either checkpoint_path or model_id"),
        ({"model_id": "DIR", "sampler": "arr"}, "sampler"),
        ({"model_id": "DIR", "sampler": "ancestral"}, "needs the length of a sample"),
        (
            {"model_id": "DIR", "max_tokens": 3},
            "'ar' has no such field; did you mean 'max_new_tokens'",
        ),
        ({"model_id": "DIR", "batch_size": "auto"}, "batch_size"),
        ({"model_id": "/nowhere"}, "/nowhere"),
    ],
)
def test_model_args_that_cannot_be(model_id: str, arguments: Any, message: str) -> None:
    given: dict[str, Any] = {k: model_id if v == "DIR" else v for k, v in arguments.items()}
    with pytest.raises(InputError, match=message):
        HarnessModel(**given)


def test_a_request_that_is_too_long_is_named_and_counts_as_wrong(model_id: str) -> None:
    from lm_eval.api.instance import Instance

    def instances(kind: Any, arguments: list[Any]) -> list[Any]:
        return [Instance(request_type=kind, doc={}, arguments=a, idx=0) for a in arguments]

    model = HarnessModel(model_id=model_id)
    asked = [("a" * 60, "bcdef"), ("a" * 60, "bcdefg"), ("a", "b")]  # 65 tokens fit: 64 are read
    scores = model.loglikelihood(instances("loglikelihood", asked))
    assert [score == (-float("inf"), False) for score in scores] == [False, True, False]
    settings = {"until": ["."], "max_gen_toks": 10}
    texts = [("a" * 54, settings), ("a" * 55, settings)]
    written = model.generate_until(instances("generate_until", texts))
    assert written[1] == ""
    assert len(model.unserved) == 2
    assert [why for why in model.unserved.values() if "66 tokens" in why]
    assert [why for why in model.unserved.values() if "64" in why]


def test_documents_that_cannot_be_served_are_wrong(tasks_path: str) -> None:
    """The harness by itself finds the first choice the likeliest where all are impossible."""

    def answer(requests: list[TaskRequest]) -> list[Any]:
        answers: list[Any] = [
            {"error": "too long"}
            if request.continuation in (" wet", " dry", " a stone", " weight")
            else {"nats": float(request.continuation not in (" size", "End")), "is_greedy": False}
            for request in requests
        ]
        return [(r.digest, answer) for r, answer in zip(requests, answers, strict=True)]

    loaded = load_tasks(["local_choice"], tasks_path=tasks_path)
    result = ask_tasks(loaded, AnsweredModel(answer, tokenizer=None))
    # Right are "End" and, of two choices as likely, the first; wrong the three others.
    assert result.metrics["local_choice/acc"] == pytest.approx(3 / 5)
    assert result.metrics["local_choice/acc_norm"] == pytest.approx(3 / 5)
    assert len(result.unserved) == 4


def answered(answer_of: Callable[[TaskRequest], dict[str, Any]]) -> AnsweredModel:
    def answer(requests: list[TaskRequest]) -> list[Any]:
        return [(request.digest, answer_of(request)) for request in requests]

    return AnsweredModel(answer, tokenizer=None)


def test_a_likelihood_that_is_not_a_number_is_an_error(tasks_path: str) -> None:
    """An accuracy of it would look like any other."""

    def answer(request: TaskRequest) -> dict[str, Any]:
        nats = float("nan") if request.continuation == " dry" else 1.0
        return {"nats": nats, "is_greedy": False}

    loaded = load_tasks(["local_choice"], tasks_path=tasks_path)
    with pytest.raises(InputError, match=r"loglikelihood 'Water is dry' is not a number"):
        ask_tasks(loaded, answered(answer))


def test_requests_that_end_alike_are_counted_one_by_one() -> None:
    def answer(requests: list[TaskRequest]) -> list[tuple[str, dict[str, Any]]]:
        return [(request.digest, {"error": "too long"}) for request in requests]

    model = AnsweredModel(answer, tokenizer=None)
    texts = [f"{number} " + "answer yes or no: " * 9 for number in (1, 2, 3, 3)]
    model.loglikelihood([SimpleNamespace(args=(text, "yes")) for text in texts])

    assert len(model.unserved) == 3  # equal requests are one
    assert set(model.unserved.values()) == {"too long"}


def test_a_choice_that_the_model_finds_impossible_is_no_unserved_one(tasks_path: str) -> None:
    def answer(request: TaskRequest) -> dict[str, Any]:
        is_right = request.continuation in (" wet", "four legs", " weight", "End", " three")
        return {"nats": 1.0 if is_right else float("inf"), "is_greedy": False}

    result = ask_tasks(load_tasks(["local_choice"], tasks_path=tasks_path), answered(answer))
    assert result.metrics["local_choice/acc"] == 1.0


def test_texts_that_cannot_be_served_are_left_out_of_a_perplexity(tasks_path: str) -> None:
    def answer(request: TaskRequest) -> dict[str, Any]:
        if "dog" in request.continuation:
            return {"error": "it holds the mask token"}
        return {"nats": 2.0 * len(request.continuation.encode()), "is_greedy": False}

    result = ask_tasks(load_tasks(["local_text"], tasks_path=tasks_path), answered(answer))
    # Every byte costs two nats, those of the text that is left out too, had they counted.
    assert result.metrics["local_text/bits_per_byte"] == pytest.approx(2.0 / math.log(2.0))
    assert result.num_documents == {"local_text": 4}
    assert result.tables[0][2][0][3] == "4"
    with pytest.raises(InputError, match=r"local_text has no document that could be served.*mask"):
        ask_tasks(
            load_tasks(["local_text"], tasks_path=tasks_path),
            answered(lambda request: {"error": "it holds the mask token"}),
        )


def test_what_is_answered_before_a_kill_is_in_the_harness_cache(
    model_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CachingLM

    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=("abcdefgh"[:n], "b"), idx=0)
        for n in range(1, 8)
    ]
    score, left = TaskModel._score, 2

    def until_killed(self: TaskModel, pairs: Any) -> Any:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return score(self, pairs)

    expected = HarnessModel(model_id=model_id, batch_size=3).loglikelihood(asked)
    monkeypatch.setattr(TaskModel, "_score", until_killed)
    model = CachingLM(HarnessModel(model_id=model_id, batch_size=3), str(tmp_path / "cache.db"))
    with pytest.raises(KeyboardInterrupt):
        model.loglikelihood(asked)
    left = 1  # of seven requests in batches of three, the last one
    found = [nats for nats, _ in model.loglikelihood(asked)]
    assert found == pytest.approx([nats for nats, _ in expected], rel=1e-6)
    assert len(set(found)) == 7
    assert left == 0


def test_equal_requests_are_answered_once_and_repeats_apart() -> None:
    asked: list[TaskRequest] = []

    def answer(requests: list[TaskRequest]) -> list[Any]:
        asked.extend(requests)
        return [(request.digest, {"text": str(request.noise_id)}) for request in requests]

    from lm_eval.api.instance import Instance

    model = AnsweredModel(answer, tokenizer=None)
    arguments = ("a", {"until": ["."], "temperature": 1.0, "do_sample": True})
    instance = Instance(request_type="generate_until", doc={}, arguments=arguments, idx=0)
    texts = model.generate_until([instance] * 3)
    assert len(set(texts)) == 3
    assert [request.repeat for request in asked] == [0, 1, 2]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"until": "x"}, {"until": ["x"], "max_gen_toks": 256, "temperature": 0.0}),
        (
            {"max_new_tokens": 3, "do_sample": True, "top_k": 4},
            {"until": [], "max_gen_toks": 3, "temperature": 1.0, "top_k": 4},
        ),
        (
            {"temperature": 0.7, "do_sample": False, "top_p": 0.9, "num_beams": 1},
            {"until": [], "max_gen_toks": 256, "temperature": 0.0},
        ),
        (
            {"temperature": 0.7, "until": ["", "b"]},
            {"until": ["b"], "max_gen_toks": 256, "temperature": 0.7},
        ),
    ],
)
def test_what_tasks_ask_of_a_text(given: Any, expected: Any) -> None:
    assert generation_settings(given) == expected


@pytest.mark.parametrize("given", [{"max_gen_toks": 0}, {"max_new_tokens": -1}])
def test_a_text_has_tokens(given: Any) -> None:
    with pytest.raises(InputError, match=r"at least 1; raise max_gen_toks"):
        generation_settings(given)


def test_a_text_ends_before_its_first_stop_string() -> None:
    assert cut_at("abcdef", ["e", "bc"]) == "a"
    assert cut_at("abcdef", ["x"]) == "abcdef"


def test_tasks_that_cannot_be_loaded(
    tasks_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokendiff.config.evaluate import EvaluateConfig

    # Where the harness looks for tasks of its own: thousands of files, which takes seconds.
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "manager.py"))
    for names, path, message in (
        (["local_chioce"], tasks_path, "there is no task 'local_chioce'.*'local_choice'"),
        (["local_gone"], tasks_path, "local_gone cannot be loaded.*without a network"),
        (["local_choice"], f"{tasks_path}/none", "no such folder"),
    ):
        with pytest.raises(InputError, match=message):
            load_tasks(names, tasks_path=path)
    for name, message in (("local_beams", "num_beams"), ("local_code", "runs code")):
        config = EvaluateConfig(tasks=[name], tasks_path=tasks_path)
        with pytest.raises(InputError, match=f"{name}.*{message}"):
            check_tasks(config)


def test_the_builtin_tasks() -> None:
    from tokendiff.evaluation.tasks.builtin import NUM_DOCUMENTS

    tasks = load_tasks(["builtin"])["tasks"]
    assert sorted(tasks) == [
        f"builtin_{name}" for name in ("arithmetic", "cloze", "copying", "infilling")
    ]
    for task in tasks.values():
        documents = list(task.test_docs())
        assert len(documents) == NUM_DOCUMENTS
        for document in documents:
            if "answer" in document:
                *solved, asked = document["context"].split("\n")
                for line in [*solved, asked + document["answer"]]:
                    a, b, total = map(int, line.replace("+", " ").replace("=", " ").split())
                    assert a + b == total
            else:
                assert len(set(document["choices"])) == 4
        if "right" in documents[0]:  # no place is favoured
            assert {document["right"] for document in documents} == {0, 1, 2, 3}
