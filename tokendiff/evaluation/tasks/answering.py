"""A model that answers requests of tasks, in the process that calls it: what an actor holds.

The sampler decides how a model is read. `ar` and `self_speculation` read it from left to right, and
likelihoods are exact; under any other sampler they are bounds. Text is written by the sampler.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tokendiff.artifacts.checkpoint import DRAFT_ADAPTERS
from tokendiff.diffusion.interfaces import OnProgress, unwatched
from tokendiff.diffusion.splitmix import key_from
from tokendiff.errors import InputError
from tokendiff.evaluation.tasks.requests import Answer, TaskRequest, cut_at
from tokendiff.evaluation.tasks.scoring import (
    TokenPair,
    bounded_nats,
    exact_nats,
    greedily_written,
)
from tokendiff.evaluation.tasks.setup import TaskSetup
from tokendiff.models.checkpoints import load_for_inference, take_average
from tokendiff.models.completion import CompletionModel, CompletionSetup
from tokendiff.models.decoding import open_causal
from tokendiff.models.kept_base import read_as_base
from tokendiff.models.sampling import SamplingModel


class TaskModel:
    """Answers requests. One model is in memory at a time, for scoring or for writing.

    Args:
        num_mask_samples: noise levels of each bound.
    """

    def __init__(self, setup: TaskSetup, *, num_mask_samples: int, device: str) -> None:
        self._setup, self._device = setup, device
        self._num_mask_samples = num_mask_samples
        self._key = key_from(setup.config.seed, "tasks")
        self._held: tuple[str, Any] = ("nothing", None)

    def answers(
        self, requests: Sequence[TaskRequest], *, on_progress: OnProgress = unwatched
    ) -> list[Answer]:
        """One answer per request, in their order.

        The randomness of a request is its own. Rounding depends on what it shares a batch with, so
        give the same requests together where answers are to be the same to the bit.
        """
        found: dict[str, Answer] = {}
        for digest, answer in self.answered(requests):
            found[digest] = answer
            on_progress(lambda: (len(found), 0))
        return [found[request.digest] for request in requests]

    def answered(self, requests: Sequence[TaskRequest]) -> Iterator[tuple[str, Answer]]:
        """(digest, answer) of each request as it is answered, equal requests once; those first that
        cannot be served.
        """
        unique = list({request.digest: request for request in requests}.values())
        for place, answer in self._answered(unique):
            yield unique[place].digest, answer

    def _answered(self, requests: Sequence[TaskRequest]) -> Iterator[tuple[int, Answer]]:
        scored: list[tuple[int, TokenPair]] = []
        written: dict[str, list[tuple[int, TaskRequest]]] = defaultdict(list)
        for place, request in enumerate(requests):
            try:
                if request.kind == "generate_until":
                    self._setup.row(request)
                    settings = json.dumps(request.settings, sort_keys=True)
                    written[settings].append((place, request))
                    continue
                pairs = self._setup.pairs(request)
            except InputError as error:
                yield place, {"error": str(error)}
                continue
            scored += [(place, pair) for pair in pairs]
            if not pairs:  # an empty text
                yield place, {"nats": 0.0, "is_greedy": True}
        yield from self._scores(scored)
        for group in written.values():
            yield from self._texts(group)

    def _scores(self, scored: list[tuple[int, TokenPair]]) -> Iterator[tuple[int, Answer]]:
        nats: dict[int, float] = defaultdict(float)
        is_greedy: dict[int, bool] = defaultdict(lambda: True)
        num_left = Counter(place for place, _ in scored)
        size = self._setup.config.batch_size
        for batch in (scored[at : at + size] for at in range(0, len(scored), size)):
            of_pairs, are_greedy = self._score([pair for _, pair in batch])
            for (place, _), value, is_likeliest in zip(
                batch, of_pairs.tolist(), are_greedy.tolist(), strict=True
            ):
                nats[place] += value
                is_greedy[place] &= is_likeliest
                num_left[place] -= 1
                if not num_left[place]:
                    yield place, {"nats": nats[place], "is_greedy": is_greedy[place]}

    def _score(self, pairs: list[TokenPair]) -> tuple[torch.Tensor, torch.Tensor]:
        setup, model = self._setup, self._hold("scoring")
        if setup.is_exact:
            return exact_nats(model, pairs)
        assert setup.process is not None, "TaskSetup.check_kinds sees to it"
        with torch.autocast(
            torch.device(self._device).type, dtype=torch.bfloat16, enabled=self._is_bf16
        ):
            nats = bounded_nats(
                model,
                setup.process,
                pairs,
                key=self._key,
                num_mask_samples=self._num_mask_samples,
            )
            return nats, greedily_written(model, setup.process, pairs)

    def _texts(self, group: list[tuple[int, TaskRequest]]) -> Iterator[tuple[int, Answer]]:
        """Write the texts of requests that have the same settings."""
        config, check = self._setup.writing(group[0][1])
        rows = [self._setup.row(request) for _, request in group]
        by_row = {row.id: (place, r) for row, (place, r) in zip(rows, group, strict=True)}
        model = self._hold("writing")
        if isinstance(check, CompletionSetup):
            model = model.with_setup(check)
        else:
            model = model.with_sampler(config)
        for record in model.samples(rows):
            place, request = by_row[record["id"]]
            begin = record["num_prompt_tokens"]
            tokens = record["tokens"][begin : begin + request.settings["max_gen_toks"]]
            if (eos := self._setup.tokenizer.eos_token_id) in tokens:
                tokens = tokens[: tokens.index(eos)]
            text = self._setup.tokenizer.decode(tokens, skip_special_tokens=True)
            yield place, {"text": cut_at(text, request.settings["until"])}

    @property
    def _is_bf16(self) -> bool:
        return self._setup.config.mixed_precision == "bf16"

    def _hold(self, what: str) -> Any:
        """The model for that; the other is let go first."""
        if self._held[0] != what:
            self._held = ("nothing", None)
            self._held = what, self._open_scoring() if what == "scoring" else self._open_writing()
        return self._held[1]

    def _open_writing(self) -> SamplingModel | CompletionModel:
        setup = self._setup
        if setup.config.is_open_ended:
            return CompletionModel(setup.config, checkpoint=setup.checkpoint, device=self._device)
        return SamplingModel(setup.checkpoint, setup.config, device=self._device)

    def _open_scoring(self) -> Any:
        setup = self._setup
        if not setup.is_exact:
            assert setup.checkpoint is not None, "TaskSetup.check_kinds sees to it"
            return load_for_inference(setup.checkpoint)[0].to(self._device)
        assert isinstance(setup.check, CompletionSetup)
        model, _ = open_causal(
            setup.check.name,
            field=setup.check.field,
            dtype=torch.bfloat16 if self._is_bf16 else torch.float32,
            trust_remote_code=setup.config.trust_remote_code,
        )
        if setup.checkpoint is not None and (setup.checkpoint / DRAFT_ADAPTERS).is_file():
            read_as_base(model, setup.checkpoint)
        elif setup.checkpoint is not None:
            take_average(model.model, setup.checkpoint)
        return model.to(self._device)
