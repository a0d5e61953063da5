"""What is known of a model that is to answer tasks before its weights are read: how requests become
tokens, and which of them it cannot serve.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tokendiff.artifacts.model_folders import longest_row, read_config
from tokendiff.artifacts.noise_process import NoiseProcess, objective_of
from tokendiff.config.generate import GenerateConfig
from tokendiff.data.prompts import GenerationRow
from tokendiff.errors import InputError
from tokendiff.evaluation.tasks.requests import TaskRequest
from tokendiff.evaluation.tasks.scoring import TokenPair, num_filling
from tokendiff.models.completion import READ_BY_TOKEN, CompletionSetup
from tokendiff.models.requests import RowCheck, make_check

_DEFAULT_WINDOW = 2048  # tokens, of a model whose config does not say what it takes
_MAX_NOISE_ID = 1 << 62


def default_sampler(checkpoint: Path | None) -> str:
    """The name of the sampler that reads a model if none is chosen."""
    if checkpoint is None or objective_of(checkpoint) == "ar":
        return "ar"
    process = NoiseProcess.load(checkpoint)
    if process.block_length is None:
        return "ancestral"
    if process.forward_process == "uniform":
        return "canvas"
    return "sdar" if process.attention_mask_mode == "4d" else "block_refinement"


@dataclass(frozen=True, kw_only=True)
class TaskSetup:
    """How a model reads and writes.

    Attributes:
        config: its model, sampler, batch_size, seed and mixed_precision; it has no prompts.
        checkpoint: opened; None where the config has a model_id.
        check: what says of a context whether it can be continued.
        process: what bounds are taken under; None where likelihoods are exact, or cannot be had.
    """

    config: GenerateConfig
    checkpoint: Path | None
    check: RowCheck
    process: NoiseProcess | None
    _writing: dict[str, tuple[GenerateConfig, RowCheck]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: GenerateConfig, checkpoint: Path | None) -> "TaskSetup":
        """
        Raises:
            InputError: no such model, or one that the sampler does not go with.
        """
        if config.sampler.name == "dflash":
            raise InputError(
                "sampler 'dflash' writes the text of its target, which answers tasks by itself: "
                "give the target as the model, and sampler 'ar'"
            )
        check = make_check(checkpoint, config)
        process = None
        if checkpoint is not None and config.sampler.name not in READ_BY_TOKEN:
            process = NoiseProcess.load(checkpoint)
        return cls(config=config, checkpoint=checkpoint, check=check, process=process)

    @property
    def is_exact(self) -> bool:
        """Whether likelihoods are those of the model read from left to right, and not bounds."""
        return self.config.sampler.name in READ_BY_TOKEN

    @property
    def tokenizer(self) -> Any:
        return self.check.encoder.tokenizer

    def check_kinds(self, kinds: set[str]) -> None:
        """Raise InputError where requests of these kinds cannot be answered at all."""
        scored = sorted(kinds - {"generate_until"})
        if scored and not self.is_exact and self.process is None:
            raise InputError(
                f"sampler {self.config.sampler.name!r}: {', '.join(scored)} needs the noise "
                "process of the model, which only checkpoints of tokendiff record; give tasks that "
                "generate text, or sampler 'ar' and a model that reads from left to right"
            )

    def pairs(self, request: TaskRequest) -> list[TokenPair]:
        """What is scored for a request of log-likelihoods; a long text takes several windows.

        Raises:
            InputError: it cannot be served.
        """
        if request.kind == "loglikelihood_rolling":
            return self._windows(request)
        context, continuation = self._encode_pair(request.context, request.continuation)
        pair = TokenPair(context=context, continuation=continuation, noise_id=request.noise_id)
        self._check_pair(pair)
        return [pair]

    def writing(self, request: TaskRequest) -> tuple[GenerateConfig, RowCheck]:
        """How text is written for a request: as the sampler's section says, and as the task says
        where that leaves things open.

        Raises:
            InputError: sampler and task do not go together.
        """
        key = json.dumps(request.settings, sort_keys=True)
        if key not in self._writing:
            config = _with_settings(self.config, request.settings)
            self._writing[key] = config, make_check(self.checkpoint, config)
        return self._writing[key]

    def row(self, request: TaskRequest) -> GenerationRow:
        """What is continued for a request.

        Raises:
            InputError: it cannot be served.
        """
        _, check = self.writing(request)
        row = GenerationRow(id=request.noise_id, prompt=request.context or None)
        if isinstance(check, CompletionSetup):
            check.request(row)
            return row
        num_tokens, wanted = len(check.request(row)), request.settings["max_gen_toks"]
        if check.seq_len is not None and num_tokens + wanted > check.seq_len:
            raise InputError(
                f"its context of {num_tokens:,} tokens and {wanted:,} new ones exceed the "
                f"{check.seq_len:,} tokens of a sample"
            )
        return row

    def _check_pair(self, pair: TokenPair) -> None:
        if not pair.continuation:
            raise InputError("its continuation has no token of its own")
        if self._needs_context and not pair.context:
            raise InputError("it has no context, and the tokenizer no token that begins a text")
        num_tokens = len(pair.context) + len(pair.continuation)
        if self.process is not None:
            if self.process.mask_token_id in [*pair.context, *pair.continuation]:
                raise InputError("it holds the mask token")
            num_tokens += num_filling(pair, self.process)
        if self._max_tokens is not None and num_tokens > self._max_tokens:
            raise InputError(
                f"it has {num_tokens:,} tokens, and the model takes {self._max_tokens:,}"
            )

    @cached_property
    def _max_tokens(self) -> int | None:
        """How many tokens context and continuation may have together; None where nothing says."""
        if isinstance(self.check, CompletionSetup):
            longest = self.check.max_length
            # The last token is told, and is not read.
            return longest + 1 if longest is not None and self.is_exact else longest
        assert self.checkpoint is not None
        assert self.process is not None
        return longest_row(read_config(self.checkpoint)) or self.process.max_length

    @property
    def _needs_context(self) -> bool:
        """Whether a state before a token predicts it: the first token of a row has none."""
        return self.is_exact or (self.process is not None and self.process.predict == "next")

    @cached_property
    def _prefix(self) -> list[int]:
        """What stands before a text without a context, where the model needs a token there: EOS of
        our checkpoints, whose rows are texts that EOS ends; BOS of others, or EOS without BOS.
        """
        if not self._needs_context:
            return []
        if isinstance(self.check, CompletionSetup):
            start = self.check.start_token_id
        else:
            encoder = self.check.encoder
            bos = encoder.tokenizer.bos_token_id if encoder.keeps_prefix else None
            start = encoder.tokenizer.eos_token_id if bos is None else bos
        return [] if start is None else [start]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids, cut as lm-evaluation-harness cuts them: both texts are encoded as one, and
        spaces at the context's end belong to the continuation.
        """
        kept = context.rstrip()
        if not kept:
            ids = self._plain_ids(context + continuation)
            is_there = self._prefix != [] and ids[:1] == self._prefix
            return (ids[:1], ids[1:]) if is_there else (self._prefix, ids)
        given = self._ids(kept)
        return given, self._ids(context + continuation)[len(given) :]

    def _windows(self, request: TaskRequest) -> list[TokenPair]:
        """The text in pieces, each behind as much of the text before it as there is room for."""
        tokens = [*self._prefix, *self._ids(request.continuation)]
        begin, room = len(self._prefix), self._window
        pairs = []
        while begin < len(tokens):
            stop = min(begin + room - len(self._prefix), len(tokens))
            pair = TokenPair(
                context=tokens[max(0, stop - room) : begin],
                continuation=tokens[begin:stop],
                noise_id=(request.noise_id + begin) % _MAX_NOISE_ID,
            )
            self._check_pair(pair)
            pairs.append(pair)
            begin = stop
        return pairs

    @cached_property
    def _window(self) -> int:
        """Tokens of a window, its context included."""
        if self.process is None:
            return self._max_tokens or _DEFAULT_WINDOW + 1
        fills = self.process.block_length is not None and self.process.attention_mask_mode == "4d"
        filling = (self.process.block_length or 1) - 1 if fills else 0
        return max(self.process.max_length - filling, len(self._prefix) + 1)

    def _ids(self, text: str) -> list[int]:
        """With what the tokenizer puts in front, unless the text begins with it."""
        bos = self.tokenizer.bos_token
        return self._plain_ids(text) if bos and text.startswith(bos) else self.check.encoder(text)

    def _plain_ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def drawn_as_asked(section: Any, settings: Mapping[str, Any]) -> Any:
    """A sampler's section with a task's temperature, top_k and top_p where it leaves them open.

    Raises:
        InputError: section and task do not go together.
    """
    given = section.model_dump(include=section.model_fields_set)
    asked = {"temperature": settings["temperature"]}
    if given.get("temperature", asked["temperature"]) > 0.0:
        asked |= {name: settings[name] for name in ("top_k", "top_p") if name in settings}
    return _filled(section, asked)


def _with_settings(config: GenerateConfig, settings: dict[str, Any]) -> GenerateConfig:
    length = settings["max_gen_toks"]
    lengths = {"max_new_tokens": length, "gen_length": length}
    section = _filled(config.sampler, {} if config.seq_len is not None else lengths)
    return config.model_copy(update={"sampler": drawn_as_asked(section, settings)})


def _filled(section: Any, asked: Mapping[str, Any]) -> Any:
    """A section with what is asked for in the fields that it has and leaves open."""
    given = section.model_dump(include=section.model_fields_set)
    known = {name: value for name, value in asked.items() if name in type(section).model_fields}
    try:
        return type(section).model_validate({**known, **given, "name": section.name})
    except ValidationError as error:
        problems = "; ".join(str(problem["msg"]) for problem in error.errors())
        raise InputError(
            f"sampler {section.name!r} with what the task asks for: {problems}"
        ) from error
