"""The DFlash draft: its arithmetic, the published layout, transformers' generator, bad input."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    DynamicCache,
    GPT2Config,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from tokendiff.artifacts.model_folders import is_draft_folder
from tokendiff.errors import InputError
from tokendiff.models.dflash.config import DFlashDraftConfig, spread_layer_ids
from tokendiff.models.dflash.model import DFlashDraftModel
from tokendiff.models.dflash.planning import (
    check_fit,
    load_draft,
    new_draft_config,
    open_draft_config,
    open_target_config,
)

V, D, BLOCK, MASK = 40, 32, 4, 39
CLOSE: Any = {"rtol": 1e-4, "atol": 1e-5}  # norms and rotations are float32 in any dtype
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
# As the published drafts have it, field for field, but for the sizes.
PUBLISHED = {
    "architectures": ["DFlashDraftModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "block_size": BLOCK,
    "bos_token_id": 1,
    "dflash_config": {"mask_token_id": MASK, "target_layer_ids": [1, 3]},
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "layer_types": ["full_attention", "full_attention"],
    "max_window_layers": 5,
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "num_target_layers": 6,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "transformers_version": "4.57.3",
    "use_cache": True,
    "use_sliding_window": False,
    **SIZES,
}


def tiny_target(**fields: Any) -> Any:
    torch.manual_seed(1)
    config = Qwen3Config(**{**SIZES, "num_hidden_layers": 6, "initializer_range": 0.3, **fields})
    return Qwen3ForCausalLM(config).eval()


def tiny_draft(**fields: Any) -> DFlashDraftModel:
    config = DFlashDraftConfig.from_dict({**PUBLISHED, "initializer_range": 0.3, **fields})
    torch.manual_seed(2)
    draft = DFlashDraftModel(config)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return draft.float().eval()


def published_folder(folder: Path, **fields: Any) -> Path:
    """A folder as the published drafts are, with every weight named here."""
    names: dict[str, tuple[int, ...]] = {
        "fc.weight": (D, 2 * D),
        "hidden_norm.weight": (D,),
        "norm.weight": (D,),
    }
    for layer in range(2):
        names |= {
            f"layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (D,),
                "post_attention_layernorm": (D,),
                "self_attn.q_proj": (32, D),
                "self_attn.k_proj": (16, D),
                "self_attn.v_proj": (16, D),
                "self_attn.o_proj": (D, 32),
                "self_attn.q_norm": (8,),
                "self_attn.k_norm": (8,),
                "mlp.gate_proj": (48, D),
                "mlp.up_proj": (48, D),
                "mlp.down_proj": (D, 48),
            }.items()
        }
    torch.manual_seed(3)
    weights = {name: torch.randn(shape).bfloat16() for name, shape in names.items()}
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**PUBLISHED, **fields}))
    return folder


def plain_draft(draft: DFlashDraftModel, block: Tensor, context: Tensor, start: int) -> Tensor:
    """One block [K, D] after context [C, n D] whose first position is `start`, head by head."""
    weights = {name: value.double() for name, value in draft.state_dict().items()}
    theta: Any = draft.config.rope_parameters["rope_theta"]  # type: ignore[index]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]

    def turn(x: Tensor, position: int) -> Tensor:
        angle = position * theta ** -(torch.arange(4).double() / 4)
        first, second = x[:4], x[4:]
        return torch.cat(
            [
                first * angle.cos() - second * angle.sin(),
                second * angle.cos() + first * angle.sin(),
            ]
        )

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T

    context = norm(linear(context.double(), "fc"), "hidden_norm")
    hidden = block.double()
    for layer in range(2):
        at = f"layers.{layer}."
        normed = norm(hidden, at + "input_layernorm")
        seen = torch.cat([context, normed])
        output = torch.zeros(len(block), 32, dtype=torch.float64)
        for head in range(4):
            own, shared = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
            key = norm(linear(seen, at + "self_attn.k_proj")[:, shared], at + "self_attn.k_norm")
            value = linear(seen, at + "self_attn.v_proj")[:, shared]
            query = norm(linear(normed, at + "self_attn.q_proj")[:, own], at + "self_attn.q_norm")
            key = torch.stack([turn(k, start + i) for i, k in enumerate(key)])
            query = torch.stack([turn(q, start + len(context) + i) for i, q in enumerate(query)])
            output[:, own] = (query @ key.T / math.sqrt(8)).softmax(-1) @ value
        hidden = hidden + linear(output, at + "self_attn.o_proj")
        normed = norm(hidden, at + "post_attention_layernorm")
        gate, up = linear(normed, at + "mlp.gate_proj"), linear(normed, at + "mlp.up_proj")
        hidden = hidden + linear(gate * gate.sigmoid() * up, at + "mlp.down_proj")
    return norm(hidden, "norm")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_forward_is_the_published_arithmetic(attention: str) -> None:
    draft = tiny_draft().double()
    draft.set_attn_implementation(attention)
    block, context = torch.randn(1, BLOCK, D).double(), torch.randn(1, 5, 2 * D).double()
    expected = plain_draft(draft, block[0], context[0], 0)
    output = draft(noise_embeds=block, context_hidden_states=context).last_hidden_state
    torch.testing.assert_close(output[0], expected, **CLOSE)
    # The same with two keys that are hidden, and what they stand for taken away.
    padded = torch.cat([torch.randn(1, 2, 2 * D).double(), context], dim=1)
    seen = torch.tensor([[0, 0, *[1] * (5 + BLOCK)]])
    positions = torch.tensor([[0, 0, *range(5 + BLOCK)]])
    for mask in (seen, seen.bool()[:, None, None].expand(1, 1, BLOCK, -1)):
        output = draft(block, padded, attention_mask=mask, position_ids=positions).last_hidden_state
        torch.testing.assert_close(output[0], expected, **CLOSE)


def test_positions_count_on_from_the_cache() -> None:
    draft, cache = tiny_draft().double(), DynamicCache()
    block, context = torch.randn(1, BLOCK, D).double(), torch.randn(1, 5, 2 * D).double()
    draft(torch.randn(1, BLOCK, D).double(), context[:, :3], past_key_values=cache)
    cache.crop(-BLOCK)  # of the block that was drafted first, nothing is left
    output = draft(block, context[:, 3:], past_key_values=cache).last_hidden_state
    torch.testing.assert_close(output[0], plain_draft(draft, block[0], context[0], 0), **CLOSE)


def test_dropout_is_of_training_alone() -> None:
    draft = tiny_draft(attention_dropout=0.5)
    block, context = torch.randn(1, BLOCK, D), torch.randn(1, 5, 2 * D)
    first, second = (draft(block, context).last_hidden_state for _ in range(2))
    assert torch.equal(first, second)
    draft.train()
    first, second = (draft(block, context).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)


def test_the_published_layout_opens_without_remote_code_and_is_saved_back(tmp_path: Path) -> None:
    folder = published_folder(tmp_path / "published")
    draft = AutoModel.from_pretrained(folder, trust_remote_code=False, dtype="auto")
    assert isinstance(draft, DFlashDraftModel)
    assert (draft.config.block_size, draft.config.mask_token_id) == (BLOCK, MASK)
    assert draft.config.target_layer_ids == [1, 3]
    draft.save_pretrained(tmp_path / "again")
    before, after = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("published", "again")
    )
    assert before == after
    fields = json.loads((tmp_path / "again" / "config.json").read_text())
    # rope_theta and rope_scaling have become one field of transformers 5.
    same = PUBLISHED.keys() - {"auto_map", "rope_theta", "rope_scaling", "transformers_version"}
    assert {name: fields[name] for name in same} == {name: PUBLISHED[name] for name in same}
    assert fields["rope_parameters"] == {"rope_theta": 1000000, "rope_type": "default"}
    assert "auto_map" not in fields
    assert is_draft_folder(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors")["fc.weight"].dtype == torch.bfloat16


def test_newer_layouts_have_the_block_size_in_dflash_config(tmp_path: Path) -> None:
    own = {"mask_token_id": MASK, "target_layer_ids": [1, 3], "block_size": 8}
    folder = published_folder(tmp_path / "nested", dflash_config=own)
    fields = json.loads((folder / "config.json").read_text())
    del fields["block_size"]
    (folder / "config.json").write_text(json.dumps(fields))
    draft = load_draft(str(folder))
    assert draft.config.block_size == 8
    assert draft.dtype == torch.float32
    draft.save_pretrained(tmp_path / "again")
    assert open_draft_config(str(tmp_path / "again")).dflash_config == own


def test_other_qwen3_models_open_as_before(tmp_path: Path) -> None:
    config = Qwen3Config(**SIZES, num_hidden_layers=1)
    assert config.architectures is None
    assert type(AutoModel.from_config(config)) is Qwen3Model
    Qwen3Model(config).save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is Qwen3Model
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is Qwen3ForCausalLM


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_read_by_both_names_that_transformers_has_for_it(name: str) -> None:
    draft, cache = tiny_draft(), DynamicCache()
    block, context = torch.randn(1, BLOCK, D), torch.randn(1, 6, 2 * D)
    with torch.no_grad():
        expected = draft(block, context).last_hidden_state
        draft(block, context[:, :4], **{name: cache})
        cache.crop(-BLOCK)
        output = draft(block, context[:, 4:], **{name: cache})
    torch.testing.assert_close(output.last_hidden_state, expected, **CLOSE)
    assert cache.get_seq_length() == 6 + BLOCK
    assert output[1] is cache


def test_transformers_generates_the_target_s_own_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """And calls the draft with what `plain_draft` computes from the whole text, at every block."""
    target, draft = tiny_target(), tiny_draft()
    prompt = torch.randint(0, V - 1, (1, 7), generator=torch.Generator().manual_seed(0))
    plain = target.generate(prompt, do_sample=False, max_new_tokens=20, pad_token_id=0)
    blocks: list[tuple[int, Tensor]] = []
    original: Any = DFlashDraftModel.forward

    def spy(self: Any, noise_embeds: Tensor, **kwargs: Any) -> Any:
        output = original(self, noise_embeds, **kwargs)
        blocks.append((kwargs["position_ids"][0, -BLOCK].item(), output.last_hidden_state[0]))
        return output

    monkeypatch.setattr(DFlashDraftModel, "forward", spy)
    drafted = target.generate(
        prompt,
        do_sample=False,
        max_new_tokens=20,
        pad_token_id=0,
        assistant_model=draft,
        speculation_type="dflash",
    )
    assert torch.equal(plain, drafted)
    assert len(blocks) > 3
    # The outputs of layers 1 and 3, caught at the layers themselves.
    caught: dict[int, Tensor] = {}
    for layer in (1, 3):
        module = target.model.layers[layer]
        module.register_forward_hook(
            lambda module, args, output, layer=layer: caught.update({layer: output[0]})
        )
    with torch.no_grad():
        target(plain)
        context = torch.cat([caught[1], caught[3]], dim=-1)
        for anchor, output in blocks:
            noise = torch.tensor([int(plain[0, anchor]), *[MASK] * (BLOCK - 1)])
            block = target.model.embed_tokens(noise)
            expected = plain_draft(draft, block, context[:anchor], 0)
            torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=1e-4)


def test_layers_are_spread_as_in_the_published_drafts() -> None:
    assert spread_layer_ids(36, 5) == [1, 9, 17, 25, 33]  # Qwen3-4B and -8B
    assert spread_layer_ids(64, 5) == [1, 16, 31, 46, 61]
    assert spread_layer_ids(40, 8) == [1, 6, 11, 16, 22, 27, 32, 37]
    assert spread_layer_ids(48, 8) == [1, 7, 14, 20, 26, 32, 39, 45]
    assert spread_layer_ids(28, 1) == [14]
    for layers in range(1, 12):
        for count in range(2, 8):
            if count > layers - 3:
                with pytest.raises(ValueError, match=f"has {layers}"):
                    spread_layer_ids(layers, count)
            else:
                ids = spread_layer_ids(layers, count)
                assert sorted(set(ids)) == ids
                assert (ids[0], ids[-1], len(ids)) == (1, layers - 3, count)


def test_a_new_draft_is_as_wide_as_its_target() -> None:
    own: dict[str, Any] = {"rope_parameters": {"rope_theta": 5e5}, "rms_norm_eps": 1e-4}
    target = Qwen3Config(**SIZES, num_hidden_layers=7, **own)
    config = new_draft_config(
        target, target_model_id="t", num_layers=2, block_size=8, mask_token_id=MASK
    )
    assert {name: getattr(config, name) for name in SIZES} == SIZES
    assert config.target_layer_ids == [1, 4]
    assert config.rope_parameters == target.rope_parameters
    assert config.rms_norm_eps == 1e-4
    check_fit(config, target, draft_model_id="d", target_model_id="t")
    # A target without rotary positions: the draft has its own.
    other = GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=V, n_positions=64)
    config = new_draft_config(
        other, target_model_id="t", num_layers=1, block_size=2, mask_token_id=0
    )
    assert config.target_layer_ids == [2]
    assert DFlashDraftModel(config).fc.weight.shape == (32, 32)
    # Of the second layout, whose groups and candidates are as many as a small target allows.
    small = GPT2Config(n_embd=40, n_layer=4, n_head=4, vocab_size=9, n_positions=64)
    config = new_draft_config(
        small, target_model_id="t", num_layers=1, block_size=2, mask_token_id=0, layout="dflash2"
    )
    assert (config.second("conv_group_size"), config.second("selector_top_k")) == (8, 9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 1}, "block_size 1"),
        ({"block_size": None}, "block_size None"),
        ({"dflash_config": {"target_layer_ids": [1, 3]}}, "mask_token_id None"),
        ({"dflash_config": {"target_layer_ids": [1, 3], "mask_token_id": V}}, "mask_token_id 40"),
        ({"dflash_config": {"mask_token_id": MASK}}, "target_layer_ids"),
        ({"dflash_config": {"target_layer_ids": [1, 6], "mask_token_id": 0}}, r"must lie in -1..5"),
        (
            {"dflash_config": {"target_layer_ids": [1], "mask_token_id": 0, "block_size": 9}},
            "contradicts",
        ),
        (
            {"dflash_config": {"target_layer_ids": [1], "mask_token_id": 0, "conv_kernel_size": 4}},
            "conv_kernel_size",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window None"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "no DFlash draft"),
        ({"architectures": ["DFlash2DraftModel"]}, "conv_kernel_size None"),
    ],
)
def test_a_draft_that_cannot_be_run_is_refused_by_its_config(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = published_folder(tmp_path / "draft", **fields)
    (folder / "model.safetensors").unlink()  # not read
    with pytest.raises(InputError, match=message):
        open_draft_config(str(folder))


def test_weights_that_do_not_belong_to_the_config_are_refused(tmp_path: Path) -> None:
    folder = published_folder(tmp_path / "draft")
    weights = load_file(folder / "model.safetensors")
    moved = {name.replace("fc.", "fc2."): value for name, value in weights.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"missing \['fc.weight'\].*unexpected \['fc2.weight'\]"):
        load_draft(str(folder))
    save_file(
        {**weights, "fc.weight": torch.ones(D, D)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(InputError, match=r"fc.weight|size"):
        load_draft(str(folder))


def test_what_does_not_fit_the_target_is_named(tmp_path: Path) -> None:
    draft = DFlashDraftConfig.from_dict(PUBLISHED)
    names = {"draft_model_id": "the-draft", "target_model_id": "the-target"}
    check_fit(draft, Qwen3Config(**SIZES, num_hidden_layers=6), **names)
    other = Qwen3Config(**{**SIZES, "vocab_size": 50, "hidden_size": 64}, num_hidden_layers=8)
    with pytest.raises(InputError) as error:
        check_fit(draft, other, **names)
    for text in ("the-draft", "the-target", "hidden_size 32", "vocab_size 40", "num_target_layers"):
        assert text in str(error.value)
    unrecorded = DFlashDraftConfig.from_dict({**PUBLISHED, "num_target_layers": None})
    with pytest.raises(InputError, match=r"target_layer_ids \[1, 3\], the target has layers 0..2"):
        check_fit(unrecorded, Qwen3Config(**SIZES, num_hidden_layers=3), **names)

    small = Qwen3Config(**SIZES, num_hidden_layers=4)
    new: dict[str, Any] = {"target_model_id": "the-target", "block_size": 4}
    with pytest.raises(InputError, match=r"draft_num_layers 2.*has 4"):
        new_draft_config(small, num_layers=2, mask_token_id=MASK, **new)
    with pytest.raises(InputError, match=rf"id {V}.*{V} embeddings"):
        new_draft_config(small, num_layers=1, mask_token_id=V, **new)
    with pytest.raises(InputError, match="block_size 1"):
        new_draft_config(small, target_model_id="t", num_layers=1, mask_token_id=MASK, block_size=1)

    BertConfig(vocab_size=V).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="'bert', not a causal"):
        open_target_config(str(tmp_path / "bert"))
    with pytest.raises(InputError, match="is a DFlash draft"):
        open_target_config(str(published_folder(tmp_path / "draft")))
    with pytest.raises(InputError, match="cannot be opened"):
        open_target_config(str(tmp_path / "nothing"))
    small.save_pretrained(tmp_path / "target")
    assert type(open_target_config(str(tmp_path / "target"))) is type(
        AutoConfig.from_pretrained(tmp_path / "target")
    )
