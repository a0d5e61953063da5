"""How many bytes a forward pass keeps for its backward pass: found by running it on tensors that
have shapes and no memory, and adding up what it would keep.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokendiff.diffusion.attention_masks import block_diffusion, dflash_blocks
from tokendiff.models.denoiser import ModelInTwoParts
from tokendiff.models.dflash.config import FULL, SLIDING, DFlashDraftConfig
from tokendiff.models.dflash.trainee import DraftTrainee
from tokendiff.models.diffusion_gemma import MODEL_TYPE, EncoderDecoderDenoiser
from tokendiff.models.layers import find_layers
from tokendiff.models.masked_attention import IMPLEMENTATIONS
from tokendiff.models.tiled_attention import register, tiles_of

if TYPE_CHECKING:
    from tokendiff.config.train import TrainConfig

_FLOAT = torch.float32.itemsize


def activation_bytes(
    config: "TrainConfig", model: Any, rows: int, length: int, device: torch.device
) -> tuple[int, int]:
    """What a forward pass of the encoder keeps for the backward pass; and what one layer keeps
    when it computes that again, where layers do. Both are 0 where a pass cannot be tried without
    memory: some old architectures (XLM, Longformer) ask in it what is in a tensor.

    Args:
        model: of transformers, on the meta device.
        rows, length: of the tokens that it encodes.
    """
    from torch._subclasses.fake_tensor import DataDependentOutputException as AskedForContent
    from torch._subclasses.fake_tensor import DynamicOutputShapeException as AskedForShape

    try:
        return _activation_bytes(config, model, rows, length, device)
    except (AskedForContent, AskedForShape, TypeError):
        # A TypeError is of a model that takes no tokens (Perceiver), which is refused when built.
        return 0, 0


def _activation_bytes(
    config: "TrainConfig", model: Any, rows: int, length: int, device: torch.device
) -> tuple[int, int]:
    if not config.gradient_checkpointing:
        return _kept_bytes(config, model, rows, length, device), 0
    again = copy.deepcopy(model)
    ModelInTwoParts(again, vocab_size=1).recompute_activations()
    num_layers = len(find_layers(model, field="gradient_checkpointing"))
    of_a_layer = _kept_bytes(config, model, rows, length, device) // num_layers
    return _kept_bytes(config, again, rows, length, device), of_a_layer


def _kept_bytes(
    config: "TrainConfig", model: Any, rows: int, length: int, device: torch.device
) -> int:
    encoder = copy.deepcopy(model)
    for module in encoder.modules():
        if hasattr(module, "gate_up_proj"):
            module.forward = partial(_as_one_expert, module)
    if model.config.model_type == MODEL_TYPE:
        return _kept_by_halves(config, encoder, rows, length)
    # Packed rows have no padding to mask, and flex attention keeps no mask.
    attention: dict[str, Any] = {"attention_mask": None}
    has_tiles = config.objective.is_causal and device.type == "cpu"
    if has_tiles:
        register()
        encoder.set_attn_implementation(IMPLEMENTATIONS["tiles"])  # as in training on a CPU
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool).tril()
        attention = {"attention_mask": mask, "tiles": tiles_of(mask)}
    with _kept_by(config, encoder) as kept:
        tokens = torch.zeros(rows, length, dtype=torch.int64)
        inputs: dict[str, Any] = {"position_ids": tokens}
        if config.objective.is_causal:
            inputs["use_cache"] = False
        if getattr(model.config, "is_time_conditioned", False):
            inputs = {"time": torch.zeros(rows)}
        encoder.base_model(input_ids=tokens, **inputs, **attention)
    return sum(size for size, _ in kept.values())


def _kept_by_halves(config: "TrainConfig", model: Any, rows: int, length: int) -> int:
    """Of an encoder and a decoder that are told nothing; what they are told is one state more per
    token.
    """
    denoiser = EncoderDecoderDenoiser(model, vocab_size=1, mask_token_id=0)
    with _kept_by(config, model) as kept:
        document = torch.zeros(rows, length // 2, dtype=torch.int64)
        rule = block_diffusion(document, document, context_is_causal=True)
        for layer in denoiser.layers:
            if layer.recomputes:  # what the decoder reads of the encoder stays
                layer.register_forward_hook(partial(_keep_states, kept))
        tokens = torch.zeros(rows, length, dtype=torch.int64)
        denoiser.encode_noisy(tokens, tokens, rule, is_told=None)
    return sum(size for size, _ in kept.values())


def _keep_states(
    kept: dict[int, tuple[int, Tensor]], layer: nn.Module, inputs: Any, output: Any
) -> None:
    for states in output[1:] if isinstance(output, tuple) else ():
        storage = states.untyped_storage()
        kept[storage._cdata] = (storage.nbytes(), states)


def _as_one_expert(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """What is kept of tokens [N, D] and the experts [N, k] that each goes to, whichever these are:
    products over groups of tokens cannot be tried without memory.
    """
    several = hidden.repeat_interleave(index.shape[1], dim=0)
    gate, up = nn.functional.linear(several, experts.gate_up_proj[0]).chunk(2, dim=-1)
    out = nn.functional.linear(experts.act_fn(gate) * up, experts.down_proj[0])
    return (out * weights.reshape(-1, 1)).view(*index.shape, -1).sum(1).to(hidden.dtype)


def draft_activation_bytes(
    config: "TrainConfig", trainee: DraftTrainee, rows: int, length: int, device: torch.device
) -> tuple[int, int]:
    """As `activation_bytes`, of a draft that fills blocks behind anchors spread over the rows.

    Args:
        trainee: draft and target on the meta device.
    """
    if not config.gradient_checkpointing:
        return _kept_by_draft(config, trainee, rows, length, device), 0
    of_a_layer = _kept_by_draft(config, trainee, rows, length, device) // len(trainee.model.layers)
    again = DraftTrainee(copy.deepcopy(trainee.model), trainee.target)
    again.recompute_activations()
    return _kept_by_draft(config, again, rows, length, device), of_a_layer


def selector_bytes(draft: DFlashDraftConfig, num_tokens: int) -> int:
    """What the loss of a draft's selector keeps of that many drafted tokens, in float32; 0 for a
    draft without one.

    Of each token its features, the vector of the token before it, their product and the gradient by
    that, all [R], and C candidates with their logits; and the gradient by the successors [V, R].
    """
    if not draft.has_selector:
        return 0
    rank, num_candidates = draft.second("selector_rank"), draft.second("selector_top_k")
    of_candidate = torch.int64.itemsize + _FLOAT
    return (
        num_tokens * (4 * rank * _FLOAT + num_candidates * of_candidate)
        + draft.vocab_size * rank * _FLOAT
    )


def _kept_by_draft(
    config: "TrainConfig", trainee: DraftTrainee, rows: int, length: int, device: torch.device
) -> int:
    objective, shape = config.objective, trainee.model.config
    assert objective.name == "dflash"
    assert shape.block_size is not None
    count = max(1, min(objective.num_anchors, length - 2))  # a token stands before and behind each
    anchors = torch.linspace(1, max(1, length - 2), count).long().expand(rows, count)
    document = torch.zeros(rows, length, dtype=torch.int64)
    rule = dflash_blocks(document, anchors, shape.block_size)
    num_queries = count * shape.block_size
    kernel = trainee.kernel_for(device, num_queries * (length + num_queries))
    mask: Any = {FULL: None, SLIDING: None}  # flex attention keeps none
    if kernel != "flex":
        alike = DraftTrainee(trainee.model, trainee.target, attention_kernel=kernel)
        mask = alike.mask_of(rule, num_queries, torch.device("cpu"))
    draft = copy.deepcopy(trainee.model)
    with _kept_by(config, draft) as kept:
        width = shape.hidden_size
        draft(
            noise_embeds=torch.zeros(rows, num_queries, width),
            context_hidden_states=torch.zeros(rows, length, len(shape.target_layer_ids) * width),
            attention_mask=mask,
            position_ids=torch.zeros(rows, length + num_queries, dtype=torch.int64),
        )
    return sum(size for size, _ in kept.values())


@contextmanager
def _kept_by(config: "TrainConfig", model: nn.Module) -> Iterator[dict[int, tuple[int, Tensor]]]:
    """What a pass of a model of the meta device inside this block keeps, by its place: bytes, and
    the tensors themselves, whose places would be used again otherwise.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, tuple[int, Tensor]] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.train().modules():  # each once, also one that stands in two places
            module.to_empty(device="cpu", recurse=False)
        own = {p.untyped_storage()._cdata for p in model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = (storage.nbytes(), tensor)
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16"),
        ):
            yield kept
