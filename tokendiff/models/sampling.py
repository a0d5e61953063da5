"""A checkpoint ready to sample, in the process that calls it: what a generation actor, or a
notebook, holds. Samples here have one length; `tokendiff.models.completion` continues prompts.
"""

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.data.prompts import GenerationRow, PromptEncoder, check_new_id, prompt_text
from tokendiff.data.samples import num_new_tokens
from tokendiff.diffusion.interfaces import Figures, OnProgress, StepCallback, unwatched
from tokendiff.diffusion.random import RowGenerator
from tokendiff.diffusion.splitmix import key_from
from tokendiff.errors import InputError
from tokendiff.models.cuda_graphs import Recorder
from tokendiff.models.denoiser import check_windows
from tokendiff.models.layers import round_for_autocast
from tokendiff.models.sources import DenoiserSource
from tokendiff.samplers.ancestral import AncestralSampler
from tokendiff.samplers.base import Sampler
from tokendiff.samplers.batch import prefix_batch
from tokendiff.samplers.blockwise import BlockwiseSampler
from tokendiff.samplers.continuous import ContinuousSampler, FilledRow, RowToFill
from tokendiff.samplers.corrector import check_correctable
from tokendiff.samplers.first_hitting import FirstHittingSampler
from tokendiff.samplers.remasking import RemaskingSampler

if TYPE_CHECKING:
    from tokendiff.config.generate import GenerateConfig
    from tokendiff.config.samplers import FixedLengthSamplerConfig


# The closed table behind `sampler: NAME`, of those that fill in rows of one length; a sampler's
# fields are those of its config.
SAMPLERS: dict[str, type[Sampler]] = {
    "ancestral": AncestralSampler,
    "blockwise": BlockwiseSampler,
    "remdm": RemaskingSampler,
    "first_hitting": FirstHittingSampler,
}


def build_sampler(
    config: "FixedLengthSamplerConfig",
    process: NoiseProcess,
    *,
    seq_len: int | None = None,
    stop_token_ids: tuple[int, ...] = (),
) -> Sampler:
    """The sampler that a config asks for, of a checkpoint's process.

    Args:
        seq_len: tokens of a sample; by default the trained max_length.
        stop_token_ids: of a sampler of answers.

    Raises:
        InputError: the process does not go with the sampler, a block is longer than a sample, or
            the sampler refuses a setting.
    """
    seq_len = seq_len or process.max_length
    fields = config.model_dump(exclude={"name"})
    is_of_answers = fields.pop("max_new_tokens", None) is not None
    fields.pop("stop_token_ids", None)
    if is_of_answers:
        fields |= {"begins_at_answer": True, "stop_token_ids": stop_token_ids}
    elif fields.get("block_size", 1) > seq_len:
        raise InputError(
            f"sampler block_size {fields['block_size']} must not exceed seq_len {seq_len}; lower it"
        )
    if process.block_length is not None:
        is_masking = process.forward_process == "absorbing"
        fitting = "'block_refinement' or 'sdar'" if is_masking else "'canvas'"
        raise InputError(
            f"sampler {config.name!r} does not go with this checkpoint of objective "
            f"{process.objective!r}, which decodes block by block; use sampler {fitting}"
        )
    if config.guidance_scale != 1.0 and process.forward_process == "uniform":
        raise InputError(
            f"guidance_scale {config.guidance_scale}: a checkpoint of forward_process 'uniform' "
            "was not trained on masks in place of a prompt; set guidance_scale to 1"
        )
    if fields.get("corrector_steps"):
        try:
            check_correctable(process.kernel())
        except ValueError as error:
            raise InputError(
                f"sampler {config.name!r} of a checkpoint of forward_process "
                f"{process.forward_process!r}: {error}; set corrector_steps to 0"
            ) from error
    try:
        return SAMPLERS[config.name](
            kernel=process.kernel(), prediction=process.prediction, **fields
        )
    except ValueError as error:
        if process.forward_process == "absorbing":  # which every sampler goes with
            raise InputError(f"sampler {config.name!r}: {error}; change its settings") from error
        raise InputError(
            f"sampler {config.name!r} does not go with this checkpoint, whose forward_process is "
            f"{process.forward_process!r}: {error}; use sampler 'ancestral', or a "
            "checkpoint of forward_process 'absorbing'"
        ) from error


