"""What a served model answers, and refuses with 400, by MLflow's own parsing of requests."""

import dataclasses
import json
import runpy
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests import ROOT
from tokendiff.data.prompts import GenerationRow
from tokendiff.tracking.registry import model_signature
from tokendiff.tracking.serving_limits import Limits


class Echo:
    """In place of a model that samples, which takes a moment."""

    def __init__(self) -> None:
        self.num_inside = self.most_inside = 0
        self.is_counted = threading.Event()

    def num_tokens(self, row: GenerationRow) -> int:
        self.is_counted.set()
        return len(str(row.prompt)) + 10

    def sample(self, rows: list[GenerationRow]) -> list[dict[str, Any]]:
        self.num_inside += 1
        self.most_inside = max(self.most_inside, self.num_inside)
        time.sleep(0.01)
        self.num_inside -= 1
        return [
            {"text": f"{row.prompt}!", "completion": "!", "tokens": [0], "num_model_calls": 1}
            for row in rows
        ]


ECHO = Echo()


@pytest.fixture(scope="module")
def prompt_model() -> Any:
    from tokendiff.tracking.served_model import PromptModel

    model = PromptModel()
    model._model, model._batch_size = ECHO, 2  # type: ignore[assignment]
    model._takes_messages = False
    model._limits = Limits(max_prompts=9, max_chars=200, max_tokens=150)
    return model


@pytest.fixture(scope="module")
def ask(prompt_model: Any) -> Callable[[Any], tuple[int, Any]]:
    """Status and answer for a request to /invocations; no server, and no model that samples."""
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model
    from mlflow.pyfunc import PyFuncModel
    from mlflow.pyfunc.model import _PythonModelPyfuncWrapper
    from mlflow.pyfunc.scoring_server import invocations

    signature = model_signature()
    served = PyFuncModel(
        Model(signature=signature, flavors={"python_function": {"loader_module": "none"}}),
        _PythonModelPyfuncWrapper(prompt_model, None, signature),
        predict_fn="predict",
    )

    def ask(request: Any) -> tuple[int, Any]:
        body = json.dumps(request)
        try:
            answer = invocations(body, "application/json", served, signature.inputs)
        except MlflowException as error:
            return error.get_http_status_code(), str(error)
        predictions = json.loads(answer.response)["predictions"]
        assert all(
            (row["completion"], set(row)) == ("!", set(signature.outputs.input_names()))
            for row in predictions
        )
        return answer.status, [row["text"] for row in predictions]

    return ask


def test_the_file_that_mlflow_runs_gives_its_user_no_advice() -> None:
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        runpy.run_path(str(ROOT / "tokendiff" / "tracking" / "served_model.py"))
    assert [str(warning.message) for warning in given] == []


@pytest.mark.parametrize(
    "prompt", [5, 0, 1.5, float("nan"), True, None, ["a", 5], {"a": 1}, [["a"]], [{"a": 1}]]
)
def test_what_is_no_text_is_refused_in_every_form(
    ask: Callable[[Any], tuple[int, Any]], prompt: Any
) -> None:
    table = {"columns": ["prompt"], "data": [[prompt]]}
    for request in (
        {"inputs": [{"prompt": prompt}]},
        {"inputs": {"prompt": [prompt]}},
        {"dataframe_records": [{"prompt": prompt}]},
        {"dataframe_split": table},
        {"inputs": [{"prompt": "a"}, {"prompt": prompt}]},
        {"dataframe_split": {**table, "data": [["a"], [prompt]]}},
    ):
        status, message = ask(request)
        assert (status, "must be a text, got" in message) == (400, True), (request, message)


@pytest.mark.parametrize(
    "request_",
    [
        {"inputs": [{"prompt": "a"}, {"prompt": "5"}]},
        {"inputs": {"prompt": ["a", "5"]}},
        {"inputs": ["a", "5"]},
        {"instances": [{"prompt": "a"}, {"prompt": "5"}]},
        {"dataframe_records": [{"prompt": "a"}, {"prompt": "5"}]},
        {"dataframe_split": {"columns": ["prompt"], "data": [["a"], ["5"]]}},
        {"inputs": [{"prompt": "a"}, {"prompt": "5"}], "params": {"seed": 3}},
        {"inputs": [{"prompt": "a"}, {"prompt": "5"}], "params": {"seed": None}},
    ],
)
def test_texts_are_answered_in_every_form(
    ask: Callable[[Any], tuple[int, Any]], request_: dict[str, Any]
) -> None:
    """The text "5" is one."""
    assert ask(request_) == (200, ["a!", "5!"])


