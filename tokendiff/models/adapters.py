"""Low-rank adapters (LoRA, arXiv 2106.09685) on a causal model, by the optional library peft.

Only the adapters are trained, and the one row of the input embedding that the mask has: to the
pretrained model it is a new token. A tied head has that row too once it is saved; where training
reads the mask's logit, it has the row before, and gives it no gradient.

What is saved is a plain transformers model with the adapters merged into its weights; the adapters
themselves are kept beside the training state. Where the base model is to stay what it was
(`kept_base`), its weights are saved as they are, and the adapters beside them.

A DiffusionGemma has each weight twice, in its encoder and in its decoder, and so each adapter: the
same module stands in both. Its experts and what routes to them have none by default.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokendiff.artifacts.tensor_files import whole, with_row
from tokendiff.errors import InputError
from tokendiff.models.diffusion_gemma import MODEL_TYPE

_ALL_LINEAR = "all-linear"  # peft's name for every linear layer but the head
_ADAPTER = "default"
_ROUTER = "router.proj"


class _EmbeddingWithRow(nn.Module):
    """An embedding of which one row is trained, or that has one row more.

    Args:
        start: [D] of that row.

    Attributes:
        counts_at: [B, N] bool, where the row counts, or False for nowhere; by default everywhere. A
            token that the embedding does not have has no other row.
    """

    def __init__(self, embedding: nn.Embedding, index: int, start: Tensor) -> None:
        super().__init__()
        self.base_layer = embedding
        self.index = index
        self.row = nn.Parameter(start.detach().clone())
        self.counts_at: Tensor | bool = True

    @property
    def weight(self) -> Tensor:
        """[V, D] of all rows."""
        row = whole(self.row.detach())
        return with_row(self.base_layer.weight, self.index, row)

    @property
    def num_embeddings(self) -> int:
        return self.base_layer.num_embeddings

    def forward(self, tokens: Tensor) -> Tensor:
        is_row = tokens == self.index
        if self.index >= self.num_embeddings:
            tokens = tokens.masked_fill(is_row, 0)
        else:
            is_row = is_row & self.counts_at
        states: Tensor = self.base_layer(tokens)
        return torch.where(is_row[..., None], self.row.to(states.dtype), states)


class DraftAdapters:
    """Adapters of a model that is to stay what it was: they count only at positions where it
    drafts, which each pass is told of. Elsewhere it computes what it did without them.

    Args:
        model: that `add_adapters` was given.
    """

    def __init__(self, model: nn.Module) -> None:
        from peft.tuners.lora import LoraLayer

        modules = list(model.modules())
        self._layers: list[Any] = [m for m in modules if isinstance(m, LoraLayer)]
        self._embeddings = [m for m in modules if isinstance(m, _EmbeddingWithRow)]
        self._weight: Tensor | None = None
        self._is_off = False
        for layer in self._layers:
            layer.lora_B[_ADAPTER].register_forward_hook(self._weighted)

    def count_at(self, is_draft: Tensor | None) -> None:
        """Set the positions at which the adapters change a layer's output in all later passes.

        Args:
            is_draft: [B, N] bool; None turns them off everywhere.
        """
        self._weight = None if is_draft is None else is_draft[..., None]
        for embedding in self._embeddings:
            embedding.counts_at = False if is_draft is None else is_draft
        if self._is_off == (is_draft is None):
            return
        self._is_off = is_draft is None
        for layer in self._layers:
            # Where they are off, a layer is the one that it was, and takes no longer: peft's own
            # way of turning adapters off took a quarter of a pass of narrow layers.
            if self._is_off:
                layer.forward = layer.get_base_layer().forward
            else:
                del layer.forward

    def _weighted(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        assert self._weight is not None
        return output * self._weight.to(output.dtype)


def add_adapters(
    model: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str],
    trained_token_id: int | None,
    seed: int,
    is_new_token: bool = False,
    reads_its_logit: bool = False,
) -> None:
    """Freeze a transformers model and put trainable adapters into it, in place.

    Args:
        alpha: an adapter adds alpha / rank times the product of its two matrices.
        target_modules: last parts of the names of linear layers; none is every one but the head and
            what routes to experts.
        trained_token_id: the token whose embedding is trained too.
        seed: decides the adapters' first weights; what they add starts at zero.
        is_new_token: the model does not know that token, and its own embedding, which may have no
            such row, stays as it is: the token's starts at the mean of the others.
        reads_its_logit: that token's logit counts in training; a tied head gets its row then.

    Raises:
        InputError: peft is not installed, or no layer has such a name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError(
            "adapters (lora_rank, or a checkpoint that keeps its base) need the library peft; "
            "install it with pip install 'tokendiff[lora]'"
        ) from error
    model.requires_grad_(False)
    has_halves = model.config.model_type == MODEL_TYPE
    part = model.model.decoder if has_halves else model
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=list(target_modules) or _ALL_LINEAR,
        exclude_modules=None if target_modules or not _has_router(part) else [_ROUTER],
        fan_in_fan_out=model.config.model_type == "gpt2",  # whose layers hold their transposes
    )
    with torch.random.fork_rng(devices=[]), _as_float32(model):
        torch.manual_seed(seed % 2**63)
        try:
            inject_adapter_in_model(config, part)
        except ValueError as error:
            names = sorted(
                {
                    name.rpartition(".")[2]
                    for name, module in part.named_modules()
                    if "layers." in name and hasattr(module, "weight") and module.weight.ndim == 2
                }
            )
            raise InputError(
                f"lora_target_modules {list(target_modules)}: a {model.config.model_type} model "
                f"has no linear layers of these names; it has {', '.join(names)}"
            ) from error
    if has_halves:
        _give_to_encoder(model)
    if trained_token_id is not None:
        embedding = model.get_input_embeddings()
        weight = embedding.weight.detach()
        start = weight[:trained_token_id].mean(0) if is_new_token else weight[trained_token_id]
        row = _EmbeddingWithRow(embedding, trained_token_id, start.float())
        head = model.get_output_embeddings()
        is_tied = head is not None and head.weight is embedding.weight
        model.set_input_embeddings(row)
        if is_tied and reads_its_logit:
            head.register_forward_hook(partial(_with_logit_of, row))


