"""A causal model ready to continue prompts, in the process that calls it: the open-ended half of
what a generation actor, or a notebook, holds.
"""

import copy
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tokendiff.artifacts.checkpoint import DRAFT_ADAPTERS
from tokendiff.artifacts.model_folders import SCHEDULER_CONFIG, is_plain_causal, local_model
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.data.prompts import (
    GenerationRow,
    Prompt,
    PromptEncoder,
    check_new_id,
    prompt_text,
)
from tokendiff.data.samples import num_new_tokens
from tokendiff.diffusion.interfaces import (
    Completion,
    Decoder,
    Figures,
    OnProgress,
    Request,
    unwatched,
)
from tokendiff.diffusion.splitmix import key_from
from tokendiff.errors import InputError
from tokendiff.models.causal import CausalModel
from tokendiff.models.checkpoints import take_average
from tokendiff.models.cuda_graphs import Recorder
from tokendiff.models.decoding import (
    check_decoder,
    find_mask_token,
    find_stop_tokens,
    open_causal_config,
    open_decoder,
)
from tokendiff.models.dflash.decoder import DraftedModel, check_drafted
from tokendiff.models.dflash.planning import load_draft
from tokendiff.models.diffusion_gemma import uniform_noise
from tokendiff.models.families import family_of, published_type
from tokendiff.models.kept_base import open_draft_adapters
from tokendiff.models.pretrained import longest_input
from tokendiff.samplers.autoregressive import AutoregressiveSampler
from tokendiff.samplers.block_refinement import BlockRefinementSampler
from tokendiff.samplers.canvas import CanvasSampler
from tokendiff.samplers.dflash import DFlashSampler
from tokendiff.samplers.open_ended import OpenEndedSampler
from tokendiff.samplers.sdar import SDARSampler
from tokendiff.samplers.self_speculation import SelfSpeculationSampler
from tokendiff.samplers.speculation import GAINS, SpeculativeSampler

if TYPE_CHECKING:
    from tokendiff.config.generate import GenerateConfig

