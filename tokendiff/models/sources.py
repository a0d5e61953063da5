"""The model behind samplers of one length: a checkpoint of ours, or a published denoiser of whole
rows by its name. Tokenizer, noise process and config are known before a weight is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.data.tokenizers import open_tokenizer
from tokendiff.errors import InputError
from tokendiff.models.checkpoints import check_denoiser, load_for_inference
from tokendiff.models.decoding import find_mask_token, find_stop_tokens
from tokendiff.models.families import FAMILIES, WHOLE_ROW_TYPES, Family, family_of, published_type
from tokendiff.models.opening import load_denoiser
from tokendiff.models.plans import plan_model
from tokendiff.models.pretrained import longest_input, open_config

if TYPE_CHECKING:
    from tokendiff.config.generate import GenerateConfig

_FIELD = "model_id"
_REMEDY = "give the hub name or the folder of a published denoiser, or a checkpoint_path"


@dataclass(frozen=True, kw_only=True)
class DenoiserSource:
    """
    Attributes:
        name: a folder or a hub name.
        checkpoint: the folder of a checkpoint of ours; None of a published model.
        max_length: tokens that the model takes; None where its config does not say.
    """

    name: str
    checkpoint: Path | None
    tokenizer: Any
    process: NoiseProcess
    config: Any
    max_length: int | None

    @classmethod
    def of(cls, config: "GenerateConfig", checkpoint: Path | None) -> "DenoiserSource":
        """The source for an opened checkpoint; if that is None, for the model of the config.

        Raises:
            InputError: no such model, or one that is no denoiser of whole rows.
        """
        if checkpoint is None:
            assert config.model_id is not None, "GenerateConfig asks for one of the two"
            return cls._published(config.model_id, sampler=config.sampler.name)
        tokenizer, process, model_config = check_denoiser(checkpoint)
        return cls(
            name=str(checkpoint),
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            process=process,
            config=model_config,
            max_length=longest_input(model_config),
        )

    @classmethod
    def _published(cls, name: str, *, sampler: str) -> "DenoiserSource":
        config = open_config(name, field=_FIELD, remedy=_REMEDY)
        family = family_of(published_type(config))
        if family.attention != "rows":
            raise InputError(
                f"sampler {sampler!r}: {_FIELD} {name!r} is of type {published_type(config)!r}, "
                f"and published denoisers of whole rows are {', '.join(WHOLE_ROW_TYPES)}; "
                + _way_out(config)
            )
        tokenizer = _with_mask(open_tokenizer(name, field=_FIELD), config, family, name)
        if not tokenizer.chat_template:
            tokenizer.chat_template = family.chat_template
        longest = longest_input(config)
        process = NoiseProcess(
            forward_process="absorbing",
            vocab_size=len(tokenizer),
            mask_token_id=tokenizer.mask_token_id,
            max_length=longest or 1,
            predict=family.predict,
        )
        plan = plan_model(name, tokenizer=tokenizer, max_length=1, is_causal=False, field=_FIELD)
        return cls(
            name=name,
            checkpoint=None,
            tokenizer=tokenizer,
            process=process,
            config=plan.config,
            max_length=longest,
        )

    def begun(self, ids: list[int]) -> list[int]:
        """A row's prompt, with a token in front that begins a text where the row has no first token
        and the model's states tell the next one: no state was trained to tell the first.

        Training, and the bound, take the first token as given. Rows of ours follow an EOS; others'
        models are used to what their tokenizer puts in front of a text.

        Raises:
            InputError: the row needs such a token, and the tokenizer has none.
        """
        is_told = bool(ids) and ids[0] != self.process.mask_token_id
        if self.process.predict == "own" or is_told:
            return ids
        starts = [self.tokenizer.eos_token_id]
        if self.checkpoint is None:
            starts.insert(0, self.tokenizer.bos_token_id)
        start = next((index for index in starts if index is not None), None)
        if start is None:
            raise InputError(
                f"{self.name} predicts each token from the position before it, but this row has no "
                "first token, and the tokenizer has no BOS or EOS to put there; give a prompt"
            )
        return [start, *ids]

    def stop_tokens(self, listed: Sequence[int]) -> tuple[int, ...]:
        """Ids that end an answer: those that are listed, the tokenizer's EOS, those of the model's
        generation config, and what its family ends answers with.

        Raises:
            InputError: an id that the tokenizer does not have.
        """
        for index in listed:
            if not 0 <= index < len(self.tokenizer):
                raise InputError(
                    f"stop_token_ids {index}: the tokenizer of {self.name} has ids below "
                    f"{len(self.tokenizer)}"
                )
        vocabulary = self.tokenizer.get_vocab()
        known = family_of(published_type(self.config)).stop_tokens
        of_family = [vocabulary[token] for token in known if token in vocabulary]
        found = find_stop_tokens(self.name, self.config, self.tokenizer)
        return tuple(sorted({*listed, *of_family, *found}))

    def load(self, *, dtype: torch.dtype = torch.float32) -> Any:
        """The denoiser on the CPU in eval mode.

        Args:
            dtype: of the weights of a published model; a checkpoint of ours is float32.
        """
        if self.checkpoint is not None:
            return load_for_inference(self.checkpoint)[0]
        return load_denoiser(
            self.name,
            tokenizer=self.tokenizer,
            max_length=1,
            dropout=0.0,
            allow_new_weights=False,
            field=_FIELD,
            dtype=dtype,
        ).eval()


def _way_out(config: Any) -> str:
    """What to give in place of a published model that is no denoiser of whole rows."""
    model_type = published_type(config)
    if model_type in FAMILIES and getattr(config, "is_causal", True):
        sampler = FAMILIES[model_type].sampler
        return f"use sampler {sampler!r}, which goes with this one, or another model"
    return "give a checkpoint_path, whose noise process is known, or another model"


def _with_mask(tokenizer: Any, config: Any, family: Family, name: str) -> Any:
    """A tokenizer whose mask token is that of the model."""
    mask = find_mask_token(config, tokenizer)
    mask = family.mask_token_id if mask is None else mask
    if mask is None or not 0 <= mask < len(tokenizer):
        raise InputError(
            f"{_FIELD} {name!r}: its mask token has id {mask}, but its tokenizer has only ids "
            f"below {len(tokenizer)}; give a model with the tokenizer that it was trained with"
        )
    if tokenizer.mask_token_id != mask:
        tokenizer.add_special_tokens({"mask_token": tokenizer.convert_ids_to_tokens(mask)})
    return tokenizer
