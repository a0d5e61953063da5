"""What says of rows, before a weight is read, whether they can be sampled."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tokendiff.artifacts.checkpoint import open_checkpoint
from tokendiff.data.prompts import GenerationRow, Prompt, prompt_text
from tokendiff.errors import InputError
from tokendiff.models.completion import CompletionSetup
from tokendiff.models.pretrained import check_weights
from tokendiff.models.sampling import PromptCheck

if TYPE_CHECKING:
    from tokendiff.config.generate import GenerateConfig

RowCheck = PromptCheck | CompletionSetup  # by their `request`


def make_check(checkpoint: Path | None, config: "GenerateConfig") -> RowCheck:
    """What says of a row whether it can be sampled.

    Raises:
        InputError: sampler, model and lengths do not go together.
    """
    if config.is_open_ended:
        return CompletionSetup.of(config, checkpoint)
    return PromptCheck.of(checkpoint, config)


def check_given(prompts: Iterable[Prompt | None], check: RowCheck) -> None:
    """Raise InputError where a prompt of the command line cannot be used: they are few, and typed
    by someone who waits.
    """
    for number, prompt in enumerate(prompts):
        check.request(GenerationRow(id=number, prompt=prompt))


def blank_note(prompts: Iterable[Prompt | None], check: RowCheck) -> str | None:
    """What to say of prompts that end in a blank which the tokenizer joins to the next word."""
    for prompt in prompts:
        with suppress(InputError):  # which is said where the prompt is sampled
            if check.encoder.loses_blank(prompt):
                return (
                    f"prompt {(prompt_text(prompt) or '')[:60]!r} ends in a blank, as it is or as "
                    "the chat template writes it out; the tokenizer joins a blank to the word "
                    "behind it, so the model knows no text that goes on from there: end the "
                    "prompt, or the template's request for an answer, without it"
                )
    return None


def check_source(config: "GenerateConfig", checkpoint_path: str | None) -> None:
    """Raise InputError where a config does not name one model to sample from."""
    model_id = config.target_model_id or config.model_id
    if (checkpoint_path is None) == (model_id is None):
        raise InputError("give either a checkpoint_path or a model_id to sample from")


def check_generation(config: "GenerateConfig", *, checkpoint_path: str | None) -> None:
    """What can go wrong with a generation and needs no cluster to be known: all that the config,
    the model's config and tokenizer, and the prompts of the command line tell.

    Raises:
        InputError: it cannot be done.
        CorruptFileError: a file of the checkpoint is missing or cut short.
    """
    check_source(config, checkpoint_path)
    folder = None if checkpoint_path is None else open_checkpoint(checkpoint_path, hashes=False)
    check = make_check(folder, config)
    for field in ("model_id", "target_model_id", "draft_model_id"):
        if (name := getattr(config, field)) is not None:
            check_weights(name, field=field)
    check_given(config.prompt or ([] if config.prompts else [None]), check)
