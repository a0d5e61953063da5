"""What a run's checkpoints hold: the model, which any tool can open, and the state that training
goes on from. Tensors have the names of the model's parameters and are whole, however the workers
split them, so that any number of workers can read what any other number wrote.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokendiff.artifacts.checkpoint import (
    ADAPTERS,
    DRAFT_ADAPTERS,
    EMA_ADAPTERS,
    EMA_WEIGHTS,
    OPTIMIZER,
    WEIGHTS,
)
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.artifacts.tensor_files import TensorFiles, has_tensors, local_part
from tokendiff.errors import CorruptFileError
from tokendiff.models.adapters import (
    adapter_tensors,
    base_weights,
    changed_weights,
    merged_weights,
)
from tokendiff.models.families import family_of
from tokendiff.models.kept_base import draft_adapter_fields
from tokendiff.models.layouts import Layout, as_in_files, forget_publication, write_beside
from tokendiff.models.pretrained import dtype_in_files, open_weights, quietly
from tokendiff.training.building import starting_point
from tokendiff.training.model_card import CARD_NAME, model_card
from tokendiff.training.saving import Contents, NamedTensors
from tokendiff.training.trainer import Trainer

if TYPE_CHECKING:
    from tokendiff.training.watching import Watch

TRAINER_STATE = "trainer_state.json"
_HEADER = {WEIGHTS: {"format": "pt"}}  # as transformers writes it


class RunState:
    """What a run goes on from, as its checkpoints hold it.

    Args:
        tokenizer, process: that stand beside the weights.
    """

    def __init__(self, trainer: Trainer, tokenizer: Any, process: NoiseProcess | None) -> None:
        self._trainer, self._tokenizer, self._process = trainer, tokenizer, process
        self._model: Any = trainer.denoiser.model
        self._has_adapters = trainer.config.lora_rank is not None
        self._keeps_base = trainer.config.keep_base
        _, start = starting_point(trainer.config)
        # The base model's files are what they were, in the dtype too that they had.
        self._base_dtype = dtype_in_files(start) if self._keeps_base else None

    def checkpoint(self, metadata: Mapping[str, Any], watch: "Watch | None") -> Contents:
        """All of it."""
        trainer, average = self._trainer, self._trainer.average
        tensors: dict[str, NamedTensors] = {WEIGHTS: self._weights()}
        tensors[OPTIMIZER] = trainer.state_tensors().items()
        if self._has_adapters:
            tensors[ADAPTERS] = adapter_tensors(self._model).items()
        if average is not None and self._has_adapters:
            tensors[EMA_ADAPTERS] = average.tensors.items()
            if not self._keeps_base:
                tensors[EMA_WEIGHTS] = self._averaged(changed_weights(self._model))
        elif average is not None:
            tensors[EMA_WEIGHTS] = average.tensors.items()
        files = {TRAINER_STATE: json.dumps(trainer.state(), indent=1)}
        if watch is not None:
            files |= watch.files()
        return Contents(
            tensors=tensors, header=_HEADER, files=files, beside=self._beside, metadata=metadata
        )

    def final(self, metadata: Mapping[str, Any], watch: "Watch | None" = None) -> Contents:
        """The model alone, with averaged weights where the run keeps them, and its card."""
        tensors = {WEIGHTS: self._weights()}
        trained = WEIGHTS
        if self._keeps_base:
            tensors[ADAPTERS] = adapter_tensors(self._model).items()
            trained = ADAPTERS
        if self._trainer.average is not None:
            tensors[trained] = self._averaged(tensors[trained])
        heldout = None if watch is None else watch.best_in_words()
        card = model_card(metadata, process=self._process, heldout=heldout)
        return Contents(
            tensors=tensors,
            header=_HEADER,
            files={CARD_NAME: card},
            beside=self._beside,
            metadata=metadata,
        )

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint, of whatever number of workers.

        Raises:
            CorruptFileError: a tensor is not there.
        """
        self.load_weights(folder)
        state = json.loads((folder / TRAINER_STATE).read_text())
        with TensorFiles(folder, OPTIMIZER) as files:
            self._trainer.load_state(state, _Reader(folder, files))

    def load_weights(self, folder: Path) -> None:
        """Take the weights of a checkpoint, and the averaged ones where the run keeps them."""
        average = self._trainer.average
        if self._has_adapters:
            # The weights beside them are merged: what was added to them cannot be had back exactly.
            _fill(folder, ADAPTERS, adapter_tensors(self._model))
            stem = EMA_ADAPTERS
        elif self._is_converted:
            self._reopen(folder)
            stem = EMA_WEIGHTS
        else:
            names = self._names_in_files
            tensors = {names[name]: value for name, value in self._own_tensors().items()}
            _fill(folder, WEIGHTS, tensors)
            stem = EMA_WEIGHTS
        if average is not None and has_tensors(folder, stem):
            _fill(folder, stem, average.tensors)

    @torch.no_grad()
    def _reopen(self, folder: Path) -> None:
        """Take weights that files hold in other pieces than the model: a second model in memory."""
        config = copy.deepcopy(self._model.config)
        opened = open_weights(
            type(self._model), str(folder), config, field="checkpoint", dtype=torch.float32
        )
        there = opened.complete().state_dict()
        for name, tensor in self._own_tensors().items():
            local, part = local_part(tensor)
            local.copy_(there[name] if part is None else there[name][part])

    def _weights(self) -> NamedTensors:
        """As transformers names them in files."""
        own: NamedTensors = self._own_tensors().items()
        if self._keeps_base:
            own = (
                (name, t.to(self._base_dtype or t.dtype)) for name, t in base_weights(self._model)
            )
        elif self._has_adapters:
            own = merged_weights(self._model)
        if self._is_converted:
            return as_in_files(self._model, own)
        names = self._names_in_files
        return ((names[name], tensor) for name, tensor in own)

    def _averaged(self, pairs: NamedTensors) -> Iterator[tuple[str, Tensor]]:
        """What `pairs` gives while the model holds the averaged weights."""
        average = self._trainer.average
        assert average is not None
        with average.in_place_of_weights():
            yield from pairs

    def _own_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers that files hold; of tied ones the first."""
        tied = getattr(self._model, "all_tied_weights_keys", None) or {}
        return {name: value for name, value in self._model.state_dict().items() if name not in tied}

    @cached_property
    def _names_in_files(self) -> dict[str, str]:
        """transformers keeps a few architectures' weights under other names in files."""
        from transformers.core_model_loading import revert_weight_conversion

        tied = getattr(self._model, "all_tied_weights_keys", None) or {}
        plain = [name.replace(".base_layer.", ".") for name in self._model.state_dict()]
        if (layout := self._layout) is not None:
            return {name: layout.published_name(name) for name in plain if name not in tied}
        return {
            name: next(iter(revert_weight_conversion(self._model, {name: torch.empty(1)})))
            for name in plain
            if name not in tied
        }

    @property
    def _is_converted(self) -> bool:
        return self._layout is not None and self._layout.is_converted

    @cached_property
    def _layout(self) -> Layout | None:
        """Of a published model, whose files are to be what they were; None where its weights are no
        more what its own loader takes them for, or where it is written as transformers does.
        """
        family = family_of(getattr(self._model.config, "published_model_type", None))
        process = self._process
        if process is None:
            return None
        if family.attention == "canvas":  # no other training is done with it
            return family.layout
        sees_blocks = process.attention_mask_mode == "4d" and process.context_attention == "block"
        is_same = (
            family.attention == ("blocks" if sees_blocks else "rows")
            and family.predict == process.predict
            and process.forward_process == "absorbing"  # as these families were trained
        )
        return family.layout if is_same else None

    @cached_property
    def _beside(self) -> Path | None:
        """The files that no step changes: config, tokenizer, noise process."""
        if not self._trainer.world.is_main:
            return None
        self._folder = TemporaryDirectory()
        folder = Path(self._folder.name)
        layout = self._layout
        if layout is None:
            forget_publication(self._model.config)
        with quietly():
            self._model.save_pretrained(folder, state_dict={})
        if layout is not None:
            write_beside(self._model.config, layout, folder)
        self._tokenizer.save_pretrained(folder)
        if self._process is not None:
            self._process.save(folder)
        if self._keeps_base:
            self._describe_base(folder)
        return folder

    def _describe_base(self, folder: Path) -> None:
        """Write what adapters there are, and the dtype of the base model beside them."""
        field, start = starting_point(self._trainer.config)
        fields = draft_adapter_fields(
            self._trainer.config, self._tokenizer, name=start, field=field
        )
        (folder / DRAFT_ADAPTERS).write_text(json.dumps(fields, indent=2) + "\n")
        if self._base_dtype is not None:
            path = folder / "config.json"
            dtype = str(self._base_dtype).removeprefix("torch.")
            path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": dtype}, indent=2))


class _Reader:
    """Tensors of a folder's files as the workers hold them."""

    def __init__(self, folder: Path, files: TensorFiles) -> None:
        self._folder, self._files = folder, files

    def __contains__(self, name: str) -> bool:
        return name in self._files.names

    @torch.no_grad()
    def fill(self, name: str, tensor: Tensor) -> None:
        """Read what this worker holds of a tensor."""
        if name not in self._files.names:
            raise CorruptFileError(f"{self._folder} has no tensor {name!r}")
        local, part = local_part(tensor)
        found = self._files.read(name, part)
        if found.shape != local.shape:
            raise CorruptFileError(
                f"{self._folder}: tensor {name!r} has the shape {list(found.shape)}, where "
                f"{list(local.shape)} is wanted"
            )
        local.copy_(found)


def _fill(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> None:
    with TensorFiles(folder, stem) as files:
        reader = _Reader(folder, files)
        for name, tensor in tensors.items():
            reader.fill(name, tensor)