# The closed table behind `sampler: NAME`, of those that continue a prompt; see also
# tokendiff.models.sampling.
OPEN_ENDED_SAMPLERS: dict[str, type[OpenEndedSampler]] = {
    "ar": AutoregressiveSampler,
    "block_refinement": BlockRefinementSampler,
    "canvas": CanvasSampler,
    "dflash": DFlashSampler,
    "sdar": SDARSampler,
    "self_speculation": SelfSpeculationSampler,
}
# Samplers that write what a model says from left to right.
READ_BY_TOKEN = ("ar", "self_speculation")
_WARM_UP_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class CompletionSetup:
    """All that can be known, and go wrong, without a model's weights.

    Attributes:
        name: a folder or a hub name.
        field: of the config, that it comes from.
        max_length: tokens that the model takes; None where its config does not say.
        num_embeddings: ids that the model takes; None where its config does not say.
        start_token_id: what a row begins with that has no prompt.
        block_start: see `NoiseProcess`.
    """

    name: str
    field: str
    tokenizer: Any
    encoder: PromptEncoder
    sampler: OpenEndedSampler
    max_length: int | None
    num_embeddings: int | None
    start_token_id: int | None
    block_start: str | None = None

    @classmethod
    def of(cls, config: "GenerateConfig", checkpoint: Path | None) -> "CompletionSetup":
        """The setup that a config asks for, for an opened checkpoint; if that is None, for the
        model that the config names.

        Raises:
            InputError: no such model, or one that the sampler does not go with.
        """
        if not config.is_open_ended:
            raise InputError(
                f"sampler {config.sampler.name!r} fills rows; open the model with SamplingModel of "
                "tokendiff.models.sampling"
            )
        field, name = "model_id", config.model_id
        if checkpoint is not None:
            field, name = "checkpoint_path", str(checkpoint)
        if config.sampler.name == "dflash":
            field, name = "target_model_id", check_drafted(config)
        assert name is not None, "GenerateConfig asks for one of the two"
        model_config, tokenizer = open_causal_config(
            name, field=field, trust_remote_code=config.trust_remote_code
        )
        process = None
        if checkpoint is not None and (checkpoint / SCHEDULER_CONFIG).is_file():
            process = NoiseProcess.load(checkpoint)
            _check_process(config.sampler.name, name, process)
        elif (family := family_of(published_type(model_config))).attention in ("canvas", "rows"):
            if config.sampler.name != family.sampler:
                what = "whole rows" if family.attention == "rows" else "canvases of random tokens"
                raise InputError(
                    f"sampler {config.sampler.name!r}: {field} {name!r} is of type "
                    f"{published_type(model_config)!r}, a denoiser of {what}; use sampler "
                    f"{family.sampler!r}"
                )
        elif config.sampler.name == "self_speculation":
            raise InputError(
                f"sampler 'self_speculation': {name} is no checkpoint of objective block_diffusion "
                "with ar_loss_weight or keep_base, which alone draft for themselves; train one, or "
                "use sampler 'ar' or 'dflash'"
            )
        elif config.sampler.name == "canvas":
            raise InputError(
                f"sampler 'canvas': {name} is no checkpoint that was trained with uniform noise, "
                "which alone denoises random tokens; train one with objective block_diffusion and "
                "noise uniform, or use sampler 'ar', or 'sdar' if it was trained with masks"
            )
        check_decoder(model_config, name, field=field)
        # What we train on is text and EOS alone; others' models are used to what their tokenizer
        # puts in front.
        is_ours = checkpoint is not None and not is_plain_causal(checkpoint)
        starts = [None if is_ours else tokenizer.bos_token_id, tokenizer.eos_token_id]
        return cls(
            name=name,
            field=field,
            tokenizer=tokenizer,
            encoder=PromptEncoder(
                tokenizer=tokenizer,
                use_chat_template=config.use_chat_template,
                add_generation_prompt=config.add_generation_prompt,
                keeps_prefix=not is_ours,
                subject=name,
            ),
            sampler=_build_sampler(config, name, model_config, tokenizer, process),
            max_length=longest_input(model_config),
            num_embeddings=getattr(model_config.get_text_config(), "vocab_size", None),
            start_token_id=next((start for start in starts if start is not None), None),
            block_start=_block_start(model_config, process),
        )

    def request(self, row: GenerationRow) -> Request:
        """The row as the sampler takes it.

        Raises:
            InputError: a prompt that cannot be used.
        """
        ids = self.encoder(row.prompt)
        if not ids and self.start_token_id is not None:
            ids = [self.start_token_id]
        shown = f"prompt {(prompt_text(row.prompt) or '')[:60]!r}"
        if not ids:
            raise InputError(
                f"{shown}: nothing to continue, and the tokenizer has no token that begins a text; "
                "give a prompt"
            )
        names = ("mask_token_id", "never_token_id")
        masks = {getattr(self.sampler, name, None) for name in names} - {None}
        if (mask := next((index for index in ids if index in masks), None)) is not None:
            raise InputError(
                f"{shown} holds the mask token {self.tokenizer.convert_ids_to_tokens(mask)!r}; "
                "samplers that continue a prompt fill no gaps in it"
            )
        if self.num_embeddings is not None and (highest := max(ids)) >= self.num_embeddings:
            raise InputError(
                f"{shown} holds the token {self.tokenizer.convert_ids_to_tokens(highest)!r} (id "
                f"{highest}), but {self.name} has embeddings for ids below {self.num_embeddings} "
                "only; leave that token out"
            )
        request = Request(
            id=row.id, prompt=tuple(ids), block_starts=self._block_starts(row.prompt, ids)
        )
        # Nothing is kept of what speculation drafts beyond the limit.
        is_by_blocks = not isinstance(self.sampler, SpeculativeSampler)
        block = getattr(self.sampler, "block_length", 1) if is_by_blocks else 1
        limit = len(ids) + self.sampler.max_new_tokens
        wanted = int(request.block_begins(block, limit)[-1]) + block
        if self.max_length is not None and wanted > self.max_length:
            blocks = f", in whole blocks of {block}," if block > 1 else ""
            raise InputError(
                f"{shown} has {len(ids):,} tokens; with {self.sampler.max_new_tokens:,} new ones"
                f"{blocks} that exceeds the {self.max_length:,} that the model takes; shorten the "
                "prompt, or lower the number of new tokens"
            )
        return request

    def _block_starts(self, prompt: Prompt | None, ids: list[int]) -> tuple[int, ...]:
        """Where training began to count blocks anew: at the edges of earlier answers, and at the
        prompt's end, unless the prompt ends inside an answer, which goes on in its blocks.
        """
        if self.block_start is None:
            return ()
        is_answer = np.zeros(len(ids), dtype=bool)
        if self.block_start == "answer" and isinstance(prompt, list):
            is_answer = self.encoder.answers_in(prompt, ids)
        starts = (np.flatnonzero(np.diff(is_answer)) + 1).tolist()
        return tuple(starts) if is_answer[-1] else (*starts, len(ids))


