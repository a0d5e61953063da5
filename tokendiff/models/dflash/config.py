"""The config of a DFlash draft, of either layout, and what of it no draft can have."""

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config

from tokendiff.artifacts.model_folders import SECOND_DRAFT_ARCHITECTURE

EMBEDDING_OUTPUT = -1  # as a target layer id: what the target's first layer is given
FULL, SLIDING = "full_attention", "sliding_attention"
SCALARS = ("input_embedding_scale", "output_multiplier", "final_logit_softcapping")
_KNOWN_FIELDS = frozenset({"target_layer_ids", "mask_token_id", "block_size"})
_SECOND_FIELDS = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
_ATTENTION_MODE = "attention_mode"  # of the second layout; what stands nowhere is "gqa"


def spread_layer_ids(num_target_layers: int, num_ids: int) -> list[int]:
    """Which of the target's layers a new draft reads: [N // 2] if one, else evenly from 1 to N - 3.

    Layer i, counted from 0, gives its output: `hidden_states[i + 1]` of transformers, whose first
    entry is the embedding's output.

    Raises:
        ValueError: the target has too few layers for that many different ones.
    """
    if num_ids < 1:
        raise ValueError(f"a draft needs at least one target layer, got {num_ids}")
    if num_ids == 1:
        return [num_target_layers // 2]
    first, last = 1, num_target_layers - 3
    if last - first + 1 < num_ids:
        raise ValueError(
            f"{num_ids} different layers from 1 to N - 3 need a target of at least {num_ids + 3} "
            f"layers; it has {num_target_layers}"
        )
    step = (last - first) / (num_ids - 1)
    return [round(first + index * step) for index in range(num_ids)]


class DFlashDraftConfig(Qwen3Config):
    """A Qwen3 config with what makes it a draft's.

    Args:
        block_size: tokens of a block, the anchor included. The published layouts have it here or in
            `dflash_config`.
        num_target_layers: layers of the target; None where it is not recorded.
        dflash_config: `target_layer_ids` and `mask_token_id`; of the second layout also
            `conv_kernel_size`, `conv_group_size`, `selector_rank` and `selector_top_k`.
        sliding_window: W of layers of type sliding_attention: a query at position p sees context
            from p - W + 1 on, as transformers counts it, and its own block whole.
        input_embedding_scale, output_multiplier, final_logit_softcapping: of the second layout,
            here or in `dflash_config`: what embeddings and logits are multiplied by (1 where they
            are not given), and the c of c tanh(logits / c) (no cap where it is not given, or 0).

    Raises:
        ValueError: a value that no draft can have, or a field that this version would ignore.
    """

    block_size: int | None = None
    num_target_layers: int | None = None
    dflash_config: dict[str, Any] | None = None
    sliding_window: int | None = None
    input_embedding_scale: float | None = None
    output_multiplier: float | None = None
    final_logit_softcapping: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)  # names code that is not saved beside our weights
        own = dict(self.dflash_config or {})
        for name in ("target_layer_ids", "mask_token_id"):
            if name in kwargs:
                own.setdefault(name, kwargs.pop(name))
        self.dflash_config = own
        if self.block_size is None:
            self.block_size = own.get("block_size")
        window = self.sliding_window
        super().__post_init__(**kwargs)
        if SLIDING in (self.layer_types or []):
            self.sliding_window = window  # which Qwen3 keeps only where use_sliding_window is set
        self._check()

    @property
    def target_layer_ids(self) -> list[int]:
        return list(self._own("target_layer_ids"))

    @property
    def mask_token_id(self) -> int:
        return int(self._own("mask_token_id"))

    @property
    def has_selector(self) -> bool:
        """Whether it is of the second layout."""
        named = SECOND_DRAFT_ARCHITECTURE in (self.architectures or [])
        own = self.dflash_config or {}
        return named or (not self.architectures and any(name in own for name in _SECOND_FIELDS))

    def second(self, name: str) -> int:
        """A field of the second layout."""
        return int(self._own(name))

    def scalar(self, name: str) -> float | None:
        """One of the optional numbers, wherever it stands; None where it is not given."""
        own: Any = (self.dflash_config or {}).get(name)
        return getattr(self, name) if own is None else float(own)

    def shaped(self, logits: Tensor) -> Tensor:
        """The draft's logits of what the target's head gives: as they are in the first layout."""
        multiplier, cap = self.scalar("output_multiplier"), self.scalar("final_logit_softcapping")
        if multiplier in (None, 1.0) and not cap:
            return logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits * (1.0 if multiplier is None else multiplier)
        return cap * torch.tanh(logits / cap) if cap else logits

    def _own(self, name: str) -> Any:
        assert self.dflash_config is not None
        if name not in self.dflash_config:
            raise AttributeError(f"the config of a DFlash draft has no {name} in its dflash_config")
        return self.dflash_config[name]

    def _check(self) -> None:
        own, ids = self.dflash_config or {}, (self.dflash_config or {}).get("target_layer_ids")
        if not own and self.block_size is None:
            return  # the default config, which transformers makes to see what differs from it
        known = _KNOWN_FIELDS
        if self.has_selector:
            known = known.union(_SECOND_FIELDS, SCALARS, [_ATTENTION_MODE])
        if unknown := sorted(own.keys() - known):
            raise ValueError(
                f"dflash_config has {', '.join(unknown)}, which this version does not implement"
            )
        if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
            raise ValueError(f"dflash_config.target_layer_ids must list layers, got {ids!r}")
        num_layers = self.num_target_layers
        if any(i < EMBEDDING_OUTPUT or (num_layers is not None and i >= num_layers) for i in ids):
            last = "N - 1" if num_layers is None else num_layers - 1
            raise ValueError(
                f"dflash_config.target_layer_ids {ids} must lie in -1..{last}, the target's layers"
            )
        mask = own.get("mask_token_id")
        if not isinstance(mask, int) or not 0 <= mask < self.vocab_size:
            raise ValueError(
                f"dflash_config.mask_token_id {mask!r} must be an id of the target's "
                f"{self.vocab_size} embeddings"
            )
        if own.get("block_size", self.block_size) != self.block_size:
            raise ValueError(
                f"block_size {self.block_size} contradicts dflash_config's {own['block_size']}"
            )
        if self.block_size is None or self.block_size < 2:
            raise ValueError(
                f"block_size {self.block_size}: a block is the anchor and at least one token more"
            )
        self._check_attention()
        given = [name for name in SCALARS if getattr(self, name) is not None]
        if self.has_selector:
            self._check_second(own)
        elif given:
            raise ValueError(f"{given[0]} is of drafts of the layout {SECOND_DRAFT_ARCHITECTURE}")

    def _check_attention(self) -> None:
        kinds = set(self.layer_types or [])
        if not kinds or not kinds <= {FULL, SLIDING}:
            raise ValueError(f"layer_types {self.layer_types}: must be {FULL} or {SLIDING}")
        window = self.sliding_window
        if SLIDING in kinds and not (isinstance(window, int) and window >= 1):
            raise ValueError(
                f"sliding_window {window}: layers of type {SLIDING} need the number of positions "
                "that they see"
            )
        if getattr(self, "is_causal", False):
            raise ValueError("is_causal true: within a block, a draft attends in both directions")

    def _check_second(self, own: dict[str, Any]) -> None:
        for name in _SECOND_FIELDS:
            if not isinstance(own.get(name), int) or own[name] < 1:
                raise ValueError(
                    f"dflash_config.{name} {own.get(name)!r}: a draft of the layout "
                    f"{SECOND_DRAFT_ARCHITECTURE} needs a number of at least 1"
                )
        if self.hidden_size % own["conv_group_size"]:
            raise ValueError(
                f"dflash_config.conv_group_size {own['conv_group_size']} does not divide "
                f"hidden_size {self.hidden_size}"
            )
        if own["selector_top_k"] > self.vocab_size:
            raise ValueError(
                f"dflash_config.selector_top_k {own['selector_top_k']}: there are "
                f"{self.vocab_size} tokens"
            )
        for name in SCALARS:
            here, there = getattr(self, name), own.get(name)
            if None not in (here, there) and here != there:
                raise ValueError(f"{name} {here} contradicts dflash_config's {there}")
            number = self.scalar(name)
            if number == 0.0 and name == "final_logit_softcapping":
                continue  # written so where there is no cap
            if number is not None and not number > 0.0:
                raise ValueError(f"{name} {number} must be positive")
        if (mode := own.get(_ATTENTION_MODE, "gqa")) != "gqa":
            raise ValueError(
                f"dflash_config.{_ATTENTION_MODE} {mode!r}: this version implements gqa alone"
            )
