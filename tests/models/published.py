"""Small random checkpoints in the layouts that LLaDA and Dream were published in, each beside the
plain model of transformers that its weights were taken from; and LLaDA2, beside its formulas.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.builders import letter_tokenizer

V, EMBEDDINGS, MASK, EOS = 16, 24, 1, 2
LLADA_CONFIG: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 32,
    "embedding_size": EMBEDDINGS,
    "eos_token_id": EOS,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": MASK,
    "max_sequence_length": 64,
    "mlp_hidden_size": 48,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "pad_token_id": EOS,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_theta": 5000.0,
    "scale_logits": False,
    "vocab_size": EMBEDDINGS,
    "weight_tying": False,
}
DREAM_CONFIG: dict[str, Any] = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "mask_token_id": MASK,
    "max_position_embeddings": 64,
    "model_type": "Dream",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 7000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": EMBEDDINGS,
}
# What LLaDA calls the weights of a layer; written down here a second time, not read from the code.
_LLADA_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}


def llada_names(num_layers: int = 2) -> dict[str, str]:
    """From the names of a Llama's weights to LLaDA's."""
    names = {
        "model.embed_tokens.weight": "model.transformer.wte.weight",
        "model.norm.weight": "model.transformer.ln_f.weight",
        "lm_head.weight": "model.transformer.ff_out.weight",
    }
    for layer in range(num_layers):
        for ours, theirs in _LLADA_LAYER.items():
            names[f"model.layers.{layer}.{ours}.weight"] = (
                f"model.transformer.blocks.{layer}.{theirs}.weight"
            )
    return names


def llada(folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A LLaDA in `folder`; returns the causal Llama that has its weights."""
    fields = LLADA_CONFIG | changes
    config = LlamaConfig(
        vocab_size=fields["embedding_size"],
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=fields["n_layers"],
        num_attention_heads=4,
        num_key_value_heads=fields["n_kv_heads"],
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=fields["weight_tying"],
    )
    model = _random(LlamaForCausalLM(config), dtype)
    return _write(folder, fields, model, llada_names(fields["n_layers"]), dtype)