class CompletionModel:
    """A causal model and a sampler that continues prompts: what one actor holds."""

    def __init__(
        self, config: "GenerateConfig", *, checkpoint: Path | None = None, device: str = "cpu"
    ) -> None:
        self.setup = CompletionSetup.of(config, checkpoint)
        self.tokenizer = self.setup.tokenizer
        dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
        model: Any
        model, _ = open_decoder(
            self.setup.name,
            field=self.setup.field,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
        )
        if checkpoint is not None and (checkpoint / DRAFT_ADAPTERS).is_file():
            open_draft_adapters(model, checkpoint)
            model.to(dtype)
        elif checkpoint is not None:
            take_average(model.model, checkpoint)
        self._model: Decoder = model.to(device)
        if isinstance(model, CausalModel):
            model.replay_by(Recorder.on(torch.device(device)))
        self._target = self._model
        if config.draft_model_id is not None:
            draft: Any = load_draft(config.draft_model_id, dtype=dtype)
            take_average(draft, Path(local_model(config.draft_model_id)))
            draft.to(device)
            self._model = DraftedModel(model, draft)
        self._is_warm = False
        self._key, self._num_slots = key_from(config.seed, "sample"), config.batch_size

    def with_setup(self, setup: CompletionSetup) -> "CompletionModel":
        """The same weights with another sampler: a setup of the same model."""
        other = copy.copy(self)
        other.setup = setup
        return other

    def num_tokens(self, row: GenerationRow) -> int:
        """Tokens that the row takes up at most, its prompt included.

        Raises:
            InputError: the prompt cannot be used.
        """
        return len(self.setup.request(row).prompt) + self.setup.sampler.max_new_tokens

    def samples(
        self, rows: Iterable[GenerationRow], *, on_progress: OnProgress = unwatched
    ) -> Iterator[dict[str, Any]]:
        """One record per row, in the order in which they are finished; rows are taken as slots
        become free.

        Yields:
            as `SamplingModel.sample`; seconds are those from taking the row to its end. Beside a
            draft also blocks_by_gain, how many blocks came to 1, 2, ... tokens, and source, the
            file of the prompt.
        """
        taken: dict[int, tuple[GenerationRow, Request, float]] = {}

        def requests() -> Iterator[Request]:
            for row in rows:
                request = self.setup.request(row)
                check_new_id(row, taken)
                taken[row.id] = (row, request, time.perf_counter())
                yield request

        sampler, model = self.setup.sampler, self._model
        for completion in sampler.complete(
            model,
            requests(),
            key=self._key,
            num_slots=self._num_slots,
            on_progress=on_progress,
        ):
            yield self._record(completion, *taken.pop(completion.id))

    def sample(self, rows: list[GenerationRow]) -> list[dict[str, Any]]:
        """One record per row, in the order of the rows."""
        ids: set[int] = set()
        for row in rows:
            check_new_id(row, ids)
            ids.add(row.id)
        by_id = {record["id"]: record for record in self.samples(rows)}
        return [by_id[row.id] for row in rows]

    def traced(self, prompt: Sequence[int], *, on_step: Callable[[Tensor], None]) -> Completion:
        """Sample from token ids; `on_step` hears the row [1, T] after each step."""
        (completion,) = self.setup.sampler.complete(
            self._model,
            [Request(id=0, prompt=tuple(prompt))],
            key=self._key,
            num_slots=1,
            on_step=on_step,
        )
        return completion

    def measured(
        self,
        rows: list[GenerationRow],
        *,
        is_target_first: bool,
        on_progress: OnProgress = unwatched,
    ) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """As `samples` with a draft, and besides what the target alone takes for the same rows.

        Args:
            is_target_first: callers take turns, so that neither side has the quieter machine.
            on_progress: a row that one side has written counts half.

        Returns:
            records; and rows, new tokens and wall-clock seconds of both sides, and, where
            proposals are not drawn, the rows in which they wrote the same.
        """
        sampler = self.setup.sampler
        assert isinstance(sampler, SpeculativeSampler), "GenerateConfig sees to it"
        names = [field.name for field in dataclasses.fields(AutoregressiveSampler)]
        alone = AutoregressiveSampler(**{name: getattr(sampler, name) for name in names})
        requests = [self.setup.request(row) for row in rows]
        if not self._is_warm:  # what is done once in a process is not timed
            few = min(_WARM_UP_TOKENS, sampler.max_new_tokens)
            for side, model in ((alone, self._target), (sampler, self._model)):
                brief = dataclasses.replace(side, max_new_tokens=few)
                list(brief.complete(model, requests, key=self._key, num_slots=self._num_slots))
            self._is_warm = True
        records: list[dict[str, Any]] = []
        texts: dict[int, list[int]] = {}

        over: list[int] = []  # the tokens of a side that has written all rows

        def tell(figures: Callable[[], Figures]) -> None:
            def of_both() -> Figures:
                num_rows, num_tokens = figures()
                return (len(over) * len(rows) + num_rows) / 2, sum(over) + num_tokens

            on_progress(of_both)

        def draft() -> None:
            records.extend(self.samples(rows, on_progress=tell))
            over.append(sum(map(num_new_tokens, records)))

        def do_without() -> None:
            for completion in alone.complete(
                self._target,
                requests,
                key=self._key,
                num_slots=self._num_slots,
                on_progress=tell,
            ):
                texts[completion.id] = completion.tokens
            over.append(sum(map(len, texts.values())))

        sides = (do_without, draft) if is_target_first else (draft, do_without)
        seconds = {side: self._timed(side) for side in sides}
        written = {r["id"]: r["tokens"][r["num_prompt_tokens"] :] for r in records}
        same_rows = {}
        if sampler.proposal_temperature == 0.0:
            same = [written[index] == tokens for index, tokens in texts.items()]
            same_rows = {"same_rows": sum(same)}
        return records, {
            "rows": len(rows),
            "seconds": seconds[draft],
            "new_tokens": sum(map(len, written.values())),
            "seconds_alone": seconds[do_without],
            "new_tokens_alone": sum(map(len, texts.values())),
            **same_rows,
        }

    def _timed(self, work: Callable[[], None]) -> float:
        """Seconds, what the device was still doing before and after included."""
        device = self._model.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    def _record(
        self, completion: Completion, row: GenerationRow, request: Request, start: float
    ) -> dict[str, Any]:
        tokens = [*request.prompt, *completion.tokens]
        gains = completion.counts.get(GAINS)
        of_draft = {} if gains is None else {"blocks_by_gain": gains, "source": row.source}
        return {
            "id": row.id,
            "prompt": prompt_text(row.prompt),
            "num_prompt_tokens": len(request.prompt),
            "gaps": [],
            "tokens": tokens,
            "text": self.tokenizer.decode(tokens, skip_special_tokens=True),
            "completion": self.tokenizer.decode(completion.tokens, skip_special_tokens=True),
            "finish_reason": completion.finish_reason,
            "num_model_calls": completion.num_model_calls,
            "tokens_per_forward": len(completion.tokens) / completion.num_model_calls,
            **of_draft,
            "seconds": round(time.perf_counter() - start, 3),
        }


