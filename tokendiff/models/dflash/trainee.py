"""A draft beside its frozen target: what the dflash objective trains, and what judges a draft on
rows.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokendiff.artifacts.model_folders import DRAFT_ARCHITECTURE
from tokendiff.diffusion.attention_masks import AnchoredBlocks, causal, dense
from tokendiff.diffusion.devices import sent
from tokendiff.errors import InputError, reason_of
from tokendiff.models.dflash.block_attention import block_mask_of, tiles_of_blocks
from tokendiff.models.dflash.config import FULL, SCALARS, SLIDING, DFlashDraftConfig
from tokendiff.models.dflash.model import AnyMask, DFlashDraftModel, Masks, class_of
from tokendiff.models.dflash.planning import DraftPlan, load_draft
from tokendiff.models.dflash.second_layout import CandidateSelector
from tokendiff.models.layers import (
    allow_compilations,
    compile_layers,
    compile_module,
    hidden_states_asked,
)
from tokendiff.models.masked_attention import suits_flex
from tokendiff.models.pretrained import open_weights

AttentionKernel = Literal["flex", "tiles", "dense"]
# Above so many scores of one head and row, no mask of all queries by all keys is made:
# flex_attention or tiles compute only what a block sees. Tiles are faster from fewer scores on, but
# differ from one call by rounding, and runs of the usual 64 anchors in rows of 1,024 go on as they
# began.
_FLEX_SCORES, _TILED_SCORES = 2**20, 2**22
_CHECK_LENGTH = 5


class DraftTrainee(nn.Module):
    """A draft and its target as `tokendiff.diffusion.interfaces.DraftBesideTarget`.

    Args:
        draft: the module that is trained.
        target: from AutoModelForCausalLM. It is frozen here, keeps its dtype, and stays in eval
            mode.
        attention_kernel: of the draft; all give the same numbers to rounding. By default one call
            under the whole mask where there are few anchors. Where there are many it is flex, or
            tiles on a CPU, which has no backward pass of flex, and with dropout, which flex lacks.
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
        self._is_compiled = False

    def train(self, mode: bool = True) -> "DraftTrainee":
        super().train(mode)
        self.target.eval()
        return self

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vocab_size(self) -> int:
        size: int = self.target.get_output_embeddings().weight.shape[0]
        return size

    @torch.no_grad()
    def read(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The outputs of the chosen layers, side by side; those of the others are not kept."""
        chosen = [layer + 1 for layer in self.model.config.target_layer_ids]
        output = self.target.base_model(
            input_ids=sent(tokens, self.device),
            use_cache=False,
            output_hidden_states=hidden_states_asked(chosen),
            **self._documents_at(positions),
        )
        return torch.cat([output.hidden_states[index] for index in chosen], dim=-1)

    def _documents_at(self, positions: Tensor) -> dict[str, Any]:
        """What the target is given, so that documents do not see each other.

        Without a mask or a cache, transformers tells packed documents by their positions. It asks
        the device for them in every pass, unless it is given a mask.
        """
        inputs: dict[str, Any] = {"position_ids": sent(positions, self.device)}
        config = self.target.config
        is_plain = config._attn_implementation == "sdpa" and not getattr(
            config, "sliding_window", None
        )
        if self.device.type == "cpu" or positions.device.type != "cpu" or not is_plain:
            return inputs
        is_new = positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1
        if not bool(is_new.any()):
            return {}
        document = sent(is_new.cumsum(1), self.device)
        size, length = positions.shape
        mask = dense(causal(document), size, length, length, self.device)
        return {"attention_mask": mask, **inputs}

    def draft(
        self, tokens: Tensor, context: Tensor, positions: Tensor, rule: AnchoredBlocks
    ) -> Tensor:
        mask = self.mask_of(rule, tokens.shape[1], tokens.device)
        output = self.model(
            noise_embeds=self.target.get_input_embeddings()(tokens),
            context_hidden_states=context,
            attention_mask=mask,
            position_ids=positions,
        )
        return output.last_hidden_state

    @property
    def selector(self) -> CandidateSelector | None:
        return self.model.candidate_selector

    def mask_of(self, rule: AnchoredBlocks, num_queries: int, device: torch.device) -> Masks:
        """What the draft is given, so that its queries see what a rule says, as far as the window
        of their layer goes.
        """
        if (window := self.model.window) is None:
            return self._mask_of(rule, num_queries, device)
        masks = {SLIDING: self._mask_of(replace(rule, window=window), num_queries, device)}
        if FULL in (self.model.config.layer_types or []):
            masks[FULL] = self._mask_of(rule, num_queries, device)
        return masks

    def _mask_of(self, rule: AnchoredBlocks, num_queries: int, device: torch.device) -> AnyMask:
        num_keys = rule.length + num_queries
        match self.kernel_for(device, num_queries * num_keys):
            case "flex":
                allow_compilations()
                return block_mask_of(rule)
            case "tiles":
                return tiles_of_blocks(rule, dtype=self.model.fc.weight.dtype)
            case "dense":
                return dense(rule, len(rule.begin), num_queries, num_keys, device)

    def head(self, hidden: Tensor) -> Tensor:
        head = self.target.get_output_embeddings()
        return self.model.config.shaped(head(hidden.to(head.weight.dtype)))

    def kernel_for(self, device: torch.device, num_scores: int) -> AttentionKernel:
        if self._kernel is not None:
            return self._kernel
        config = self.model.config
        if device.type == "cuda" and not config.attention_dropout and suits_flex(config):
            return "flex" if num_scores > _FLEX_SCORES else "dense"
        # Where tiles begin and end differs by batch, and each would be compiled anew.
        return "tiles" if num_scores > _TILED_SCORES and not self._is_compiled else "dense"

    def recompute_activations(self) -> None:
        """Keep no activations between the draft's layers; the backward pass computes them again."""
        self.model.activation_checkpointing_enable()

    def compile_encoder(self) -> None:
        """torch.compile draft and target in place; the head stays eager."""
        self._is_compiled = True
        compile_module(self.model)
        compile_layers(self.target.base_model)


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
    target = weights.complete()
    if plan.draft_model_id is None:
        draft = new_draft(plan.draft, seed=seed, head=target.get_output_embeddings().weight)
    trainee = DraftTrainee(draft, target)
    check_target(trainee, name)
    return trainee


@torch.no_grad()
def new_draft(config: DFlashDraftConfig, *, seed: int, head: Tensor) -> DFlashDraftModel:
    """A draft with new weights in float32, which at first holds all tokens for about as likely.

    A target's final norm makes states that its head was trained on; a draft's state is read by the
    same head at once. With Qwen3's own start, matrices normal with 0.02 and norms of 1, it is sure
    of a wrong token, for two reasons:

    - Rows of a trained head are long. A state of size 1 in a random direction gives logits whose
      standard deviation is the length of a row (3.2 in SmolLM2-135M), and costs about half its
      square more than ln V. So the final norm is 1 over the mean length of a row.
    - What is to be filled in enters as the mask's embedding, and the first layers add little to it
      where the draft is narrow. Under a tied head such a state says the mask itself. So a matrix is
      normal with 1 over the root of its inputs, and layers outweigh what they are added to.

    On SmolLM2-135M, where ln V is 10.8, drafts of 2 layers with blocks of 8 begin at 10.5 and 9.8
    nats a token (two seeds; it was 32.1 and 25.9), those of 5 layers with blocks of 16 at 10.7 and
    10.9 (17.4 and 16.3). A start at the target's mean prediction, with layers that add nothing and
    one unit that turns the mask's embedding into it, begins at 8.4, but the unit is off within
    three steps: the mask's embedding is left over, at 65 nats.

    Args:
        head: [V, D] of the target.
        seed: decides the draws.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        # Of either layout: a draft of the second one begins as the first does.
        draft = DFlashDraftModel(_first_layout(config))
        for module in draft.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, module.in_features**-0.5)
        if config.has_selector:
            second = class_of(config)(config)
            second.load_state_dict(draft.state_dict(), strict=False)
            draft = second
    draft.norm.weight.fill_(float(1.0 / head.float().norm(dim=1).mean()))
    return draft


def _first_layout(config: DFlashDraftConfig) -> DFlashDraftConfig:
    """The config of a draft without convolutions and selector."""
    if not config.has_selector:
        return config
    assert config.dflash_config is not None
    fields = {name: value for name, value in config.to_dict().items() if name not in SCALARS}
    names = ("target_layer_ids", "mask_token_id", "block_size")
    own = {name: config.dflash_config[name] for name in names if name in config.dflash_config}
    return DFlashDraftConfig.from_dict(
        {**fields, "architectures": [DRAFT_ARCHITECTURE], "dflash_config": own}
    )


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
