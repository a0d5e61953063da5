"""Published layouts: a `config.json` and names of weights that are a family's own, where the model
is an architecture of transformers all the same.

What is opened by a layout is written by it again (`tokendiff.training.state`), so that the loader
that a family was published with, and serving engines, open what was trained here.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokendiff.artifacts.model_folders import CONFIG_NAME, local_model

if TYPE_CHECKING:
    from torch import Tensor

_GENERATION_CONFIG = "generation_config.json"
# Fields that are ids of a tokenizer.
_TOKEN_FIELDS = ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a published folder differs from one that transformers wrote.

    Attributes:
        to_transformers: from the fields of the published config.json to those of the architecture's
            own config. Raises ValueError where the architecture cannot do what they ask for.
        sizes: names of the published fields that say how many embeddings there are.
        outer: names of weights outside the layers, from those of transformers.
        layer: what stands in front of the names of a layer's weights, with {} for its number: in
            transformers, and as published.
        inner: names of the weights in a layer, from those of transformers.
        is_converted: some tensors in files are parts of those in the model, or several in one, and
            names differ too: the conversion that transformers has for the architecture says how.
    """

    to_transformers: Callable[[Mapping[str, Any]], dict[str, Any]]
    sizes: tuple[str, ...] = ("vocab_size",)
    outer: Mapping[str, str] | None = None
    layer: tuple[str, str] = ("", "")
    inner: Mapping[str, str] | None = None
    is_converted: bool = False

    def published_name(self, name: str) -> str:
        """The name in published files of a weight that transformers calls `name`."""
        if self.outer is None or self.inner is None:
            return name
        module, _, kind = name.rpartition(".")
        pattern = re.escape(self.layer[0]).replace(r"\{\}", r"(\d+)")
        if found := re.match(pattern, module):
            rest = module[found.end() :]
            return f"{self.layer[1].format(found[1])}{self.inner.get(rest, rest)}.{kind}"
        return f"{self.outer.get(module, module)}.{kind}"

    def patterns(self, num_layers: int) -> dict[str, str]:
        """Regular expressions of published names, each with its name in transformers."""
        if self.outer is None or self.inner is None:
            return {}
        ours, theirs = self.layer
        modules = {theirs: ours for ours, theirs in self.outer.items()}
        for number in range(num_layers):
            for inner, published in self.inner.items():
                modules[theirs.format(number) + published] = ours.format(number) + inner
        return {
            f"^{re.escape(published)}\\.weight$": f"{module}.weight"
            for published, module in modules.items()
        }


def unchanged(fields: Mapping[str, Any]) -> dict[str, Any]:
    """For a family whose config.json already has the fields of its architecture."""
    # transformers warns of a field that it has another name for, also where it says nothing.
    return {k: v for k, v in fields.items() if k != "rope_scaling" or v is not None}


# Fields of LLaDA's config that a Llama has no place for: what they are where they are missing, and
# with which values the model is a Llama all the same.
_LLADA_FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "activation_type": ("swiglu", ("silu",)),
    "alibi": (False, (False,)),
    "attention_layer_norm": (False, (False,)),
    "bias_for_layer_norm": (None, (None, False)),
    "block_group_size": (1, (1,)),
    "block_type": ("sequential", ("llama",)),
    "clip_qkv": (None, (None,)),
    "embedding_dropout": (0.0, (0.0, None)),
    "embedding_layer_norm": (False, (False, None)),
    "include_bias": (False, (False,)),
    "include_qkv_bias": (False, (False, None)),
    "input_emb_norm": (False, (False,)),
    "layer_norm_type": ("default", ("rms",)),
    "layer_norm_with_affine": (True, (True,)),
    "multi_query_attention": (None, (None, False)),
    "norm_after": (False, (False, None)),
    "partial_rotary_factor": (1.0, (1.0, None)),
    "residual_dropout": (0.0, (0.0, None)),
    "rope": (False, (True,)),
    "rope_scaling": (None, (None,)),
    "scale_logits": (False, (False,)),
}


