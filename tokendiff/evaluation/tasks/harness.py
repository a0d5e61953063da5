"""lm-evaluation-harness: its tasks asked of our models, and our models among its own.

`AnsweredModel` passes the harness's requests on to whoever answers them. `HarnessModel` is a model
of the harness's own command line, `tokendiff`. The console script `tokendiff-lm-eval` starts that:
the harness (0.4.13) looks for models in its own table only, and the script puts ours there first.

This module alone imports the harness, which is an extra: pip install 'tokendiff[eval]'.
"""

import difflib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import lm_eval.models  # noqa: F401  # fills the harness's table of models
import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from pydantic import ValidationError

from tokendiff.artifacts.checkpoint import open_checkpoint
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.loader import models_in, tags
from tokendiff.config.samplers import SamplerConfig
from tokendiff.errors import CorruptFileError, InputError
from tokendiff.evaluation.tasks.answering import TaskModel
from tokendiff.evaluation.tasks.requests import (
    UNSERVED,
    Answer,
    Kind,
    TaskRequest,
    generation_settings,
)
from tokendiff.evaluation.tasks.setup import TaskSetup, default_sampler

# Gives the digest of each request with its answer, in any order, equal requests once or each.
Answerer = Callable[[list[TaskRequest]], Iterable[tuple[str, Answer]]]


class AnsweredModel(LM):
    """A model of the harness whose requests `answer` answers.

    A request that cannot be served has log-likelihood `UNSERVED`, or the text "".

    Args:
        tokenizer: for chat templates.

    Raises:
        InputError: a log-likelihood is not a number. The harness would make an accuracy of it.
    """

    def __init__(self, answer: Answerer, *, tokenizer: Any) -> None:
        super().__init__()
        self._answer, self.tokenizer = answer, tokenizer
        self._unserved: dict[str, tuple[str, str]] = {}  # by digest: what it is, and why

    @property
    def unserved(self) -> dict[str, str]:
        """What each request that cannot be served is, and why. Different requests that read alike,
        since long ones are shown in part, are numbered.
        """
        found: dict[str, str] = {}
        seen: Counter[str] = Counter()
        for shown, why in self._unserved.values():
            seen[shown] += 1
            found[shown if seen[shown] == 1 else f"{shown} ({seen[shown]})"] = why
        return found

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._ask("loglikelihood", requests, _scored)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        return self._ask("loglikelihood_rolling", requests, lambda answer: _scored(answer)[0])

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return self._ask("generate_until", requests, lambda answer: answer.get("text", ""))

    def _ask(self, kind: Kind, instances: Any, value: Callable[[Answer], Any]) -> list[Any]:
        seen: Counter[str] = Counter()
        requests = [_request(kind, instance.args, seen) for instance in instances]
        places: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            places[request.digest].append(place)
        values: dict[int, Any] = {}
        for digest, answer in self._answer(requests):
            if math.isnan(answer.get("nats", 0.0)):
                raise InputError(
                    f"the log-likelihood of {requests[places[digest][0]].describe()} is not a "
                    "number; the model's weights are damaged, or too large for mixed_precision "
                    "bf16: train them anew, or set mixed_precision no"
                )
            for place in places[digest]:
                values[place] = value(answer)
                # At once, so that after a kill --use_cache has all that was answered.
                self.cache_hook.add_partial(kind, instances[place].args, values[place])
            if "error" in answer:
                shown = requests[places[digest][0]].describe()
                self._unserved[digest] = shown, answer["error"]
        return [values[place] for place in range(len(requests))]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")


@register_model("tokendiff")
class HarnessModel(AnsweredModel):
    """`tokendiff-lm-eval --model tokendiff --model_args checkpoint_path=out/final,sampler=sdar`.

    Args:
        checkpoint_path, model_id: as of `jobs.generate`, one of the two.
        sampler: its name; by default `ar` of models that decode token by token, `sdar`,
            `block_refinement` or `canvas` of those that decode block by block, else `ancestral`.
        batch_size, seed, seq_len, mixed_precision, trust_remote_code: as of `jobs.generate`.
        num_mask_samples: as of `jobs.evaluate`.
        device: by default a GPU where there is one.
        sampler_fields: what else the sampler's section may have, num_inference_steps=64.

    Raises:
        InputError: these do not go together.
    """

    def __init__(
        self,
        checkpoint_path: str | None = None,
        model_id: str | None = None,
        sampler: str | None = None,
        *,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        device: str | None = None,
        seed: int = 0,
        seq_len: int | None = None,
        num_mask_samples: int = 4,
        mixed_precision: str = "no",
        trust_remote_code: bool = False,
        **sampler_fields: Any,
    ) -> None:
        if (checkpoint_path is None) == (model_id is None):
            raise InputError("model_args: give either checkpoint_path or model_id")
        if not str(batch_size).isdigit():
            raise InputError(f"batch_size {batch_size!r}: must be a number")
        checkpoint = None if checkpoint_path is None else open_checkpoint(checkpoint_path)
        config = answering_config(
            {"name": sampler or default_sampler(checkpoint), **sampler_fields},
            model_id=model_id,
            batch_size=int(batch_size),
            seed=seed,
            seq_len=seq_len,
            mixed_precision=mixed_precision,
            trust_remote_code=trust_remote_code,
        )
        setup = TaskSetup.of(config, checkpoint)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._setup = setup
        self._model = TaskModel(setup, num_mask_samples=num_mask_samples, device=device)
        super().__init__(self._answers, tokenizer=setup.tokenizer)

    def _answers(self, requests: list[TaskRequest]) -> Iterator[tuple[str, Answer]]:
        self._setup.check_kinds({request.kind for request in requests})
        return self._model.answered(sorted(requests, key=lambda request: request.length))


def answering_config(sampler: Mapping[str, Any], **fields: Any) -> GenerateConfig:
    """How a model answers.

    Raises:
        InputError: a field does not exist, or has a value that it cannot have.
    """
    try:
        return GenerateConfig.model_validate({"sampler": dict(sampler), **fields})
    except ValidationError as error:
        raise InputError("\n".join(map(_explained, error.errors()))) from error


def _explained(problem: Any) -> str:
    place = [str(part) for part in problem["loc"]]
    if problem["type"] != "extra_forbidden":
        return ": ".join([*filter(None, [".".join(place)]), problem["msg"]])
    name = place[-1]
    (section,) = (m for m in models_in(SamplerConfig) if tags(m)[0] in place)
    known = [field for field in section.model_fields if field != "name"]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}"
    return f"{name}: sampler {tags(section)[0]!r} has no such field; {hint}"


def _request(kind: Kind, arguments: Any, seen: Counter[str]) -> TaskRequest:
    """
    Args:
        seen: how often each context was asked to be continued already.
    """
    if kind == "loglikelihood":
        return TaskRequest(kind=kind, context=arguments[0], continuation=arguments[1])
    if kind == "loglikelihood_rolling":
        return TaskRequest(kind=kind, continuation=arguments[0])
    context, settings = arguments[0], generation_settings(arguments[1])
    asked = json.dumps([context, settings], sort_keys=True)
    seen[asked] += 1
    return TaskRequest(kind=kind, context=context, settings=settings, repeat=seen[asked] - 1)


def _scored(answer: Answer) -> tuple[float, bool]:
    if "error" in answer:
        return UNSERVED, False
    return -answer["nats"], answer["is_greedy"]


def main() -> None:
    """The harness's own command line, with the model `tokendiff` in its table."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except (InputError, CorruptFileError) as error:
        raise SystemExit(f"error: {error}") from None