def dream(folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A Dream in `folder`; returns the causal Qwen2 that has its weights."""
    fields = DREAM_CONFIG | changes
    config = Qwen2Config(
        vocab_size=fields["vocab_size"],
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=fields["num_hidden_layers"],
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 7000.0},
        tie_word_embeddings=False,
    )
    return _write(folder, fields, _random(Qwen2ForCausalLM(config), dtype), {}, dtype)


LLADA_MOE_CONFIG: dict[str, Any] = {
    "architectures": ["LLaDAMoEModelLM"],
    "attention_bias": False,
    "clip_qkv": None,
    "dense_intermediate_size": 40,
    "eos_token_id": EOS,
    "expert_intermediate_size": 24,
    "hidden_act": "silu",
    "hidden_size": 32,
    "mask_token_id": MASK,
    "max_position_embeddings": 64,
    "model_type": "llada",
    "moe_layer_freq": [0, 1],
    "moe_router_enable_expert_bias": False,
    "norm_topk_prob": None,
    "num_attention_heads": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": EOS,
    "qk_layernorm": True,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 9000.0,
    "shared_expert_intermediate_size": None,
    "tie_word_embeddings": False,
    "vocab_size": EMBEDDINGS,
}


def llada_moe(folder: Path, **changes: Any) -> Any:
    """A LLaDA-MoE in `folder`, its first layer without experts; returns the causal Qwen3 with
    experts that has its weights, whose names in files are the same.
    """
    config = Qwen3MoeConfig(
        vocab_size=EMBEDDINGS,
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 9000.0},
        tie_word_embeddings=False,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        mlp_only_layers=[0],
    )
    model = _random(Qwen3MoeForCausalLM(config), torch.float32)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(LLADA_MOE_CONFIG | changes))
    letter_tokenizer(V).save_pretrained(folder)
    return model


LLADA2_CONFIG: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM"},
    "embedding_dropout": 0.0,
    "eos_token_id": EOS,
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 40,
    "mask_token_id": MASK,
    "max_position_embeddings": 64,
    "model_type": "llada2_moe",
    "moe_intermediate_size": 24,
    "moe_router_enable_expert_bias": True,
    "n_group": 4,
    "norm_head": False,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_shared_experts": 1,
    "pad_token_id": EOS,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 6000.0,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_qkv_bias": False,
    "vocab_size": EMBEDDINGS,
}


def llada2_shapes(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a published LLaDA2, by name."""
    width, size = fields["hidden_size"], fields["head_dim"]
    num_heads, num_kv = fields["num_attention_heads"], fields["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.word_embeddings.weight": (fields["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    if not fields["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (fields["vocab_size"], width)

    def add_mlp(prefix: str, inner: int) -> None:
        shapes[f"{prefix}.gate_proj.weight"] = shapes[f"{prefix}.up_proj.weight"] = (inner, width)
        shapes[f"{prefix}.down_proj.weight"] = (width, inner)

    for index in range(fields["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        rows = (num_heads + 2 * num_kv) * size
        shapes[f"{layer}.attention.query_key_value.weight"] = (rows, width)
        shapes[f"{layer}.attention.dense.weight"] = (width, num_heads * size)
        for name in ("attention.query_layernorm", "attention.key_layernorm"):
            shapes[f"{layer}.{name}.weight"] = (size,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{name}.weight"] = (width,)
        if index < fields["first_k_dense_replace"]:
            add_mlp(f"{layer}.mlp", fields["intermediate_size"])
            continue
        shapes[f"{layer}.mlp.gate.weight"] = (fields["num_experts"], width)
        shapes[f"{layer}.mlp.gate.expert_bias"] = (fields["num_experts"],)
        for expert in range(fields["num_experts"]):
            add_mlp(f"{layer}.mlp.experts.{expert}", fields["moe_intermediate_size"])
        inner = fields["moe_intermediate_size"] * fields["num_shared_experts"]
        add_mlp(f"{layer}.mlp.shared_experts", inner)
    return shapes


def llada2(folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    """A LLaDA2 in `folder`; returns the fields of its config."""
    fields = LLADA2_CONFIG | changes
    generator = torch.Generator().manual_seed(0)
    tensors = {
        # Of scores between 0 and 1 a bias of this size changes which experts are chosen.
        name: (0.3 * torch.randn(shape, generator=generator) + float("norm" in name)).to(
            torch.float32 if "expert_bias" in name else dtype
        )
        for name, shape in llada2_shapes(fields).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    letter_tokenizer(V).save_pretrained(folder)
    return fields


def llada2_logits(
    weights: dict[str, Tensor], fields: dict[str, Any], tokens: Tensor, is_seen: Tensor
) -> Tensor:
    """[L, V] of tokens [L], each of which sees those of is_seen [L, L]: the formulas of LLaDA2,
    token by token and expert by expert.
    """
    given = {name: tensor.float() for name, tensor in weights.items()}
    num_heads, num_kv = fields["num_attention_heads"], fields["num_key_value_heads"]
    size, chosen = fields["head_dim"], fields["num_experts_per_tok"]
    of_group = fields["num_experts"] // fields["n_group"]

    def norm(x: Tensor, name: str) -> Tensor:
        length = (x.square().mean(-1, keepdim=True) + fields["rms_norm_eps"]).sqrt()
        return x / length * given[f"{name}.weight"]

    def mlp(x: Tensor, name: str) -> Tensor:
        gate, up, down = (given[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        z = gate @ x
        return down @ (z * z.sigmoid() * (up @ x))

    def rotated(x: Tensor) -> Tensor:  # [L, heads, size]; the first dimensions as complex numbers
        half = int(size * fields["partial_rotary_factor"]) // 2
        speed = fields["rope_theta"] ** (-torch.arange(half) / half)
        angle = torch.arange(len(x))[:, None, None] * speed
        turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(
            torch.ones_like(angle), angle
        )
        return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)

    def experts(x: Tensor, name: str) -> Tensor:
        score = (given[f"{name}.gate.weight"] @ x).sigmoid()
        wanted = score + given[f"{name}.gate.expert_bias"]
        worth = [
            sum(sorted(group.tolist())[-2:]) for group in wanted.view(fields["n_group"], of_group)
        ]
        open_groups = sorted(range(len(worth)), key=lambda g: -worth[g])[: fields["topk_group"]]
        open_experts = [g * of_group + i for g in open_groups for i in range(of_group)]
        taken = sorted(open_experts, key=lambda e: -wanted[e].item())[:chosen]
        total = sum(score[e] for e in taken) if chosen > 1 else 1.0
        scale = fields["routed_scaling_factor"]
        found = [scale * score[e] / total * mlp(x, f"{name}.experts.{e}") for e in taken]
        return torch.stack(found).sum(0) + mlp(x, f"{name}.shared_experts")

    h = given["model.word_embeddings.weight"][tokens]
    for index in range(fields["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        x = norm(h, f"{layer}.input_layernorm")
        states = x @ given[f"{layer}.attention.query_key_value.weight"].T
        heads = states.view(len(tokens), num_heads + 2 * num_kv, size)
        q = rotated(norm(heads[:, :num_heads], f"{layer}.attention.query_layernorm"))
        k = heads[:, num_heads : num_heads + num_kv]
        k = rotated(norm(k, f"{layer}.attention.key_layernorm"))
        v = heads[:, num_heads + num_kv :]
        mixed = []
        for head in range(num_heads):
            kv = head * num_kv // num_heads
            energy = q[:, head] @ k[:, kv].T / size**0.5
            mixed.append(energy.masked_fill(~is_seen, -torch.inf).softmax(-1) @ v[:, kv])
        h = h + torch.cat(mixed, dim=-1) @ given[f"{layer}.attention.dense.weight"].T
        x = norm(h, f"{layer}.post_attention_layernorm")
        is_dense = index < fields["first_k_dense_replace"]
        h = h + torch.stack([(mlp if is_dense else experts)(each, f"{layer}.mlp") for each in x])
    embedding = given["model.word_embeddings.weight"]
    return norm(h, "model.norm") @ given.get("lm_head.weight", embedding).T


FAMILIES = {"llada": llada, "Dream": dream, "lladamoe": llada_moe}


def reference_logits(model: Any, tokens: Tensor) -> Tensor:
    """[B, L, V] of a causal model that is shown all of each row by an explicit mask."""
    sees_all = torch.ones(len(tokens), 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool)
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens, attention_mask=sees_all).logits[..., :V]
    return logits


def _random(model: Any, dtype: torch.dtype) -> Any:
    """Weights that are no initialisation: norms and biases differ from one and zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            parameter.data = 0.2 * torch.randn_like(parameter) + float("norm" in name)
            parameter.data = parameter.data.to(dtype).float()
    return model.eval()


def _write(
    folder: Path, fields: dict[str, Any], model: Any, names: dict[str, str], dtype: torch.dtype
) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    tied = model.all_tied_weights_keys
    tensors = {
        names.get(name, name): tensor.to(dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    letter_tokenizer(V).save_pretrained(folder)
    return model