def _llama_of_llada(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Source: LLaDA (arXiv 2502.09992), App. B.1; the names of OLMo's configs, which it has."""
    _check_fixed(fields, _LLADA_FIXED, "Llama that LLaDA")
    width, num_heads = _size(fields, "d_model"), _size(fields, "n_heads")
    num_embeddings = fields.get("embedding_size") or fields.get("vocab_size")
    return {
        "vocab_size": num_embeddings,
        "hidden_size": width,
        "intermediate_size": fields.get("mlp_hidden_size") or fields.get("mlp_ratio", 4) * width,
        "num_hidden_layers": _size(fields, "n_layers"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.get("n_kv_heads") or num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields.get("max_sequence_length", 1024),
        "rms_norm_eps": fields.get("rms_norm_eps", 1e-5),
        "rope_theta": fields.get("rope_theta", 10_000.0),
        "attention_dropout": fields.get("attention_dropout", 0.0),
        "initializer_range": fields.get("init_std", 0.02),
        "tie_word_embeddings": fields.get("weight_tying", True),
        "bos_token_id": fields.get("bos_token_id"),
        "eos_token_id": fields.get("eos_token_id"),
        # Padding is EOS there: an embedding that knows its padding would not train that row.
        "pad_token_id": None,
        "mask_token_id": fields.get("mask_token_id"),
    }


def _check_fixed(
    fields: Mapping[str, Any], fixed: Mapping[str, tuple[Any, tuple[Any, ...]]], opened: str
) -> None:
    """Raise ValueError where a field has a value that the architecture has no place for."""
    for name, (default, allowed) in fixed.items():
        if (value := fields.get(name, default)) not in allowed:
            raise ValueError(
                f"{CONFIG_NAME} has {name} {value!r}, which the {opened} is opened as does not "
                f"support; supported is {' or '.join(map(repr, allowed))}"
            )


# The same of LLaDA-MoE and a Qwen3 with experts. Its config says "none" and "all" by -1 and -2 too.
_ONE_GROUP = (None, 1, 0, -1, -2)
_LLADA_MOE_FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    **dict.fromkeys(
        ("n_group", "topk_group", "router_num_group", "router_topk_group"), (None, _ONE_GROUP)
    ),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts"), (None, (None, 0, -1))),
    "clip_qkv": (None, (None,)),
    "moe_router_enable_expert_bias": (None, (None, False)),
    "moe_router_score_function": (None, (None, "softmax")),
    "partial_rotary_factor": (1.0, (1.0, None, -1)),
    "qk_layernorm": (None, (True,)),
    "rope_scaling": (None, (None,)),
    "routed_scaling_factor": (1.0, (1.0, None)),
    "shared_expert_intermediate_size": (-1, (None,)),
}


def _qwen3_of_llada_moe(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Its router takes the softmax over all experts and does not scale the chosen ones up to 1,
    whatever its norm_topk_prob says.
    """
    _check_fixed(fields, _LLADA_MOE_FIXED, "Qwen3 with experts that LLaDA-MoE")
    frequency = fields.get("moe_layer_freq") or [1] * _size(fields, "num_hidden_layers")
    renamed = {
        "head_dim": _size(fields, "hidden_size") // _size(fields, "num_attention_heads"),
        "intermediate_size": fields.get("dense_intermediate_size"),
        "moe_intermediate_size": fields.get("expert_intermediate_size"),
        "mlp_only_layers": [layer for layer, times in enumerate(frequency) if times == 0],
        "norm_topk_prob": False,
        "pad_token_id": None,  # it is EOS, as LLaDA's
        "num_key_value_heads": fields.get("num_key_value_heads")
        or _size(fields, "num_attention_heads"),
    }
    kept = {name: value for name, value in fields.items() if name not in _LLADA_MOE_FIXED}
    return {**kept, **renamed}


# The same of LLaDA2.x and GLM-4.5; what is missing is what its own config class says.
_LLADA2_FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "moe_router_enable_expert_bias": (True, (True, None)),
    "norm_head": (False, (False, None)),
    "norm_softmax": (False, (False, None)),
    "num_nextn_predict_layers": (0, (0, None)),
    "rope_scaling": (None, (None,)),
    "router_dtype": ("fp32", ("fp32", None)),
    "score_function": ("sigmoid", ("sigmoid", None)),
    "use_bias": (True, (False,)),
    "use_qk_norm": (True, (True, None)),
    "use_qkv_bias": (False, (False, None)),
    "use_rmsnorm": (True, (True, None)),
    "use_sliding_window": (False, (False, None)),
    "using_split_qkv_in_self_attention": (False, (False, None)),
}


_LLADA2_SIZES = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)


def _glm_of_llada2(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Its router scales the chosen scores up to 1 where there are several, whatever its
    norm_topk_prob says. Dropout of embeddings and outputs, and rotary_dim, are read by nothing.
    """
    _check_fixed(fields, _LLADA2_FIXED, "GLM-4.5 that LLaDA2")
    rope = dict(fields.get("rope_parameters") or {})  # as transformers 5 writes it
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"{CONFIG_NAME} has rope_parameters {rope!r}; supported is 'default'")
    sizes = {name: _size(fields, name) for name in _LLADA2_SIZES}
    num_experts, num_groups = _size(fields, "num_experts"), fields.get("n_group", 8)
    chosen = fields.get("topk_group", 4)
    of_group = num_experts // num_groups
    if num_experts % num_groups or of_group < 2 or not 1 <= chosen <= num_groups:
        raise ValueError(
            f"{CONFIG_NAME} has num_experts {num_experts}, n_group {num_groups} and topk_group "
            f"{chosen}; the groups must be equal, of two experts or more, and some be chosen"
        )
    if sizes["num_experts_per_tok"] > chosen * of_group:
        raise ValueError(
            f"{CONFIG_NAME} has num_experts_per_tok {sizes['num_experts_per_tok']}, and the chosen "
            f"groups have {chosen * of_group} experts"
        )
    return {
        **sizes,
        "head_dim": fields.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"],
        "hidden_act": fields.get("hidden_act", "silu"),
        "max_position_embeddings": fields.get("max_position_embeddings", 16_384),
        "rms_norm_eps": fields.get("rms_norm_eps", 1e-5),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(rope.get("rope_theta", fields.get("rope_theta", 10_000.0))),
            "partial_rotary_factor": rope.get(
                "partial_rotary_factor", fields.get("partial_rotary_factor", 0.5)
            ),
        },
        "attention_dropout": fields.get("attention_dropout", 0.1),
        "initializer_range": fields.get("initializer_range", 0.02),
        "tie_word_embeddings": fields.get("tie_word_embeddings", False),
        "use_qk_norm": True,
        "n_routed_experts": num_experts,
        "n_shared_experts": _size(fields, "num_shared_experts"),
        "n_group": num_groups,
        "topk_group": chosen,
        "norm_topk_prob": sizes["num_experts_per_tok"] > 1,
        "routed_scaling_factor": fields.get("routed_scaling_factor", 2.5),
        "first_k_dense_replace": fields.get("first_k_dense_replace", 0),
        "bos_token_id": fields.get("bos_token_id"),
        "eos_token_id": fields.get("eos_token_id"),
        "pad_token_id": None,  # it is EOS, as LLaDA's
        "mask_token_id": fields.get("mask_token_id"),
    }


