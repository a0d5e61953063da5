"""What computes attention under a rule (`tokendiff.diffusion.attention_masks`), and how a
transformers model is told of it.
"""

from typing import Any, Literal

import torch

from tokendiff.diffusion.attention_masks import MaskRule, dense, mask_mod
from tokendiff.diffusion.key_runs import RunRule
from tokendiff.models import tiled_attention
from tokendiff.models.layers import allow_compilations

AttentionKernel = Literal["flex", "tiles", "dense"]
IMPLEMENTATIONS = {"flex": "flex_attention", "tiles": tiled_attention.NAME, "dense": "sdpa"}
_LEAST_HEAD = 16  # of flex attention on CUDA, which multiplies no narrower matrices
_FULL, _WINDOW = "full_attention", "sliding_attention"  # types of layers, as configs name them


def best_kernel(model: Any, device: torch.device) -> AttentionKernel:
    """Flex on CUDA, where it skips what the mask leaves out and holds no mask in memory, and tiles
    elsewhere: on a CPU flex has no backward.
    """
    # flex_attention has no dropout, and not every architecture can be given it (GPT-2 cannot).
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    has_dropout = any(getattr(model.config, name, 0.0) for name in names)
    can_flex = device.type == "cuda" and model._supports_flex_attn and not has_dropout
    return "flex" if can_flex and suits_flex(model.config) else "tiles"


def suits_flex(config: Any) -> bool:
    """Whether heads are as wide as flex attention's kernels on CUDA need them."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width >= _LEAST_HEAD


def under_rule(
    rule: MaskRule,
    kernel: AttentionKernel,
    *,
    batch_size: int,
    length: int,
    device: torch.device,
    window: int | None = None,
) -> dict[str, Any]:
    """What the forward pass of a model is given, so that every layer attends under `rule`.

    Args:
        window: of the layers that see no further than so many tokens to either side; None where
            there are none.
    """
    rules = {_FULL: rule}
    if window is not None:
        rules[_WINDOW] = _within_window(rule, window)
    if kernel == "flex":
        allow_compilations()
        masks: dict[str, Any] = {
            name: _block_mask(r, batch_size, length, device) for name, r in rules.items()
        }
    else:
        masks = {name: dense(r, batch_size, length, length, device) for name, r in rules.items()}
    inputs: dict[str, Any] = {"attention_mask": masks[_FULL] if window is None else masks}
    if kernel == "tiles":
        inputs["tiles"] = tiled_attention.tiles_of(masks[_FULL])
        if window is not None:
            inputs["window_tiles"] = tiled_attention.tiles_of(masks[_WINDOW])
    return inputs


def _block_mask(rule: MaskRule, batch_size: int, length: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    from tokendiff.models.block_masks import block_mask_of_runs

    if isinstance(rule, RunRule):
        return block_mask_of_runs(rule, length)
    return create_block_mask(mask_mod(rule), batch_size, None, length, length, device=device)


def _within_window(rule: MaskRule, window: int) -> MaskRule:
    if isinstance(rule, RunRule):
        return rule.within(window)
    return lambda b, q, kv: rule(b, q, kv) & ((q - kv).abs() <= window)
