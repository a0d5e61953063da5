"""A registered checkpoint as MLflow serves it: prompts in, text out.

MLflow runs this file by itself wherever the model is loaded (models-from-code), beside a copy of
the package.
"""

import json
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel

from tokendiff.tracking.serving_limits import Limits

if TYPE_CHECKING:
    from tokendiff.data.prompts import GenerationRow, Prompt

ANSWER_FIELDS = ("text", "completion", "num_model_calls")  # as the signature has them
# A request's rows have ids of their own: the seed, then the place in the request.
_PLACE_BITS = 32
MAX_SEED = 2**31 - 1


class PromptModel(PythonModel):
    """Samples a text for every prompt, the same for the same seed, prompt and place."""

    # MLflow would advise type hints wherever this class is made, past every filter of warnings; the
    # signature says more than they could.
    _skip_type_hint_validation = True

    def __init__(self) -> None:
        # A server calls from several threads. Positions at which adapters count, and the inputs of
        # recorded passes, are stored in the model, and two passes at once would overwrite them.
        self._turn = threading.Lock()

    def load_context(self, context: Any) -> None:
        import torch

        from tokendiff.config.generate import GenerateConfig
        from tokendiff.models.completion import CompletionModel
        from tokendiff.models.sampling import SamplingModel

        fields, checkpoint = dict(context.model_config), context.artifacts["checkpoint"]
        is_draft = fields.get("sampler", {}).get("name") == "dflash"
        if is_draft:
            fields["draft_model_id"] = checkpoint
            if "target" in context.artifacts:
                fields["target_model_id"] = context.artifacts["target"]
        config = GenerateConfig.model_validate(fields)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model: SamplingModel | CompletionModel
        if config.is_open_ended:
            folder = None if is_draft else Path(checkpoint)
            self._model = CompletionModel(config, checkpoint=folder, device=device)
        else:
            self._model = SamplingModel(Path(checkpoint), config, device=device)
        self._batch_size = config.batch_size
        self._takes_messages = config.use_chat_template
        self._limits = Limits.of_environment(os.environ)

    # MLflow takes types here for a schema, and the signature has one.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """The texts for a request.

        Args:
            model_input: a table with a column "prompt": texts, or lists of the messages of a chat.
            params: "seed".

        Returns:
            "text" (the prompt included), "completion" (the text behind the prompt) and
            "num_model_calls" for every prompt.

        Raises:
            MlflowException: a server answers with HTTP 413 where the request asks for more than
                its limits, else with 400.
        """
        from tokendiff.data.prompts import GenerationRow

        given = (params or {}).get("seed")
        seed = 0 if given is None else int(given)  # clients send null for what is not set
        if not 0 <= seed <= MAX_SEED:
            raise _refusal(f"seed must be from 0 to {MAX_SEED}, got {seed}")
        prompts = list(model_input["prompt"])
        if prompts == [[]]:  # as MLflow hands over {"inputs": []}
            raise _refusal(
                'there is no prompt; send some, as in {"inputs": [{"prompt": "Once upon"}]}'
            )
        is_column = len(prompts) == 1 and isinstance(prompts[0], list)
        if is_column and not all(isinstance(item, dict) for item in prompts[0]):
            prompts = prompts[0]  # a column of prompts, which MLflow hands over as one row
        self._refuse_too_much(prompts)
        rows = [
            GenerationRow(id=(seed << _PLACE_BITS) + place, prompt=self._checked(prompt, place))
            for place, prompt in enumerate(prompts)
        ]
        try:
            self._refuse_too_much(prompts, num_tokens=sum(map(self._model.num_tokens, rows)))
            records = self._sampled(rows)
        except ValueError as error:  # too long, or what the sampler cannot fill
            raise _refusal(str(error)) from error
        return [{name: record[name] for name in ANSWER_FIELDS} for record in records]

    def _checked(self, prompt: Any, place: int) -> "Prompt":
        """
        Raises:
            MlflowException: it is neither a text nor, where the model takes them, messages.
        """
        from tokendiff.data.prompts import checked_messages

        if isinstance(prompt, str):
            return prompt
        problem = f"prompt {place} must be a text, got {prompt!r:.80}"
        if not isinstance(prompt, list):
            raise _refusal(problem)
        try:
            messages = checked_messages(prompt, f"prompt {place}")
        except ValueError as error:
            raise _refusal(f"{problem}, nor can it be the messages of a chat: {error}") from error
        if not self._takes_messages:
            raise _refusal(
                f"{problem}; messages are for models that are promoted with generate."
                "use_chat_template and add_generation_prompt"
            )
        return messages

    def _sampled(self, rows: "list[GenerationRow]") -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        begun = time.monotonic()
        for at in range(0, len(rows), self._batch_size):
            with self._turn:
                if time.monotonic() - begun > self._limits.max_seconds:
                    raise TooMuch(
                        f"not done after {self._limits.max_seconds} s, with {at} of {len(rows)} "
                        "prompts; send fewer in one request, or fewer requests at once"
                    )
                records += self._model.sample(rows[at : at + self._batch_size])
        return records

    def _refuse_too_much(self, prompts: list[Any], *, num_tokens: int | None = None) -> None:
        problem = self._limits.problem_of(
            [
                prompt if isinstance(prompt, str) else json.dumps(prompt, default=str)
                for prompt in prompts
                if isinstance(prompt, str | list)
            ],
            num_tokens=num_tokens,
        )
        if problem is not None:
            raise TooMuch(problem)


class TooMuch(MlflowException):
    """A request of this kind can be answered, but is too large."""

    def __init__(self, message: str) -> None:
        super().__init__(message, error_code=INVALID_PARAMETER_VALUE)

    def get_http_status_code(self) -> int:
        return 413


def _refusal(message: str) -> MlflowException:
    return MlflowException.invalid_parameter_value(message)


set_model(PromptModel())
