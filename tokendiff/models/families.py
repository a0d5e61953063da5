"""What is known of a family of models that its config does not say, by model_type: the closed table
that a new family is added to.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model_type.

    Attributes:
        same_as: the model_type of transformers that it is under a name of its own, with other
            attention masks; it is opened as that one, without the code that comes with its weights.
        can_see_both_ways: a causal architecture that can be trained as a denoiser: attention is all
            that mixes its positions, it honours the config's `is_causal`, and its logits are a
            linear map of the last hidden state (no soft-capping, no scale).
        sees_blocks_whole: a position sees the rest of its block; other causal models see up to
            themselves, unless they were trained here.
    """

    same_as: str | None = None
    can_see_both_ways: bool = False
    sees_blocks_whole: bool = False


FAMILIES: dict[str, Family] = {
    "gpt2": Family(can_see_both_ways=True),
    "gpt_neox": Family(can_see_both_ways=True),
    "llama": Family(can_see_both_ways=True),
    "llada2_moe": Family(sees_blocks_whole=True),
    "mistral": Family(can_see_both_ways=True),
    "olmo2": Family(can_see_both_ways=True),
    "qwen2": Family(can_see_both_ways=True),
    "qwen3": Family(can_see_both_ways=True),
    "sdar": Family(same_as="qwen3", sees_blocks_whole=True),  # arXiv 2510.06303
}
CAUSAL_TYPES = tuple(name for name, family in FAMILIES.items() if family.can_see_both_ways)

# How the mask is written where neither the config nor the tokenizer says which token it is.
MASK_TOKENS = ("<|MASK|>", "<|mask|>", "[MASK]", "<mask>")


def family_of(model_type: object) -> Family:
    """What is known of a model_type; of one that is not in the table, nothing."""
    return FAMILIES.get(model_type, Family()) if isinstance(model_type, str) else Family()
