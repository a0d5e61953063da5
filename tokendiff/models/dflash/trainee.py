"""A draft beside its frozen target: what the dflash objective trains, and what judges a draft on
rows.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

from tokendiff.diffusion.attention_masks import MaskRule, dense, mask_mod
from tokendiff.errors import InputError, reason_of
from tokendiff.models.dflash.model import DFlashDraftConfig, DFlashDraftModel
from tokendiff.models.dflash.planning import DraftPlan, load_draft
from tokendiff.models.pretrained import open_weights

AttentionKernel = Literal["flex", "dense"]
# Scores of one head and row above which flex_attention, which skips what the mask leaves out, beats
# one call with the whole mask, whose memory it also saves.
_FLEX_SCORES = 2**20
_CHECK_LENGTH = 5


class DraftTrainee(nn.Module):
    """A draft and its target as `tokendiff.diffusion.interfaces.DraftBesideTarget`.

    Args:
        draft: the module that is trained.
        target: from AutoModelForCausalLM. It is frozen here, keeps its dtype, and stays in eval
            mode.
        attention_kernel: of the draft; both give the same numbers to rounding. By default flex
            where there are many anchors and the device has its backward pass, which a CPU does not.
    """

    def __init__(
        self,
        draft: DFlashDraftModel,
        target: Any,
        *,
        attention_kernel: AttentionKernel | None = None,
    ) -> None:
        super().__init__()
        self.model = draft
        self.target = target.requires_grad_(False).eval()
        self._kernel = attention_kernel

    def train(self, mode: bool = True) -> "DraftTrainee":
        super().train(mode)
        self.target.eval()
        return self

    @property
    def vocab_size(self) -> int:
        size: int = self.target.get_output_embeddings().weight.shape[0]
        return size

    @torch.no_grad()
    def read(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The outputs of the chosen layers, side by side; those of the others are not kept."""
        chosen = [layer + 1 for layer in self.model.config.target_layer_ids]
        # Without a mask or a cache, transformers tells packed documents by their positions.
        output = self.target.base_model(
            input_ids=tokens, position_ids=positions, use_cache=False, output_hidden_states=chosen
        )
        return torch.cat([output.hidden_states[index] for index in chosen], dim=-1)

    def draft(self, tokens: Tensor, context: Tensor, positions: Tensor, rule: MaskRule) -> Tensor:
        (batch, num_queries), num_keys = tokens.shape, positions.shape[1]
        if self._kernel_for(tokens.device, num_queries * num_keys) == "flex":
            mask: Any = create_block_mask(
                mask_mod(rule), batch, None, num_queries, num_keys, device=tokens.device
            )
        else:
            mask = dense(rule, batch, num_queries, num_keys, tokens.device)
        output = self.model(
            noise_embeds=self.target.get_input_embeddings()(tokens),
            context_hidden_states=context,
            attention_mask=mask,
            position_ids=positions,
        )
        return output.last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        head = self.target.get_output_embeddings()
        return head(hidden.to(head.weight.dtype))

    def _kernel_for(self, device: torch.device, num_scores: int) -> AttentionKernel:
        if self._kernel is not None:
            return self._kernel
        can_flex = device.type == "cuda" and not self.model.config.attention_dropout
        return "flex" if can_flex and num_scores > _FLEX_SCORES else "dense"

    def recompute_activations(self) -> None:
        """Keep no activations between the draft's layers; the backward pass computes them again."""
        self.model.activation_checkpointing_enable()

    def compile_encoder(self) -> None:
        """torch.compile draft and target in place; the head stays eager."""
        self.model.compile()
        self.target.base_model.compile()


def load_trainee(
    plan: DraftPlan, *, device: torch.device, seed: int = 0, dropout: float = 0.0
) -> DraftTrainee:
    """Draft and target on the CPU: the draft in float32, the target in bfloat16 where `device` has
    it.

    Args:
        device: that they will be moved to.
        seed: decides the weights of a new draft.
        dropout: of the draft's attention.

    Raises:
        InputError: weights cannot be read, or the target cannot be used.
    """
    from transformers import AutoModelForCausalLM

    plan.draft.attention_dropout = dropout
    if plan.draft_model_id is not None:
        draft = load_draft(plan.draft_model_id)
        draft.config.attention_dropout = dropout
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    name = plan.target_model_id
    weights = open_weights(
        AutoModelForCausalLM,
        name,
        plan.target,
        field="target_model_id",
        dtype=torch.bfloat16 if has_bf16 else torch.float32,
    )
    if plan.draft_model_id is None:
        draft = new_draft(plan.draft, seed=seed)
    trainee = DraftTrainee(draft, weights.complete())
    check_target(trainee, name)
    return trainee


def new_draft(config: DFlashDraftConfig, *, seed: int) -> DFlashDraftModel:
    """A draft with new weights in float32: normal with `config.initializer_range`, and norms 1, as
    Qwen3's own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        return DFlashDraftModel(config)


@torch.no_grad()
def check_target(trainee: DraftTrainee, target_model_id: str) -> None:
    """Read two documents packed into a row and one by one.

    Raises:
        InputError: the target does not tell documents by their positions, or has no such layers.
    """
    device = trainee.target.device
    tokens = torch.arange(2 * _CHECK_LENGTH, device=device)[None] % trainee.vocab_size
    positions = torch.arange(_CHECK_LENGTH, device=device)[None]
    kind = trainee.target.config.model_type
    try:
        packed = trainee.read(tokens, positions.repeat(1, 2))
        alone = [trainee.read(part, positions) for part in tokens.chunk(2, dim=1)]
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise InputError(
            f"target_model_id {target_model_id!r}: a model of type {kind!r} does not give hidden "
            f"states of its layers ({reason_of(error)}); give another model"
        ) from error
    difference = (packed - torch.cat(alone, dim=1)).abs().max()
    tolerance = 1e-3 if packed.dtype in (torch.float32, torch.float64) else 0.1
    if not difference <= tolerance * (packed.std() + 1e-9):
        raise InputError(
            f"target_model_id {target_model_id!r}: in a model of type {kind!r} documents packed "
            "into a row see each other; give another model"
        )