@pytest.mark.parametrize("request_", [{"inputs": []}, {"inputs": {"prompt": []}}])
def test_a_request_without_prompts_is_told_so(
    ask: Callable[[Any], tuple[int, Any]], request_: dict[str, Any]
) -> None:
    status, message = ask(request_)
    assert (status, "there is no prompt; send some" in message) == (400, True), message
    status, message = ask({"inputs": [{"prompt": "a"}, {"prompt": []}]})
    assert (status, "prompt 1 must be a text, got []" in message) == (400, True), message


CHAT = [{"role": "user", "content": "Hi"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]


def test_messages_are_a_prompt_where_the_model_takes_them(
    ask: Callable[[Any], tuple[int, Any]], prompt_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, message = ask({"inputs": [{"prompt": CHAT}]})
    assert (status, "promoted with generate.use_chat_template" in message) == (400, True), message
    monkeypatch.setattr(prompt_model, "_takes_messages", True)
    for request in (
        {"inputs": [{"prompt": CHAT}]},
        {"inputs": {"prompt": [CHAT]}},
        {"inputs": [{"prompt": PARTS}]},
        {"instances": [{"prompt": CHAT}]},
        {"dataframe_records": [{"prompt": CHAT}]},
        {"dataframe_split": {"columns": ["prompt"], "data": [[CHAT]]}},
    ):
        assert ask(request) == (200, [f"{CHAT}!"]), request
    for both in (
        {"inputs": [{"prompt": CHAT}, {"prompt": "a"}]},
        {"inputs": {"prompt": [CHAT, "a"]}},
    ):
        assert ask(both) == (200, [f"{CHAT}!", "a!"])
    two = {"inputs": {"prompt": [CHAT, CHAT]}}
    assert ask(two) == (200, [f"{CHAT}!"] * 2)
    for bad in ([{"role": "user"}], [{"role": "user", "content": 5}], [{**CHAT[0]}, "a"]):
        status, message = ask({"inputs": [{"prompt": bad}, {"prompt": "a"}]})
        assert (status, "prompt 0 must be a text, got" in message) == (400, True), message
    status, message = ask({"inputs": [{"prompt": [{"role": "user", "content": "a" * 201}]}]})
    assert (status, "200 characters in its prompts" in message) == (413, True)


def test_requests_of_several_threads_take_turns(ask: Callable[[Any], tuple[int, Any]]) -> None:
    """A model has one state, and the server of MLflow calls it from a pool of threads."""
    requests = [{"inputs": [f"{number}", "a", "b"]} for number in range(6)]
    ECHO.most_inside = 0
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(ask, requests))
    assert answers == [(200, [f"{number}!", "a!", "b!"]) for number in range(6)]
    assert ECHO.most_inside == 1


def test_a_request_that_waits_longer_than_it_may_is_refused(
    ask: Callable[[Any], tuple[int, Any]], prompt_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time runs while other requests have their turn."""
    limits = dataclasses.replace(prompt_model._limits, max_seconds=0.05)
    monkeypatch.setattr(prompt_model, "_limits", limits)
    ECHO.is_counted.clear()
    with ThreadPoolExecutor(1) as threads:
        with prompt_model._turn:
            waiting = threads.submit(ask, {"inputs": ["a"]})
            assert ECHO.is_counted.wait(60)  # and so it is about to wait for its turn
            time.sleep(0.5)
        status, answer = waiting.result()
    assert status == 413
    assert "fewer requests at once" in answer


def test_other_columns_and_seeds_are_refused(ask: Callable[[Any], tuple[int, Any]]) -> None:
    for request in (
        {"inputs": [{"text": "a"}]},
        {"inputs": [{"messages": [{"role": "user", "content": "a"}]}]},
        {"inputs": [{"prompt": "a"}], "params": {"seed": -1}},
        {"inputs": [{"prompt": "a"}], "params": {"seed": "one"}},
    ):
        assert ask(request)[0] == 400, request


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (["a"] * 10, "9 prompts, this one has 10"),
        (["a" * 101, "b" * 100], "200 characters in its prompts, this one has 201"),
        (["a" * 66, "b" * 65], "150 tokens in its prompts and answers, this one has 151"),
    ],
)
def test_too_much_is_answered_with_413_and_the_setting_that_allows_it(
    ask: Callable[[Any], tuple[int, Any]], prompts: list[str], said: str
) -> None:
    for request in (
        {"inputs": [{"prompt": prompt} for prompt in prompts]},
        {"inputs": {"prompt": prompts}},
        {"dataframe_split": {"columns": ["prompt"], "data": [[prompt] for prompt in prompts]}},
    ):
        status, message = ask(request)
        assert (status, said in message, "TOKENDIFF_SERVE_MAX_" in message) == (413, True, True)


def test_as_much_as_may_be_is_answered(ask: Callable[[Any], tuple[int, Any]]) -> None:
    for prompts in (["a"] * 9, ["a" * 65, "b" * 65]):
        status, texts = ask({"inputs": {"prompt": prompts}})
        assert (status, texts) == (200, [f"{prompt}!" for prompt in prompts])
