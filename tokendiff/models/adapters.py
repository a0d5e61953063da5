"""Low-rank adapters (LoRA, arXiv 2106.09685) on a causal model, by the optional library peft.

Only the adapters are trained, and the one row of the input embedding that the mask has: to the
pretrained model it is a new token. (Its row of a tied head is left alone: no loss or sampler reads
the mask's logit.) What is saved is a plain transformers model with the adapters merged into its
weights; the adapters themselves are kept beside the training state.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokendiff.errors import InputError

_ALL_LINEAR = "all-linear"  # peft's name for every linear layer but the head
_ADAPTER = "default"


class _EmbeddingWithRow(nn.Module):
    """An embedding of which one row is trained."""

    def __init__(self, embedding: nn.Embedding, index: int) -> None:
        super().__init__()
        self.base_layer = embedding
        self.index = index
        self.row = nn.Parameter(embedding.weight.detach()[index].clone())

    @property
    def weight(self) -> Tensor:
        """[V, D] of all rows."""
        weight = self.base_layer.weight.detach().clone()
        weight[self.index] = self.row.detach()
        return weight

    @property
    def num_embeddings(self) -> int:
        return self.base_layer.num_embeddings

    def forward(self, tokens: Tensor) -> Tensor:
        states: Tensor = self.base_layer(tokens)
        return torch.where((tokens == self.index)[..., None], self.row.to(states.dtype), states)


def add_adapters(
    model: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str],
    trained_token_id: int | None,
    seed: int,
) -> None:
    """Freeze a transformers model and put trainable adapters into it, in place.

    Args:
        alpha: an adapter adds alpha / rank times the product of its two matrices.
        target_modules: last parts of the names of linear layers; none is every one but the head.
        trained_token_id: the token whose embedding is trained too.
        seed: decides the adapters' first weights; what they add starts at zero.

    Raises:
        InputError: peft is not installed, or no layer has such a name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError(
            "lora_rank needs the library peft; install it with pip install 'tokendiff[lora]'"
        ) from error
    model.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=list(target_modules) or _ALL_LINEAR,
        fan_in_fan_out=model.config.model_type == "gpt2",  # whose layers hold their transposes
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        try:
            inject_adapter_in_model(config, model)
        except ValueError as error:
            names = sorted(
                {
                    name.rpartition(".")[2]
                    for name, module in model.named_modules()
                    if "layers." in name and hasattr(module, "weight") and module.weight.ndim == 2
                }
            )
            raise InputError(
                f"lora_target_modules {list(target_modules)} are no linear layers of a "
                f"{model.config.model_type} model; there are {', '.join(names)}"
            ) from error
    if trained_token_id is not None:
        embedding = model.get_input_embeddings()
        model.set_input_embeddings(_EmbeddingWithRow(embedding, trained_token_id))


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What is trained, by parameter name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_adapters(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """The inverse of `adapter_tensors`."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(tensors[name])


@torch.no_grad()
def changed_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that adapters change, merged, by their names in the plain model."""
    from peft.tuners.lora import LoraLayer

    changed: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            adapter: Any = module
            weight = adapter.get_base_layer().weight
            changed[f"{name}.weight"] = weight + adapter.get_delta_weight(_ADAPTER).to(weight.dtype)
        elif isinstance(module, _EmbeddingWithRow):
            changed[f"{name}.weight"] = module.weight
    return changed


def merged_model(model: Any) -> Any:
    """A plain transformers model of the same class, to be saved: the adapters are merged into its
    weights. Weights that no adapter changes are shared with `model`, which stays as it is, and
    buffers that are not saved are not there.
    """
    weights = {
        name.replace(".base_layer.", "."): value
        for name, value in model.state_dict().items()
        if ".lora_" not in name and not name.endswith(".row")
    }
    weights |= changed_weights(model)
    if model.config.tie_word_embeddings:
        # Tied anew below: the head has the mask's new row too.
        output = next(
            name
            for name, module in model.named_modules()
            if module is model.get_output_embeddings()
        )
        weights.pop(f"{output}.weight", None)
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config))
    plain.load_state_dict(weights, strict=False, assign=True)
    plain.tie_weights()
    left = [name for name, p in plain.named_parameters() if p.is_meta]
    assert not left, f"weights that the merged model did not get: {left}"
    plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.eval()
