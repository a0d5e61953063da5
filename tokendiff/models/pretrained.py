"""Models of transformers by name: of the hub, a folder, or a checkpoint of ours behind a URI.

Whatever field of the config names a model, its config and its weights are read here, and its
tokenizer by `tokendiff.data.tokenizers.open_tokenizer`: every field takes the same names, and is
named by the error where one cannot be opened.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokendiff.artifacts.model_folders import (
    CONFIG_NAME,
    DRAFT_ARCHITECTURES,
    check_there,
    lacks_weights,
    local_model,
    longest_row,
    revision_of,
)
from tokendiff.data.tokenizers import errors_alone
from tokendiff.errors import InputError, input_errors, raise_outage
from tokendiff.models.families import (
    PUBLISHED_TYPES,
    family_of,
    published_type,
    type_of,
)

if TYPE_CHECKING:
    import torch

_NO_WEIGHTS = "give a folder that holds them, or a hub name"
_WEIGHTS_NAME = "model.safetensors"
_SHOWN = 3


def open_config(name: str, *, field: str, remedy: str, trust_remote_code: bool = False) -> Any:
    """The transformers config behind a name, of the architecture that the model is.

    Args:
        field: of the config that gave the name.
        remedy: what to give in its place.
        trust_remote_code: run code that comes with the model, where transformers has none for it.

    Raises:
        InputError: there is none, or transformers cannot read it.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, __version__

    # Registers our own architectures, which a checkpoint may be of.
    import tokendiff.models.diffusion_transformer
    import tokendiff.models.llada_moe  # noqa: F401

    with input_errors(f"{field} {name!r} cannot be opened", remedy):
        check_there(name)
        folder = local_model(name)
        revision = revision_of(name)
        fields, _ = PreTrainedConfig.get_config_dict(folder, **revision)
        family = family_of(type_of(fields))
        if family.same_as is None or family.layout is None:
            if not trust_remote_code:
                _check_type(fields)
            return AutoConfig.from_pretrained(
                folder, trust_remote_code=trust_remote_code, **revision
            )
        if family.same_as not in CONFIG_MAPPING:
            raise ValueError(
                f"models of type {type_of(fields)!r} need transformers 5.20 or newer; "
                f"{__version__} is installed"
            )
        foreign = ("model_type", "architectures", "auto_map")
        own = family.layout.to_transformers(fields)
        kept = {key: value for key, value in own.items() if key not in foreign}
        if family.attention == "rows":
            kept["is_causal"] = False
        return AutoConfig.for_model(
            family.same_as,
            published_model_type=type_of(fields),
            published_name=name,
            published_config={k: v for k, v in fields.items() if k != "_commit_hash"},
            **kept,
        )


def _check_type(fields: dict[str, Any]) -> None:
    """Raise ValueError where a config.json is of a type that only code beside it could open."""
    from transformers import CONFIG_MAPPING

    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type in CONFIG_MAPPING:
        return
    raise ValueError(
        f"neither transformers nor tokendiff knows models of type {model_type!r} (tokendiff adds "
        f"{', '.join(PUBLISHED_TYPES)}); to sample from one, run the code that comes with it: "
        "jobs.generate with trust_remote_code"
    )


def longest_input(config: Any) -> int | None:
    """The most tokens that a model of this config takes; None where it does not say."""
    return longest_row(config.get_text_config().to_dict())


def check_length(config: Any, name: str, *, field: str, max_length: int) -> None:
    """Raise InputError where a model of this config cannot take rows of max_length tokens."""
    longest = longest_input(config)
    if longest is not None and longest < max_length:
        raise InputError(
            f"{field} {name!r} takes at most {longest} tokens; max_length is {max_length}: "
            "preprocess with a lower one, or give another model"
        )


def dtype_in_files(name: str) -> "torch.dtype | None":
    """What the floating-point numbers in a model's files are, on this machine; None where they are
    of several kinds, or in no safetensors files.
    """
    import torch
    from safetensors import safe_open

    known = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
    known["BF16"] = torch.bfloat16
    folder, found = Path(local_model(name)), set()
    if folder.is_dir():
        paths = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    else:
        paths = _cached_weights(name)
    for path in paths:
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    kinds = {known[dtype] for dtype in found if dtype in known}
    return kinds.pop() if len(kinds) == 1 else None