@dataclass(frozen=True, kw_only=True)
class PromptCheck:
    """What of a row can be known without a model's weights.

    Attributes:
        seq_len: tokens of a row; None where each is a prompt and its answer.
        max_new_tokens: of those, tokens of an answer at most.
        max_length: tokens that the model takes; None where its config does not say.
        notes: what a person should know before samples are drawn.
    """

    source: DenoiserSource
    seq_len: int | None
    encoder: PromptEncoder
    max_new_tokens: int = 0
    max_length: int | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, checkpoint: Path | None, config: "GenerateConfig") -> "PromptCheck":
        """The check for an opened checkpoint; if that is None, for the model of the config.

        Raises:
            InputError: process, model, sampler and lengths do not go together.
        """
        return cls.of_source(DenoiserSource.of(config, checkpoint), config)

    @classmethod
    def of_source(cls, source: DenoiserSource, config: "GenerateConfig") -> "PromptCheck":
        """As `of`, for what rows are sampled from."""
        process, longest = source.process, source.max_length
        encoder = prompt_encoder(source, config)
        if config.max_new_tokens is not None:
            _sampler_of(config, source)
            return cls(
                source=source,
                seq_len=None,
                encoder=encoder,
                max_new_tokens=config.max_new_tokens,
                max_length=longest,
            )
        seq_len = config.seq_len or process.max_length
        if config.seq_len is not None and longest is not None and seq_len > longest:
            raise InputError(
                f"seq_len {seq_len}: the model has positions for {longest} tokens; lower seq_len"
            )
        _sampler_of(config, source)
        notes: tuple[str, ...] = ()
        if source.checkpoint is not None and seq_len > process.max_length:
            notes = (
                f"seq_len {seq_len} is longer than the {process.max_length} tokens of the rows "
                "that the checkpoint was trained on; text behind them may be worse",
            )
        return cls(source=source, seq_len=seq_len, encoder=encoder, notes=notes)

    def request(self, row: GenerationRow) -> list[int]:
        """Token ids that the row begins with: see `DenoiserSource.begun`.

        Raises:
            InputError: the prompt cannot be used.
        """
        ids = self.source.begun(self.encoder(row.prompt))
        shown = f"prompt {(prompt_text(row.prompt) or '')[:60]!r}"
        if self.seq_len is not None:
            if len(ids) > self.seq_len:
                raise InputError(
                    f"{shown} has {len(ids)} tokens; it must fit seq_len {self.seq_len}"
                )
            return ids
        if self.encoder.tokenizer.mask_token_id in ids:
            raise InputError(
                f"{shown} holds the mask token {self.encoder.tokenizer.mask_token!r}; gaps are "
                "filled in rows of one length: give seq_len in place of max_new_tokens"
            )
        if self.max_length is not None and len(ids) + self.max_new_tokens > self.max_length:
            raise InputError(
                f"{shown} has {len(ids):,} tokens; with {self.max_new_tokens:,} new ones that "
                f"exceeds the {self.max_length:,} that the model takes; shorten the prompt, or "
                "lower max_new_tokens"
            )
        return ids