def _build_sampler(
    config: "GenerateConfig",
    name: str,
    model_config: Any,
    tokenizer: Any,
    process: NoiseProcess | None,
) -> OpenEndedSampler:
    section = config.sampler
    fields = section.model_dump(exclude={"name"})
    listed = fields.pop("stop_token_ids")
    for index in listed:
        if not 0 <= index < len(tokenizer):
            raise InputError(
                f"stop_token_ids {index}: the tokenizer of {name} has ids below {len(tokenizer)}"
            )
    # The model's config may name an id that is none of the tokenizer's, and is never written.
    own = find_stop_tokens(name, model_config, tokenizer)
    stops = {*listed, *(index for index in own if index < len(tokenizer))}
    if not fields.pop("eos_early_stop", True):
        stops = set()
    fields["stop_token_ids"] = tuple(sorted(stops))
    if "gen_length" in fields:
        fields["max_new_tokens"] = fields.pop("gen_length")
    if process is not None and not process.keeps_base and section.name in READ_BY_TOKEN:
        fields["never_token_id"] = process.mask_token_id
    if section.name == "canvas" and process is not None:
        fields |= {"kernel": process.kernel(), "prediction": process.prediction}
    if section.name == "canvas" and process is None:
        fields |= _canvas_fields(model_config, fields["block_length"])
    elif section.name not in ("ar", "dflash"):
        fields |= _block_fields(section.name, fields, name, model_config, tokenizer, process)
    given = {key: value for key, value in fields.items() if (key, value) != ("block_length", None)}
    try:
        return OPEN_ENDED_SAMPLERS[section.name](**given)
    except ValueError as error:
        raise InputError(f"sampler {section.name!r}: {error}") from error