def _cached_weights(name: str) -> list[Path]:
    """The safetensors files of a hub model that are on this machine."""
    from transformers.utils import cached_file

    def cached(file: str) -> str | None:
        found: str | None = cached_file(
            local_model(name),
            file,
            _raise_exceptions_for_missing_entries=False,
            **revision_of(name),
        )
        return found

    index = cached(f"{_WEIGHTS_NAME}.index.json")
    names = [_WEIGHTS_NAME]
    if index is not None:
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    return [Path(path) for file in names if (path := cached(file)) is not None]


def _ask_for_weights(name: str) -> None:
    """Raise the error of a hub that does not answer: where transformers could not ask for weights
    it says that there are none.
    """
    from transformers.utils import cached_file

    if Path(local_model(name)).is_dir():
        return
    try:
        cached_file(local_model(name), _WEIGHTS_NAME, **revision_of(name))
    except OSError as error:
        raise_outage(error, f"{_WEIGHTS_NAME} of {name}")


def commits_of(names: Mapping[str, str | None]) -> dict[str, str]:
    """The commits of those of `names` (by the field that gave them) that are of hub models which
    were opened, by the field.
    """
    found = {field: commit_of(name) for field, name in names.items() if name is not None}
    return {field: commit for field, commit in found.items() if commit is not None}