def _has_router(model: nn.Module) -> bool:
    """peft warns of a name that it is to leave out and does not find."""
    return any(name.endswith(_ROUTER) for name, _ in model.named_modules())


def _give_to_encoder(model: Any) -> None:
    """Put the adapted modules of the decoder's layers into the encoder, where the weights that they
    adapt stand too.
    """
    from peft.tuners.lora import LoraLayer

    encoder, decoder = model.model.encoder.language_model.layers, model.model.decoder.layers
    for name, module in decoder.named_modules():
        if isinstance(module, LoraLayer):
            encoder.set_submodule(name, module)


def _with_logit_of(
    embedding: _EmbeddingWithRow, head: nn.Module, inputs: tuple[Tensor], logits: Tensor
) -> Tensor:
    """What a tied head gives once it has the trained row."""
    row = whole(embedding.row.detach()).to(logits.dtype)
    logits[..., embedding.index] = inputs[0].to(logits.dtype) @ row
    return logits


@contextmanager
def _as_float32(model: nn.Module) -> Iterator[None]:
    """Inside this block weights of less look like float32, in no memory: an adapter gets the dtype
    of what it is beside, and what is trained is float32.
    """
    kept = {
        parameter: parameter.data
        for parameter in model.parameters()
        if parameter.dtype in (torch.bfloat16, torch.float16)
    }
    for parameter in kept:
        nothing = torch.zeros((), dtype=torch.float32, device=parameter.device)
        parameter.data = nothing.expand(parameter.shape)
    try:
        yield
    finally:
        for parameter, data in kept.items():
            parameter.data = data


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors by parameter name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def changed_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights that adapters change, merged, by their names in the plain model; one by one, each
    made when it is asked for.
    """
    for name, merge in _merges(model).items():
        yield name, merge()


def base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All weights of the plain model as they were without adapters; of tied ones the first."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, value in model.state_dict().items():
        plain = name.replace(".base_layer.", ".")
        if ".lora_" not in name and not name.endswith(".row") and plain not in tied:
            yield plain, value


def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """All weights of the plain model, the adapters merged into them, in the order of its own. A
    head that is tied to the embedding is not among them: it has the mask's new row too.
    """
    merges = _merges(model)
    for name, value in base_weights(model):
        yield name, merges[name]() if name in merges else value


def _merges(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """What makes each of the weights that adapters change; of tied ones the first."""
    from peft.tuners.lora import LoraLayer

    tied = getattr(model, "all_tied_weights_keys", None) or {}
    found: dict[str, Callable[[], Tensor]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if f"{name}.weight" in tied:
            continue
        if isinstance(module, LoraLayer):
            found[f"{name}.weight"] = partial(_merged, module)
        elif isinstance(module, _EmbeddingWithRow):
            found[f"{name}.weight"] = partial(getattr, module, "weight")
    return found


@torch.no_grad()
def _merged(adapter: Any) -> Tensor:
    weight: Tensor = adapter.get_base_layer().weight
    return weight + adapter.get_delta_weight(_ADAPTER).to(weight.dtype)
