"""The LLaDAs with experts as architectures that transformers has: LLaDA-MoE is a Qwen3 with experts
and LLaDA2.x a GLM-4.5, which compute the same from weights that lie differently in files.

Importing this module registers both, so that AutoModelForCausalLM opens the configs that
`tokendiff.models.layouts` makes of published ones. The conversion of weights is transformers' own
kind, so it is undone the same way when they are saved.

They have model types of their own: weights of the published types are read as they are by the code
that comes with them, and of transformers' types peft takes experts for linear layers.

Source: the technical reports of LLaDA-MoE, LLaDA2.0 and 2.1. In LLaDA2 the experts and shared
experts, the choice of experts in groups by sigmoid with a bias, the norms of queries and keys and
the rotation of part of each head are those of Ling 2.0 (BailingMoeV2).
"""

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    core_model_loading,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightConverter, WeightRenaming

LLADA_MOE_TYPE = "tokendiff_lladamoe"
LLADA2_TYPE = "tokendiff_llada2"


class LLaDAMoEConfig(Qwen3MoeConfig):
    model_type = LLADA_MOE_TYPE


class LLaDAMoEForCausalLM(Qwen3MoeForCausalLM):
    config_class = LLaDAMoEConfig
    config: LLaDAMoEConfig
    _can_set_experts_implementation_cached_value = True  # see below


class LLaDA2Config(Glm4MoeConfig):
    model_type = LLADA2_TYPE


class LLaDA2ForCausalLM(Glm4MoeForCausalLM):
    config_class = LLaDA2Config
    config: LLaDA2Config
    # transformers looks for it in the source of a class's own module, and takes the slowest way to
    # compute experts where it finds nothing.
    _can_set_experts_implementation_cached_value = True


register_checkpoint_conversion_mapping(
    LLADA_MOE_TYPE, get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True
)
AutoConfig.register(LLADA_MOE_TYPE, LLaDAMoEConfig, exist_ok=True)
AutoModelForCausalLM.register(LLaDAMoEConfig, LLaDAMoEForCausalLM, exist_ok=True)

if hasattr(core_model_loading, "Split"):  # since 5.20: into parts of several sizes
    register_checkpoint_conversion_mapping(
        LLADA2_TYPE,
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
                operations=[core_model_loading.Split(dim=0)],
            ),
        ],
        overwrite=True,
    )
    AutoConfig.register(LLADA2_TYPE, LLaDA2Config, exist_ok=True)
    AutoModelForCausalLM.register(LLaDA2Config, LLaDA2ForCausalLM, exist_ok=True)