def commit_of(name: str) -> str | None:
    """The commit of a hub model that was opened by this name; None of a folder, and of a built-in
    model.
    """
    from huggingface_hub import try_to_load_from_cache

    if ":" in name or Path(local_model(name)).is_dir():
        return None
    path = try_to_load_from_cache(local_model(name), CONFIG_NAME, **revision_of(name))
    return Path(path).parent.name if isinstance(path, str) else None


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model, and what the name that it was opened by had no weights for.

    Attributes:
        origin: the field and the name, as errors begin.
        missing: parameters that are new and random. A head that is tied to the embedding is none.
        unused: weights that the model has no place for.
        missing_share: of the model's numbers, those that are new.
    """

    model: Any
    origin: str
    missing: list[str]
    unused: list[str]
    missing_share: float

    def complete(self) -> Any:
        """The model, to be used as it is.

        Raises:
            InputError: some of its weights are new.
        """
        if self.missing:
            raise InputError(
                f"{self.origin} has no weights for {_listed(self.missing)}; give a folder "
                "with all of the weights that its config describes"
            )
        return self.model

    def told(self, warn: Callable[[str], None]) -> Any:
        """The model, to be trained further; `warn` hears which weights are new, and which were not
        used.

        Raises:
            InputError: more of it would be new than was read.
        """
        share = f"{100 * self.missing_share:.2g} % of the model"
        if self.missing_share > 0.5:
            idle = f", and others that it does not use: {_listed(self.unused)}" * bool(self.unused)
            raise InputError(
                f"{self.origin} has no weights for {_listed(self.missing)}, {share}{idle}; give "
                "the folder of the whole model, or from_scratch to start from new weights alone"
            )
        if self.missing:
            warn(
                f"{self.origin} has no weights for {_listed(self.missing)}; "
                f"{len(self.missing)} parameters, {share}, start new and random"
            )
        if self.unused:
            warn(
                f"{self.origin}: {len(self.unused)} of its weights have no place in the model and "
                f"are not used: {_listed(self.unused)}"
            )
        return self.model


def open_weights(
    model_class: Any,
    name: str,
    config: Any,
    *,
    field: str,
    dtype: "torch.dtype",
    remedy: str = _NO_WEIGHTS,
    trust_remote_code: bool = False,
) -> Weights:
    """A model of a config that `open_config` read, on the CPU, with the weights behind its name.

    Args:
        model_class: an Auto class of transformers, or the class of a model.
        field: of the config that gave the name.
        dtype: where it is that of the files, weights stay in them until they are read, and are no
            memory of this process then either.
        remedy: what to do where there are no weights.

    Raises:
        InputError: there are no weights, or they cannot be read, or have other shapes than the
            config says.
        ConnectionError: the hub does not answer, and the weights are not in its cache.
    """
    check_weights(name, field=field, remedy=remedy)
    folder, origin = local_model(name), f"{field} {name!r}"
    layout = family_of(published_type(config)).layout
    own_names = (
        {} if layout is None else layout.patterns(config.get_text_config().num_hidden_layers)
    )
    with (
        quietly(),
        input_errors(f"{origin}: weights cannot be read", "give files that are whole"),
    ):
        try:
            model, info = model_class.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                key_mapping=own_names or None,
                ignore_mismatched_sizes=True,  # said below, with the names
                **revision_of(name),
            )
        except OSError:
            _ask_for_weights(name)
            raise
    if own_names:
        model._weight_conversions = None  # it is the layout that names weights in files again
    if mismatched := sorted(info["mismatched_keys"]):
        key, there, here = mismatched[0]
        raise InputError(
            f"{origin}: {len(mismatched)} of its weights have another shape than its config says "
            f"({key} is {list(there)}, not {list(here)}, for one); one of the two belongs to "
            "another model"
        )
    missing = _distinct_parameters(model, info["missing_keys"])
    total = sum(parameter.numel() for parameter in model.parameters())
    return Weights(
        model=model,
        origin=origin,
        missing=list(missing),
        unused=sorted(info["unexpected_keys"]),
        missing_share=sum(missing.values()) / max(total, 1),
    )


@contextmanager
def quietly() -> Iterator[None]:
    """In this block transformers draws no bars over the job's progress, but for downloads, and
    prints no table of weights that were missing or not used, which `Weights` names, nor how its own
    tensor parallelism, which is not used here, would spread them.
    """
    from transformers.utils.logging import set_tqdm_hook

    before = set_tqdm_hook(lambda factory, args, kwargs: factory(*args, **kwargs, disable=True))
    try:
        with errors_alone(
            "transformers.modeling_utils", "transformers.distributed.tensor_parallel"
        ):
            yield
    finally:
        set_tqdm_hook(before)


def check_weights(name: str, *, field: str, remedy: str = _NO_WEIGHTS) -> None:
    """Raise InputError where the name is that of a folder without weights; none is read."""
    if lacks_weights(Path(local_model(name))):
        raise InputError(f"{field} {name!r}: a config but no weights; {remedy}")


def check_causal_model(config: Any, name: str, *, field: str, is_one_way: bool = True) -> None:
    """Raise InputError where a config is not that of a causal language model.

    Args:
        is_one_way: refuse also one that was changed to attend in both directions, which does not
            give the next token any more.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    if is_draft_config(config):
        raise InputError(f"{field} {name!r} is a DFlash draft; give the model it drafts for")
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or has_own_code
    # BERT and its kind are in both mappings.
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    is_encoder = is_encoder and not getattr(config, "is_decoder", False)
    sees_both_ways = is_one_way and not getattr(config, "is_causal", True)
    if not is_causal or is_encoder or sees_both_ways:
        raise InputError(
            f"{field} {name!r} is of type {config.model_type!r}, not a causal language model, "
            "which gives the next token; give a GPT-2, Qwen, Llama, ..."
        )


def is_draft_config(config: Any) -> bool:
    """Whether a transformers config is that of a DFlash draft, of either layout."""
    return not DRAFT_ARCHITECTURES.isdisjoint(getattr(config, "architectures", None) or [])


def _distinct_parameters(model: Any, keys: set[str]) -> dict[str, int]:
    """The parameters among `keys`, each once though it may have several names, with its size; and
    buffers that belong in files, which are any memory where they are missing.
    """
    found: dict[int, tuple[str, int]] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if name in keys:
                found.setdefault(id(tensor), (name, tensor.numel()))
    return dict(found.values())


def _listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
