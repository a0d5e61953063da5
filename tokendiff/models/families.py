"""What is known of a family of models that its config does not say, by model_type: the closed table
that a new family is added to.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokendiff.models.layouts import LLADA, LLADA2, LLADA_MOE, SAME_FIELDS, Layout


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model_type.

    Attributes:
        same_as: the model_type of transformers with the same architecture; the family's own, where
            transformers has it. Its models are opened as that type, with other attention masks, and
            the code that comes with their weights is not run.
        layout: how its files differ from those of `same_as`.
        can_see_both_ways: a causal architecture that can be trained as a denoiser: attention is all
            that mixes its positions, it honours the config's `is_causal`, and its logits are a
            linear map of the last hidden state (no soft-capping, no scale).
        attention: what a position of a published checkpoint sees: "causal", up to itself;
            "blocks", also the rest of its block; "rows", the whole row; "canvas", clean text sees
            up to itself, and a decoder sees that and its whole block.
        noise: what its blocks or rows are made of before they are filled in: "mask", or "uniform",
            random tokens.
        prediction: what its output is about random tokens; see `NoiseProcess`.
        predict: "own", a position's state tells its own token, or "next", the one behind it.
        mask_token_id: its mask, where neither config nor tokenizer tells.
        chat_template: how its chats are written, where its tokenizer does not say.
        stop_tokens: what ends an answer, beside the EOS of its tokenizer.
        sampler: the one that `jobs.generate` uses where the user names none, and that errors advise
            where another was asked for that does not go with it.
    """

    same_as: str | None = None
    layout: Layout | None = None
    can_see_both_ways: bool = False
    attention: Literal["causal", "blocks", "rows", "canvas"] = "causal"
    noise: Literal["mask", "uniform"] = "mask"
    prediction: Literal["loo", "posterior"] = "loo"
    predict: Literal["own", "next"] = "own"
    mask_token_id: int | None = None
    chat_template: str | None = None
    stop_tokens: tuple[str, ...] = ()
    sampler: str = "ar"


_LLADA_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

FAMILIES: dict[str, Family] = {
    "Dream": Family(  # arXiv 2508.15487: Qwen2.5 that was trained on as a denoiser
        same_as="qwen2",
        layout=SAME_FIELDS,
        attention="rows",
        predict="next",
        mask_token_id=151_666,
        chat_template=_CHATML,
        stop_tokens=("<|im_end|>",),
        sampler="blockwise",
    ),
    "diffusion_gemma": Family(
        same_as="diffusion_gemma",
        layout=SAME_FIELDS,
        attention="canvas",
        noise="uniform",
        prediction="posterior",
        sampler="canvas",
    ),
    "gpt2": Family(can_see_both_ways=True),
    "gpt_neox": Family(can_see_both_ways=True),
    "llada": Family(  # arXiv 2502.09992
        same_as="llama",
        layout=LLADA,
        attention="rows",
        mask_token_id=126_336,
        chat_template=_LLADA_CHAT,
        stop_tokens=("<|eot_id|>",),
        sampler="blockwise",
    ),
    "llada2_moe": Family(  # LLaDA2.0 and 2.1
        same_as="tokendiff_llada2",
        layout=LLADA2,
        attention="blocks",
        mask_token_id=156_895,
        sampler="block_refinement",
    ),
    "lladamoe": Family(
        same_as="tokendiff_lladamoe",
        layout=LLADA_MOE,
        attention="rows",
        stop_tokens=("<|role_end|>",),
        sampler="blockwise",
    ),
    "llama": Family(can_see_both_ways=True),
    "mistral": Family(can_see_both_ways=True),
    "olmo2": Family(can_see_both_ways=True),
    "qwen2": Family(can_see_both_ways=True),
    "qwen3": Family(can_see_both_ways=True),
    "sdar": Family(  # arXiv 2510.06303
        same_as="qwen3", layout=SAME_FIELDS, attention="blocks", sampler="sdar"
    ),
}
CAUSAL_TYPES = tuple(name for name, family in FAMILIES.items() if family.can_see_both_ways)
PUBLISHED_TYPES = tuple(name for name, family in FAMILIES.items() if family.same_as is not None)
# Causal architectures that see what a mask of ours shows.
MASKED_TYPES = (*CAUSAL_TYPES, "tokendiff_llada2")
# Architectures that keep keys and values, and whose logits are linear in the last hidden state.
DECODER_TYPES = (*MASKED_TYPES, "tokendiff_lladamoe")
WHOLE_ROW_TYPES = tuple(name for name, family in FAMILIES.items() if family.attention == "rows")


def type_of(fields: Mapping[str, Any]) -> object:
    """The model_type of a config.json, as the table has it: LLaDA-MoE is published under that of
    LLaDA.
    """
    model_type = fields.get("model_type")
    return "lladamoe" if model_type == "llada" and "num_experts" in fields else model_type


def family_of(model_type: object) -> Family:
    """What is known of a model_type; of one that is not in the table, nothing."""
    return FAMILIES.get(model_type, Family()) if isinstance(model_type, str) else Family()


def published_type(config: Any) -> str:
    """The model_type that a transformers config was published under."""
    model_type: str = getattr(config, "published_model_type", config.model_type)
    return model_type