class SamplingModel:
    """A checkpoint, or the published model that the config names, ready to sample rows of one
    length: what one actor holds.

    Raises:
        InputError: process, model, sampler and lengths do not go together; of the methods that take
            rows: a prompt cannot be used.
    """

    def __init__(self, checkpoint: Path | None, config: "GenerateConfig", *, device: str) -> None:
        _check_fixed_length(config)
        source = DenoiserSource.of(config, checkpoint)
        self.tokenizer, self.process, self._source = source.tokenizer, source.process, source
        self._take_sampler(config)
        dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
        self._device = torch.device(device)
        denoiser = source.load(dtype=dtype)
        # On a CPU a large head is faster in float32 (`models.denoiser`).
        if dtype == torch.bfloat16 and self._device.type != "cpu":
            round_for_autocast(denoiser)
        self._denoiser = denoiser.to(device)
        self._denoiser.replay_by(Recorder.on(self._device))

    def with_sampler(self, config: "GenerateConfig") -> "SamplingModel":
        """The same weights with the sampler, the lengths and the seed of another config.

        Raises:
            InputError: the sampler does not go with the model.
        """
        other = copy.copy(self)
        other._take_sampler(config)
        return other

    def _take_sampler(self, config: "GenerateConfig") -> None:
        self._config = config
        self._check = PromptCheck.of_source(self._source, config)
        self.seq_len = config.seq_len or self.process.max_length
        self._sampler = _sampler_of(config, self._source)
        self._stops = getattr(self._sampler, "stop_token_ids", ())

    def num_tokens(self, row: GenerationRow) -> int:
        """Tokens that the row takes up, its prompt included."""
        if self._config.max_new_tokens is None:
            return self.seq_len
        return len(self._check.request(row)) + self._config.max_new_tokens

    def samples(
        self, rows: Iterable[GenerationRow], *, on_progress: OnProgress = unwatched
    ) -> Iterator[dict[str, Any]]:
        """One record per row, as `sample`, in the order of the rows.

        Rows are sampled a batch after the other; where a sampler's rows end at different times,
        `batch_size` rows are in flight, a row that is done leaves its place to the next one, and
        its seconds are those from taking it to its end.
        """
        if isinstance(self._sampler, ContinuousSampler):
            yield from self._in_flight(self._sampler, rows, on_progress=on_progress)
            return
        waiting = iter(rows)
        num_rows = num_tokens = 0
        while batch := list(islice(waiting, self._config.batch_size)):
            records = self.sample(batch, on_progress=_behind(num_rows, num_tokens, on_progress))
            num_rows += len(records)
            num_tokens += sum(map(num_new_tokens, records))
            yield from records

    def _in_flight(
        self, sampler: ContinuousSampler, rows: Iterable[GenerationRow], *, on_progress: OnProgress
    ) -> Iterator[dict[str, Any]]:
        taken: dict[int, tuple[GenerationRow, list[int], float]] = {}  # by id, in their order
        ready: dict[int, dict[str, Any]] = {}
        done = [0, 0]  # rows, tokens

        def requests() -> Iterator[RowToFill]:
            for row in rows:
                prompt = self._check.request(row)
                check_new_id(row, taken)
                taken[row.id] = (row, prompt, time.perf_counter())
                tokens, is_given, _ = self._laid_out([prompt])
                yield RowToFill(id=row.id, tokens=tokens[0], is_given=is_given[0])

        stream = sampler.stream(
            self._denoiser,
            requests(),
            key=key_from(self._config.seed, "sample"),
            num_slots=self._config.batch_size,
            on_step=lambda figures: _behind(done[0], done[1], on_progress)(figures),
        )
        while finished := self._next_of(stream):
            for filled in finished:
                row, prompt, start = taken[filled.id]
                record = self._record(row, prompt, filled.tokens, filled.num_model_calls)
                ready[filled.id] = {**record, "seconds": round(time.perf_counter() - start, 3)}
                done[0] += 1
                done[1] += num_new_tokens(record)
            on_progress(lambda: (done[0], done[1]))
            while taken and (first := next(iter(taken))) in ready:
                del taken[first]
                yield ready.pop(first)

    def _next_of(self, stream: Iterator[list[FilledRow]]) -> list[FilledRow] | None:
        """What a round finished, None at the end. Autocast must not outlast the call."""
        is_bf16 = self._config.mixed_precision == "bf16"
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=is_bf16):
            return next(stream, None)

    def sample(
        self,
        rows: list[GenerationRow],
        *,
        on_step: StepCallback | None = None,
        on_progress: OnProgress = unwatched,
    ) -> list[dict[str, Any]]:
        """One record per row, as a part file holds it; the rows are sampled together.

        Args:
            on_progress: every row counts with the share of its steps that are taken.

        Returns:
            id; prompt; num_prompt_tokens; gaps (places in the prompt that were filled); tokens and
            text (prompt included); completion (the text behind the prompt); finish_reason ("stop"
            at a stop token, else "length"); num_model_calls; tokens_per_forward (tokens that were
            not given over model calls; null without one); and seconds: what the row's batch took.
        """
        if not rows:
            return []
        start = time.perf_counter()
        prompts = [self._check.request(row) for row in rows]
        tokens, is_given, is_valid = self._laid_out(prompts)
        ids = torch.tensor([row.id for row in rows], dtype=torch.int64)
        generator = RowGenerator.for_rows(key_from(self._config.seed, "sample"), ids)
        is_bf16 = self._config.mixed_precision == "bf16"
        num_open = (~is_given & is_valid).sum(1).tolist()
        watch = _StepWatch(
            num_steps=self._sampler.num_steps(is_given | ~is_valid),
            num_rows=len(rows),
            num_tokens=sum(num_open),
            on_step=on_step,
            on_progress=on_progress,
        )
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=is_bf16):
            samples = self._sampler.sample(
                self._denoiser,
                tokens,
                is_given,
                generator,
                is_valid=None if bool(is_valid.all()) else is_valid,
                on_step=watch,
            )
        seconds = round(time.perf_counter() - start, 3)
        records = [
            {**self._record(row, prompt, sampled[:length], calls), "seconds": seconds}
            for row, prompt, sampled, length, calls in zip(
                rows,
                prompts,
                samples.tokens.tolist(),
                is_valid.sum(1).tolist(),
                samples.num_model_calls.tolist(),
                strict=True,
            )
        ]
        watch.finish(sum(map(num_new_tokens, records)))
        return records

    def _laid_out(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, is_given and is_valid [B, L] of a batch."""
        new = self._config.max_new_tokens
        longest = max(map(len, prompts))
        tokens, is_given = prefix_batch(
            prompts,
            seq_len=self.seq_len if new is None else longest + new,
            mask_token_id=self.process.mask_token_id,
        )
        is_valid = torch.ones_like(is_given)
        if new is not None:
            ends = torch.tensor([len(prompt) + new for prompt in prompts])
            is_valid = torch.arange(tokens.shape[1]) < ends[:, None]
        return tokens, is_given, is_valid

    def _record(
        self, row: GenerationRow, prompt: list[int], sampled: list[int], calls: int
    ) -> dict[str, Any]:
        mask, num_prompt = self.process.mask_token_id, len(prompt)
        gaps = [at for at, token in enumerate(prompt) if token == mask]
        behind = range(num_prompt, len(sampled))
        stop = next((at for at in behind if sampled[at] in self._stops), None)
        if stop is not None:
            sampled = sampled[: stop + 1]
        num_new = len(sampled) - num_prompt + len(gaps)
        return {
            "id": row.id,
            "prompt": prompt_text(row.prompt),
            "num_prompt_tokens": num_prompt,
            "gaps": gaps,
            "tokens": sampled,
            "text": self.tokenizer.decode(sampled, skip_special_tokens=True),
            "completion": self.tokenizer.decode(sampled[num_prompt:], skip_special_tokens=True),
            "finish_reason": "length" if stop is None else "stop",
            "num_model_calls": calls,
            "tokens_per_forward": num_new / calls if calls else None,
        }


@dataclass(kw_only=True)
class _StepWatch:
    """Counts the steps of a batch, and tells of them."""

    num_steps: int
    num_rows: int
    num_tokens: int
    on_step: StepCallback | None
    on_progress: OnProgress
    _taken: int = -1  # the first call shows what the steps begin with

    def __call__(self, time: float, x_t: Tensor) -> None:
        self._taken += 1
        if self.on_step is not None:
            self.on_step(time, x_t)
        self.on_progress(self._figures)

    def finish(self, num_tokens: int) -> None:
        """Tell of the whole batch where it took fewer steps than it might have."""
        if self._taken < self.num_steps:
            self.on_progress(lambda: (self.num_rows, num_tokens))

    def _figures(self) -> Figures:
        share = self._taken / max(self.num_steps, 1)
        return share * self.num_rows, share * self.num_tokens


def _behind(num_rows: int, num_tokens: int, on_progress: OnProgress) -> OnProgress:
    """Told of a batch, it counts in what was done before it."""

    def tell(figures: Callable[[], Figures]) -> None:
        def of_all() -> Figures:
            rows, tokens = figures()
            return num_rows + rows, num_tokens + tokens

        on_progress(of_all)

    return tell


def _check_fixed_length(config: "GenerateConfig") -> None:
    """Raise InputError where a config asks for a sampler that continues prompts."""
    if config.is_open_ended:
        raise InputError(
            f"sampler {config.sampler.name!r} continues prompts; open the model with "
            "CompletionModel of tokendiff.models.completion"
        )


def prompt_encoder(source: DenoiserSource, config: "GenerateConfig") -> PromptEncoder:
    return PromptEncoder(
        tokenizer=source.tokenizer,
        use_chat_template=config.use_chat_template,
        add_generation_prompt=config.add_generation_prompt,
        keeps_prefix=source.checkpoint is None,
        subject="the checkpoint" if source.checkpoint is not None else source.name,
    )


def _sampler_of(config: "GenerateConfig", source: DenoiserSource) -> Sampler:
    """The sampler that a config asks for, of what it samples from."""
    section = _fixed_length(config)
    if (cache := getattr(section, "cache", "none")) != "none":
        check_windows(source.config, origin=f"cache {cache!r}: {source.name}")
    listed = getattr(section, "stop_token_ids", ())
    stops = () if config.max_new_tokens is None else source.stop_tokens(listed)
    return build_sampler(section, source.process, seq_len=config.seq_len, stop_token_ids=stops)


def _fixed_length(config: "GenerateConfig") -> "FixedLengthSamplerConfig":
    assert not config.is_open_ended, "see CompletionModel"
    return cast("FixedLengthSamplerConfig", config.sampler)