def _size(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{CONFIG_NAME} must have {name}, a whole number, got {value!r}")
    return value


LLADA = Layout(
    to_transformers=_llama_of_llada,
    sizes=("vocab_size", "embedding_size"),
    outer={
        "model.embed_tokens": "model.transformer.wte",
        "model.norm": "model.transformer.ln_f",
        "lm_head": "model.transformer.ff_out",
    },
    layer=("model.layers.{}.", "model.transformer.blocks.{}."),
    inner={
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "q_proj",
        "self_attn.k_proj": "k_proj",
        "self_attn.v_proj": "v_proj",
        "self_attn.o_proj": "attn_out",
        "post_attention_layernorm": "ff_norm",
        "mlp.gate_proj": "ff_proj",
        "mlp.up_proj": "up_proj",
        "mlp.down_proj": "ff_out",
    },
)
LLADA_MOE = Layout(to_transformers=_qwen3_of_llada_moe, is_converted=True)
LLADA2 = Layout(to_transformers=_glm_of_llada2, is_converted=True)
SAME_FIELDS = Layout(to_transformers=unchanged)


def as_in_files(
    model: Any, pairs: "Iterable[tuple[str, Tensor]]"
) -> "Iterator[tuple[str, Tensor]]":
    """Weights of a model of a converted layout as its files have them, a layer at a time.

    Args:
        pairs: of all weights, layer by layer. What lies in parts on several workers is made whole,
            which all of them must ask for.
    """
    from transformers.core_model_loading import revert_weight_conversion

    from tokendiff.artifacts.tensor_files import whole

    def layer_of(pair: "tuple[str, Tensor]") -> str:
        found = re.match(r".*\.layers\.\d+\.", pair[0])
        return found[0] if found else pair[0]

    for _, layer in groupby(pairs, key=layer_of):
        tensors = {name: whole(tensor) for name, tensor in layer}
        yield from revert_weight_conversion(model, tensors).items()


def forget_publication(config: Any) -> None:
    """Make the config of a published model a plain one of transformers. The trained model is no
    longer of the family, so the family's own loader must not open it.
    """
    for name in ("published_model_type", "published_name", "published_config"):
        if hasattr(config, name):
            delattr(config, name)


def take_tokens(config: Any, layout: Layout, tokenizer: Any) -> None:
    """Give the config of a published model, in both of its forms, the special tokens of another
    tokenizer: those that it was published with may lie outside the new vocabulary.
    """
    published = config.published_config
    of_tokenizer = {name: getattr(tokenizer, name) for name in _TOKEN_FIELDS}
    config.published_config = published | {
        name: index for name, index in of_tokenizer.items() if name in published
    }
    opened = layout.to_transformers(config.published_config)
    for name in _TOKEN_FIELDS:
        if hasattr(config, name):
            setattr(config, name, opened.get(name))


def write_beside(config: Any, layout: Layout, folder: Path) -> None:
    """Write the published `config.json` of a model that was opened by a layout, and what its own
    loader needs beside it, over what `save_pretrained` wrote.

    Args:
        config: of transformers, as `open_config` made it.
    """
    fields = dict(config.published_config)
    opened = layout.to_transformers(fields)
    size = getattr(config, "vocab_size", None)  # a config of several parts has none, and never grew
    if size != opened.get("vocab_size"):  # the embedding grew
        fields |= dict.fromkeys(layout.sizes, size)
    mask = getattr(config, "mask_token_id", None)
    if mask != opened.get("mask_token_id"):
        fields["mask_token_id"] = mask
    fields |= {name: "float32" for name in ("torch_dtype", "dtype") if name in fields}
    name = local_model(config.published_name)
    source = Path(name)
    if source.is_dir():
        beside = list(source.glob("*.py"))
        known = json.loads((source / CONFIG_NAME).read_text())
        if all(fields.get(name) == known.get(name) for name in _TOKEN_FIELDS[:3]):
            beside.append(source / _GENERATION_CONFIG)  # which holds ids too
        for path in filter(Path.is_file, beside):
            shutil.copyfile(path, folder / path.name)
    elif "auto_map" in fields:  # the code stays where it is published
        fields["auto_map"] = {
            key: value if "--" in value else f"{name}--{value}"
            for key, value in fields["auto_map"].items()
        }
    (folder / CONFIG_NAME).write_text(json.dumps(fields, indent=2) + "\n")
