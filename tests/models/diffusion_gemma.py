"""A small random DiffusionGemma in the layout that the family was published in."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from tests.builders import letter_tokenizer

V, CANVAS, WINDOW, EOS = 24, 4, 6, 2
TEXT_CONFIG: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 16,
    "head_dim": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "max_position_embeddings": 64,
    "model_type": "diffusion_gemma_text",
    "moe_intermediate_size": 16,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_global_key_value_heads": 1,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "full_attention": {
            "partial_rotary_factor": 0.25,
            "rope_theta": 1000000.0,
            "rope_type": "proportional",
        },
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": WINDOW,
    "tie_word_embeddings": True,
    "top_k_experts": 2,
    "use_bidirectional_attention": "vision",
    "vocab_size": V,
}
VISION_CONFIG: dict[str, Any] = {
    "head_dim": 8,
    "hidden_size": 16,
    "intermediate_size": 24,
    "model_type": "gemma4_vision",
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "position_embedding_size": 16,
}
CONFIG: dict[str, Any] = {
    "architectures": ["DiffusionGemmaForBlockDiffusion"],
    "boi_token_id": V + 1,
    "canvas_length": CANVAS,
    "dtype": "bfloat16",
    "eoi_token_id": V + 2,
    "eos_token_id": [EOS],
    "image_token_id": V + 3,
    "initializer_range": 0.02,
    "model_type": "diffusion_gemma",
    "text_config": TEXT_CONFIG,
    "tie_word_embeddings": True,
    "vision_config": VISION_CONFIG,
}


def diffusion_gemma(
    folder: Path, *, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> DiffusionGemmaForBlockDiffusion:
    """A DiffusionGemma in `folder`; returns the model of transformers that has its weights, in
    float32.

    Args:
        changes: of its config; those of `text_config` are laid over what is there.
    """
    text = TEXT_CONFIG | changes.pop("text_config", {})
    fields = {**CONFIG, "text_config": text, **changes}
    model: Any = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig.from_dict(fields))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # No initialisation: norms differ from one, and each half has scales of its own. Layers with
        # larger weights make much of rounding, step by step.
        for name, parameter in model.named_parameters():
            scale = 0.4 if "embed_tokens" in name else 0.1
            parameter.data = scale * torch.randn_like(parameter) + float("norm" in name)
            parameter.data = parameter.data.to(dtype).float()
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.copy_((0.7 + 0.5 * torch.rand(1)).to(dtype))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    tied = model.all_tied_weights_keys
    tensors = {
        name: tensor.to(dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    letter_tokenizer(V).save_pretrained(folder)
    return model.eval()
