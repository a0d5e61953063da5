"""What hidden states a draft is trained on, and computing them for rows of token shards."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tokendiff.artifacts.identity import model_identity
from tokendiff.data.target_states import REMEDY, StatesOf, TargetStates
from tokendiff.diffusion.attention_masks import positions_in_document
from tokendiff.errors import InputError
from tokendiff.models.builtin import BUILTIN_PREFIX, BUILTIN_SIZES, check_builtin, is_builtin
from tokendiff.models.dflash.planning import DraftPlan, open_draft_config, open_target_config
from tokendiff.models.dflash.trainee import DraftTrainee, load_trainee

if TYPE_CHECKING:
    from tokendiff.config.train import TrainConfig
    from tokendiff.data.rows import TokenData, TokenRows


def states_wanted(config: "TrainConfig", plan: DraftPlan, data: "TokenData") -> StatesOf:
    """What hidden states a run on these rows computes, or reads where they are there."""
    return StatesOf(
        target=str(model_identity(plan.target_model_id)),
        layers=list(plan.draft.target_layer_ids),
        mixed_precision=config.mixed_precision,
        data=data.fingerprint,
    )


def open_states(
    config: "TrainConfig", plan: DraftPlan, data: "TokenData", *, dtype: torch.dtype
) -> TargetStates:
    """The states that a run is to read.

    Args:
        dtype: that the run's target is held in.

    Raises:
        InputError: there are none, or they are of something else.
        CorruptFileError: a file is missing or cut short.
    """
    path = config.target_states_path
    assert path is not None
    states = TargetStates.open(path, states_wanted(config, plan, data))
    if states.dtype != dtype:
        raise InputError(
            f"target_states_path {path} holds hidden states in {_name(states.dtype)}, and on this "
            f"device the target is held in {_name(dtype)}: they were computed on another kind of "
            f"device; {REMEDY}"
        )
    return states


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def width_of_states(config: "TrainConfig", *, target: str) -> int:
    """Numbers that are stored of a token, by the configs alone.

    Args:
        target: the target's name, or that of the model that it is to be trained from.

    Raises:
        InputError: there is no such model, or no such draft.
    """
    if is_builtin(target):
        check_builtin(target)
        hidden_size = BUILTIN_SIZES[target.removeprefix(BUILTIN_PREFIX)]["hidden_size"]
    else:
        hidden_size = open_target_config(target).get_text_config().hidden_size
    assert config.objective.name == "dflash"
    num_layers = config.objective.draft_num_layers  # of a new draft, which reads one for each
    if config.draft_model_id is not None:
        num_layers = len(open_draft_config(config.draft_model_id).target_layer_ids)
    return num_layers * int(hidden_size)


class TargetReader:
    """A target that reads rows as it does in training.

    Every pass has as many rows as one of training, the last one too: it is filled up. The same
    product of matrices over another number of rows may round otherwise.

    Attributes:
        dtype, width: of the states.
    """

    def __init__(self, config: "TrainConfig", plan: DraftPlan, *, device: str) -> None:
        self._device = torch.device(device)
        trainee = load_trainee(plan, device=self._device, seed=config.seed)
        self._trainee: DraftTrainee = trainee.to(device).eval()
        self.rows_per_pass = config.per_device_train_batch_size
        self._is_bf16 = config.mixed_precision == "bf16"
        self.dtype: torch.dtype = trainee.target.dtype
        size = trainee.target.config.get_text_config().hidden_size
        self.width = len(plan.draft.target_layer_ids) * int(size)

    def read(self, rows: "TokenRows") -> Tensor:
        """States [n, L, C] on the CPU, of no more rows than a pass has."""
        filled = rows.take(np.minimum(np.arange(self.rows_per_pass), len(rows) - 1))
        batch = filled.batch()
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._is_bf16):
            states = self._trainee.read(batch.tokens, positions_in_document(batch.document))
        found: Any = states[: len(rows)].to(self.dtype).cpu()
        assert found.shape[-1] == self.width
        return found