def _block_start(model_config: Any, process: NoiseProcess | None) -> str | None:
    """See `NoiseProcess`. The first canvas of a published model stands behind its prompt."""
    if process is not None:
        return process.block_start
    is_canvas = family_of(published_type(model_config)).attention == "canvas"
    return "last_answer" if is_canvas else None


def _canvas_fields(model_config: Any, block_length: int | None) -> dict[str, Any]:
    """What sampler canvas takes from a published model."""
    kernel = uniform_noise(model_config.get_text_config().vocab_size)
    return {
        "kernel": kernel,
        "mask_token_id": kernel.mask_token_id,
        "prediction": family_of(published_type(model_config)).prediction,
        "block_length": block_length or model_config.canvas_length,
        "context_is_causal": True,
    }


def _check_process(sampler: str, name: str, process: NoiseProcess) -> None:
    if process.block_length is None:
        raise InputError(
            f"sampler {sampler!r}: {name} is a denoiser of whole rows (objective "
            f"{process.objective!r}); use sampler 'ancestral'"
        )
    fills_masks = sampler in ("block_refinement", "sdar", "self_speculation")
    if fills_masks and process.forward_process != "absorbing":
        raise InputError(
            f"sampler {sampler!r}: {name} was trained with {process.forward_process} noise, and "
            "knows no masks to fill in; use sampler 'canvas'"
        )
    if sampler == "canvas" and process.forward_process != "uniform":
        raise InputError(
            f"sampler 'canvas': {name} was trained with masks (objective {process.objective!r}), "
            "and knows no random tokens; use sampler 'sdar' or 'block_refinement', or train it "
            "with noise uniform"
        )
    if sampler == "ar" and not process.decodes_by_token:
        raise InputError(
            f"sampler 'ar': {name} predicts the token at its own position (objective "
            f"{process.objective!r}), not the next one; use sampler 'block_refinement' "
            "or 'sdar', or train it with ar_loss_weight or keep_base"
        )
    if sampler == "self_speculation" and not process.decodes_by_token:
        raise InputError(
            f"sampler 'self_speculation': {name} does not decode token by token (objective "
            f"{process.objective!r}); train it with ar_loss_weight or keep_base, or use sampler "
            "'sdar'"
        )
    mode = process.attention_mask_mode
    if sampler == "sdar" and mode != "4d":
        raise InputError(
            f"sampler 'sdar' needs a model whose blocks see themselves whole, and {name} was "
            f"trained with attention_mask_mode {mode!r}; use sampler 'block_refinement'"
        )


def _block_fields(
    section: str,
    fields: dict[str, Any],
    name: str,
    model_config: Any,
    tokenizer: Any,
    process: NoiseProcess | None,
) -> dict[str, Any]:
    """What a block sampler takes from the model where the config leaves it open."""
    mask = find_mask_token(model_config, tokenizer) if process is None else process.mask_token_id
    if mask is None:
        mask = family_of(published_type(model_config)).mask_token_id
    if mask is None:
        raise InputError(
            f"{name}: neither its config nor its tokenizer names a mask token, which block "
            "samplers fill in; give a model that was trained with one, or use sampler 'ar'"
        )
    if not 0 <= mask < len(tokenizer):
        raise InputError(
            f"{name}: its mask token has id {mask}, but its tokenizer has only ids below "
            f"{len(tokenizer)}; give a model with the tokenizer that it was trained with"
        )
    block_length = getattr(process or model_config, "block_length", None)
    found = {"mask_token_id": mask, "block_length": fields["block_length"] or block_length}
    if process is not None:
        found["predicts_next"] = process.predict == "next"
        if section != "canvas":
            found["keeps_base"] = process.keeps_base
        if "draft_temperature" not in fields:  # what judges is causal anyway
            found["context_is_causal"] = process.context_attention == "causal"
    if "attention_mask_mode" in fields:
        wanted = fields["attention_mask_mode"]
        trained = None if process is None else process.attention_mask_mode
        if trained is not None and wanted not in ("auto", trained):
            raise InputError(
                f"attention_mask_mode {wanted!r}: {name} was trained with {trained!r}; leave it at "
                "auto"
            )
        if wanted == "auto":
            found["attention_mask_mode"] = trained or _mode_of(model_config)
        # Published models fill their last block whole, and cut it.
        is_cut = process is None and _mode_of(model_config) == "4d"
        found["sees_tail"] = is_cut or (process is not None and process.block_start is not None)
    return found


def _mode_of(model_config: Any) -> str:
    return "4d" if family_of(published_type(model_config)).attention == "blocks" else "2d"
