"""LLaDA2.x as an architecture that transformers has: GLM-4.5, which computes the same from weights
that lie differently in files.

Importing this module registers it, so that AutoModelForCausalLM opens the config that
`tokendiff.models.layouts` makes of a published one. The conversion of weights is transformers' own
kind, so it is undone the same way when they are saved.

Source: the technical reports of LLaDA2.0 and 2.1. Their experts and shared experts, the choice of
experts in groups by sigmoid with a bias, the norms of queries and keys and the rotation of part of
each head are those of Ling 2.0 (BailingMoeV2).
"""

from transformers import AutoConfig, AutoModelForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import Split, WeightConverter, WeightRenaming

# Not the published name: weights of that type are read as they are by the code that comes with it.
MODEL_TYPE = "tokendiff_llada2"


class LLaDA2Config(Glm4MoeConfig):
    model_type = MODEL_TYPE


class LLaDA2ForCausalLM(Glm4MoeForCausalLM):
    config_class = LLaDA2Config
    config: LLaDA2Config
    # transformers looks for it in the source of a class's own module, and takes the slowest way to
    # compute experts where it finds nothing.
    _can_set_experts_implementation_cached_value = True


register_checkpoint_conversion_mapping(
    MODEL_TYPE,
    [
        *get_checkpoint_conversion_mapping("glm4_moe"),  # experts, which are one tensor here
        WeightRenaming(r"^model\.word_embeddings\.", "model.embed_tokens."),
        WeightRenaming(r"\.attention\.", ".self_attn."),
        WeightRenaming(r"\.self_attn\.dense\.", ".self_attn.o_proj."),
        WeightRenaming(r"\.query_layernorm\.", ".q_norm."),
        WeightRenaming(r"\.key_layernorm\.", ".k_norm."),
        WeightRenaming(r"\.gate\.expert_bias", ".gate.e_score_correction_bias"),
        WeightConverter(
            source_patterns="query_key_value.weight",
            target_patterns=["q_proj.weight", "k_proj.weight", "v_proj.weight"],
            operations=[Split(dim=0)],
        ),
    ],
    overwrite=True,
)
AutoConfig.register(MODEL_TYPE, LLaDA2Config, exist_ok=True)
AutoModelForCausalLM.register(LLaDA2Config, LLaDA2ForCausalLM, exist_ok=True)
