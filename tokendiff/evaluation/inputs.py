"""What an evaluation is of, after a look at all that can be known without a cluster: the
checkpoint, its rows, its samples and the reference model go together.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokendiff.artifacts.checkpoint import find_checkpoint
from tokendiff.artifacts.identity import checkpoint_identity
from tokendiff.artifacts.locations import Location, location
from tokendiff.artifacts.manifest import fetch, load_manifest
from tokendiff.artifacts.model_folders import is_draft_folder, is_foreign
from tokendiff.artifacts.noise_process import NoiseProcess, objective_of
from tokendiff.config.generate import GenerateConfig
from tokendiff.data.rows import TokenData, check_rows_to_judge
from tokendiff.data.samples import verified
from tokendiff.errors import InputError
from tokendiff.evaluation.draft_acceptance import plan_of_checkpoint
from tokendiff.evaluation.reference import check_reference
from tokendiff.evaluation.tasks.setup import TaskSetup, default_sampler
from tokendiff.models.checkpoints import check_autoregressive, check_denoiser, load_tokenizer
from tokendiff.models.dflash.planning import check_rows
from tokendiff.models.families import family_of, published_type
from tokendiff.models.pretrained import check_weights

if TYPE_CHECKING:
    from tokendiff.config.evaluate import EvaluateConfig

KIND = "evaluation"


@dataclass(frozen=True, kw_only=True)
class EvaluationInputs:
    """The checkpoint and the data of an evaluation, opened.

    Attributes:
        source: where the checkpoint is; `checkpoint` is its folder on this machine.
        process: its noise process, if it has any.
        is_draft: whether it is a DFlash draft.
        data: the rows that it is judged on.
    """

    source: Location
    checkpoint: Path
    process: NoiseProcess | None
    is_draft: bool
    data: TokenData

    @classmethod
    def open(
        cls,
        config: "EvaluateConfig",
        *,
        checkpoint_path: str,
        data_path: str | Location | None,
        samples_path: str | Location | None,
        hashes: bool = True,
    ) -> "EvaluationInputs":
        """Open what the paths name.

        Args:
            data_path: None takes the rows that the checkpoint was trained on.
            hashes: False verifies presence and size of the checkpoint's files only.

        Raises:
            InputError: a path does not hold what it should, or they do not go together.
            CorruptFileError: a file is damaged.
        """
        source = find_checkpoint(checkpoint_path, hashes=hashes)
        checkpoint = fetch(source)
        plan, process, num_embeddings = None, None, sys.maxsize
        if is_draft_folder(checkpoint):
            plan = plan_of_checkpoint(checkpoint, config.target_model_id)
            check_weights(plan.target_model_id, field="target_model_id")
        elif config.target_model_id is not None:
            raise InputError(
                f"target_model_id {config.target_model_id!r} goes with a DFlash draft, which "
                f"checkpoint_path {checkpoint} is not; remove it"
            )
        elif objective_of(checkpoint) == "ar":
            num_embeddings = check_autoregressive(checkpoint)
        else:
            _, process, model_config = check_denoiser(checkpoint)
            _check_canvas(config, checkpoint, model_config)
        if config.verify and process is None:
            raise InputError(
                f"verify checks a noise process, but checkpoint_path {checkpoint} has none; remove "
                "verify"
            )
        if config.time_passes and (plan or (process and not process.decodes_by_token)):
            raise InputError(
                "time_passes is for a model that decodes token by token, and checkpoint_path "
                f"{checkpoint} does not; give a causal language model, say a draft's target"
            )
        data = TokenData.open(data_path or _trained_on(checkpoint), split=config.split)
        check_same_tokenizer(checkpoint, data)
        if (highest := data.highest_token() or 0) >= num_embeddings:
            raise InputError(
                f"data_path {data.folder} holds tokens up to id {highest}, and checkpoint_path "
                f"{checkpoint} has {num_embeddings} embeddings; preprocess with its own tokenizer, "
                "and leave tokens out of the text that it does not have"
            )
        check_rows_to_judge(data.folder, data.split)
        if config.tasks:
            if plan is not None:
                raise InputError(
                    f"tasks are answered by a model that writes text, and checkpoint_path "
                    f"{checkpoint} is a DFlash draft; give its target"
                )
            task_setup(config, checkpoint)
        if plan is not None:
            tokenizer = load_tokenizer(checkpoint)
            check_rows(data, plan.target, tokenizer, target_model_id=plan.target_model_id)
        if samples_path is not None:
            _check_samples(checkpoint, location(samples_path))
            if config.reference_model_name_or_path is not None:
                check_reference(config.reference_model_name_or_path)
        return cls(
            source=source,
            checkpoint=checkpoint,
            process=process,
            is_draft=plan is not None,
            data=data,
        )


def _check_canvas(config: "EvaluateConfig", checkpoint: Path, model_config: Any) -> None:
    """Raise InputError where an encoder with a decoder is asked for what is made for one model."""
    model_type = published_type(model_config)
    if config.time_passes and family_of(model_type).attention == "canvas":
        raise InputError(
            f"time_passes: checkpoint_path {checkpoint} is of type {model_type!r}, and it reads "
            "clean and noisy text in different passes; remove time_passes"
        )


def task_setup(config: "EvaluateConfig", checkpoint: Path) -> TaskSetup:
    """How an opened checkpoint answers the config's tasks.

    Raises:
        InputError: the sampler does not go with it.
    """
    sampler = config.sampler
    fields = {"name": default_sampler(checkpoint)}
    if sampler is not None:
        fields = {**sampler.model_dump(include=sampler.model_fields_set), "name": sampler.name}
    setup = TaskSetup.of(
        GenerateConfig.model_validate(
            {
                "sampler": fields,
                "batch_size": config.batch_size,
                "mixed_precision": config.mixed_precision,
                "seed": config.seed,
            }
        ),
        checkpoint,
    )
    if config.apply_chat_template and not setup.tokenizer.chat_template:
        raise InputError(
            f"apply_chat_template: the tokenizer of checkpoint {checkpoint} has no chat template; "
            "remove it"
        )
    return setup


def check_same_tokenizer(checkpoint: Path, data: TokenData) -> None:
    """Raise InputError where ids do not mean the same to the checkpoint and to the data."""
    name = "tokenizer.json"
    ours, theirs = checkpoint / name, data.tokenizer_path / name
    if ours.is_file() and theirs.is_file():
        vocabularies = [
            json.loads(path.read_text())["model"].get("vocab") for path in (ours, theirs)
        ]
        if vocabularies[0] != vocabularies[1]:
            raise InputError(
                f"data_path {data.folder} was made with another tokenizer than checkpoint "
                f"{checkpoint}; "
                "preprocess the text with the checkpoint's tokenizer (tokenizer_name_or_path)"
            )


def _trained_on(checkpoint: Path) -> str:
    if is_foreign(checkpoint):
        raise InputError(
            f"checkpoint_path {checkpoint} does not say what it was trained on; give data_path, "
            "a folder that jobs.preprocess wrote with its tokenizer"
        )
    return str(load_manifest(checkpoint).metadata["data_path"])


def _check_samples(checkpoint: Path, folder: Location) -> None:
    """Raise InputError where a folder does not hold samples of the checkpoint; none is read."""
    metadata = verified(folder, hashes=False).metadata
    if metadata["checkpoint_files"] != checkpoint_identity(checkpoint):
        raise InputError(
            f"samples_path {folder} holds samples of {metadata['checkpoint']}, not of "
            f"{checkpoint}; sample from the checkpoint that is evaluated"
        )
