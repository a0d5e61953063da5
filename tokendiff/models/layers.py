"""The layers of a model of transformers, what their weights are numbers of, and what versions of
transformers name differently.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tokendiff.errors import InputError

# Of one layer's code, or of flex attention's: for each kind of layer (ModernBERT has three), of
# mask and of shape, with gradient and without. torch gives up after eight, and goes on uncompiled:
# flex attention then holds all scores in memory.
_MOST_COMPILATIONS = 32


def find_layers(model: Any, *, field: str) -> list[nn.Module]:
    """The transformer layers of a model: its list of as many modules of one class as its config
    says that it has layers, with the most weights.

    Args:
        field: of the config, that needs to know them.

    Raises:
        InputError: there is no such list.
    """
    if layers := _layers_of(model):
        return layers
    raise InputError(
        f"{field}: it is not known which modules of a {model.config.model_type!r} model are its "
        f"layers; leave {field.partition(' ')[0]} out, or give a model that keeps them in one list"
    )


def compile_layers(encoder: Any) -> None:
    """torch.compile an encoder in place, layer by layer: their code is the same, and is compiled
    once for all of them. As one graph, the time to compile it would grow with their number.

    An encoder whose layers are not known (ALBERT's are all the same one) is compiled as a whole.
    """
    for module in _layers_of(encoder) or [encoder]:
        compile_module(module)


def compile_module(module: nn.Module) -> None:
    """torch.compile a module in place."""
    allow_compilations()
    module.compile()


def allow_compilations() -> None:
    """Have torch compile the same code for as many kinds of inputs as a training has."""
    limits: Any = torch._dynamo.config  # of the process
    limits.recompile_limit = max(limits.recompile_limit, _MOST_COMPILATIONS)


def _layers_of(model: Any) -> list[nn.Module]:
    """Those of `find_layers`; none where they are not known."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and len({type(layer) for layer in module}) == 1
    ]
    if not lists:
        return []
    sizes = [sum(p.numel() for p in found.parameters()) for found in lists]
    return list(lists[sizes.index(max(sizes))])


def to_float32(module: nn.Module) -> None:
    """Make float32 of the parameters that are of less; ties between them stay."""
    for parameter in module.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def round_for_autocast(model: nn.Module) -> None:
    """Hold in bfloat16 the weights that bf16 autocast would round whenever they are used: those of
    linear layers, which then take half the memory, and give the same numbers under it.

    Embeddings, norms and what is tied to an embedding stay: autocast leaves them in float32.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    of_layers = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
    others = {
        id(parameter)
        for module in model.modules()
        if not isinstance(module, nn.Linear)
        for parameter in module.parameters(recurse=False)
    }
    for parameter in model.parameters():
        if id(parameter) in of_layers - others and parameter.dtype == torch.float32:
            parameter.data = parameter.data.bfloat16()


def hidden_states_asked(indices: list[int]) -> list[int] | bool:
    """The value of `output_hidden_states` that makes a transformers model return the hidden states
    with these indices; index 0 is the embedding's output. Versions that cannot select return all.
    """
    return (indices if _takes_indices() else True) if indices else False


def _takes_indices() -> bool:
    """Older versions take a list of layers too, but count them without the embedding's output."""
    import transformers

    return tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """A cache by the name that `model.forward` has for it. transformers 5.24 calls it `cache` and
    warns of `past_key_values`, which older versions and code that comes with a model take.
    """
    return {_name_of_cache(type(model).forward): cache}


@functools.cache
def _name_of_cache(forward: Callable[..., Any]) -> str:
    known = inspect.signature(forward).parameters
    return "cache" if "cache" in known else "past_key_values"
