"""Denoisers made of transformers models: what each architecture sees, returns and learns from."""

import os
import shutil
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tests import ROOT
from tests.builders import letter_tokenizer
from tokendiff.errors import InputError
from tokendiff.models import denoiser as denoiser_module
from tokendiff.models import diffusion_transformer as dit
from tokendiff.models import opening as loading
from tokendiff.models.builtin import BUILTIN_PREFIX, builtin_config
from tokendiff.models.denoiser import TransformersDenoiser, attend_both_ways
from tokendiff.models.families import CAUSAL_TYPES
from tokendiff.models.masked_attention import IMPLEMENTATIONS

MASKED_TYPES = (
    *("albert", "bert", "camembert", "distilbert", "electra", "modernbert", "roberta"),
    *("tokendiff_dit", "xlm-roberta"),
)
ALL_TYPES = (*MASKED_TYPES, *CAUSAL_TYPES)
VOCAB, LENGTH = 30, 9

# Windows that are shorter than a row, so that a layer that keeps one is caught.
EXTRA: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "mistral": {"sliding_window": 3},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
}


def tiny_config(model_type: str, **fields: Any) -> Any:
    sizes: dict[str, Any] = {"vocab_size": 32, "pad_token_id": 0, "max_position_embeddings": 64}
    if model_type != "distilbert":
        sizes |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes["intermediate_size"] = 32
    if model_type in ("albert", "electra"):
        sizes["embedding_size"] = 16
    if model_type in ("llama", "mistral", "olmo2", "qwen2", "qwen3"):
        sizes |= {"num_key_value_heads": 1, "head_dim": 8}
    return AutoConfig.for_model(model_type, **{**sizes, **EXTRA.get(model_type, {}), **fields})


def tiny_model(model_type: str, *, attention: str | None = None, **fields: Any) -> Any:
    """A model whose every weight is random, so that nothing hides behind a zero."""
    config = tiny_config(model_type, **fields)
    auto_class: Any = AutoModelForMaskedLM
    if model_type in CAUSAL_TYPES:
        attend_both_ways(config)
        auto_class = AutoModelForCausalLM
    torch.manual_seed(0)
    options = {} if attention is None else {"attn_implementation": attention}
    model = auto_class.from_config(config, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def tiny_denoiser(model_type: str, **fields: Any) -> TransformersDenoiser:
    return TransformersDenoiser(tiny_model(model_type, **fields), vocab_size=VOCAB)


def some_rows() -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, is_valid with three padded positions in the second row, times)."""
    tokens = torch.randint(1, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    is_valid = torch.arange(LENGTH) < torch.tensor([LENGTH, LENGTH - 3])[:, None]
    return tokens, is_valid, torch.tensor([0.25, 0.75], dtype=torch.float64)


def logits_of(denoiser: TransformersDenoiser, tokens: Tensor, is_valid: Tensor) -> Tensor:
    with torch.no_grad():
        return denoiser.head(denoiser.encode(tokens, is_valid, some_rows()[2][: len(tokens)]))


# What every architecture must do.


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_split_models_give_the_logits_of_the_whole(model_type: str) -> None:
    denoiser = tiny_denoiser(model_type)
    assert denoiser.is_split == (model_type != "distilbert")
    assert denoiser.is_time_conditioned == (model_type == "tokendiff_dit")
    tokens, is_valid, time = some_rows()
    condition = {"time": time} if denoiser.is_time_conditioned else {}
    for valid in (is_valid, torch.ones_like(is_valid)):
        whole = denoiser.model(input_ids=tokens, attention_mask=valid.long(), **condition)
        ours = denoiser.head(denoiser.encode(tokens, valid, time)[valid])
        torch.testing.assert_close(ours, whole.logits[valid][:, :VOCAB], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_every_position_sees_every_valid_one_and_no_other(model_type: str, attention: str) -> None:
    denoiser = tiny_denoiser(model_type, attention=attention)
    tokens, is_valid, _ = some_rows()
    logits = logits_of(denoiser, tokens, is_valid)
    for position in range(LENGTH):
        changed = tokens.clone()
        changed[:, position] = changed[:, position] % (VOCAB - 1) + 1
        moved = (logits_of(denoiser, changed, is_valid) - logits).abs().amax(-1) > 1e-5
        others = is_valid & (torch.arange(LENGTH) != position)
        assert (moved == is_valid[:, position, None])[others].all(), position
    alone = logits_of(denoiser, tokens[:, :-3], is_valid[:, :-3])
    torch.testing.assert_close(logits[:, :-3][1], alone[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["convbert", "fnet", "mobilebert"])
def test_an_architecture_that_sees_padding_is_refused(model_type: str, tmp_path: Path) -> None:
    """Not by its type, which no table has: a padded row shows that others heed the mask."""
    model = tiny_model(model_type, embedding_size=16, intra_bottleneck_size=16)
    tokens, is_valid, _ = some_rows()
    other = tokens.where(is_valid, tokens % (VOCAB - 1) + 1)
    denoiser = TransformersDenoiser(model, vocab_size=VOCAB)
    one, changed = (logits_of(denoiser, rows, is_valid)[is_valid] for rows in (tokens, other))
    assert float((one - changed).abs().max()) > 1e-3
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=rf"'{model_type}', which sees the padding.*bert"):
        loading.load_denoiser(
            str(tmp_path), tokenizer=letter_tokenizer(VOCAB), max_length=LENGTH, warn=lambda _: None
        )


@pytest.mark.parametrize(
    ("model_type", "instead"), [("ibert", "QuantEmbedding"), ("perceiver", "Parameter")]
)
def test_an_architecture_without_a_plain_embedding_is_refused(
    model_type: str, instead: str, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {
        "num_latents": 4,
        "d_latents": 16,
        "d_model": 16,
        "v_channels": 16,
        "qk_channels": 16,
    }
    heads = {"num_blocks": 1, "num_self_attends_per_block": 1, "num_self_attention_heads": 1}
    given = {**sizes, **heads, "num_cross_attention_heads": 1} if model_type == "perceiver" else {}
    tiny_model(model_type, **given).save_pretrained(tmp_path)
    told = rf"^model_name_or_path '.*' is of type '{model_type}', .* but a {instead}; give a model"
    with pytest.raises(InputError, match=told):
        loading.load_denoiser(
            str(tmp_path), tokenizer=letter_tokenizer(VOCAB), max_length=LENGTH, warn=lambda _: None
        )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", CAUSAL_TYPES)
def test_causal_model_attends_as_under_an_explicit_mask(model_type: str, attention: str) -> None:
    """transformers passes a mask [B, 1, L, L] to the attention of a causal model as it is."""
    denoiser = tiny_denoiser(model_type, attention=attention)
    causal = AutoModelForCausalLM.from_config(
        tiny_config(model_type), attn_implementation=attention
    ).eval()
    causal.load_state_dict(denoiser.model.state_dict())
    tokens, is_valid, _ = some_rows()
    mask = torch.zeros(2, 1, LENGTH, LENGTH).masked_fill(~is_valid[:, None, None], -1e9)
    with torch.no_grad():
        expected = causal(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        one_way = causal(input_ids=tokens, attention_mask=is_valid.long()).logits
    ours = logits_of(denoiser, tokens, is_valid)
    torch.testing.assert_close(ours[is_valid], expected[is_valid][:, :VOCAB], rtol=1e-4, atol=1e-5)
    assert (one_way[0, 0, :VOCAB] - ours[0, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", CAUSAL_TYPES)
def test_saved_causal_model_stays_bidirectional_in_transformers(
    model_type: str, tmp_path: Path
) -> None:
    denoiser = tiny_denoiser(model_type)
    denoiser.model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens, is_valid, _ = some_rows()
    with torch.no_grad():
        output = opened(input_ids=tokens, attention_mask=is_valid.long())
    assert all(output.get(name) is None for name in ("past_key_values", "cache"))
    expected = logits_of(denoiser, tokens, is_valid)[is_valid]
    torch.testing.assert_close(output.logits[is_valid][:, :VOCAB], expected)


def test_model_that_is_still_causal_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with pytest.raises(ValueError, match="the llama model is causal; build it with attend_both"):
        TransformersDenoiser(model, vocab_size=VOCAB)


@pytest.mark.parametrize("model_type", ["bert", "qwen3"])
def test_few_rows_go_through_the_head_the_other_way_around(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoiser_module, "_LARGE", 1)
    denoiser = tiny_denoiser(model_type)
    usual: list[int] = []  # rows that were multiplied in the usual order
    linear = torch.nn.functional.linear

    class Spy(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is linear:
                usual.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    width = denoiser.model.config.hidden_size
    for dtype in (torch.float32, torch.float64):
        denoiser.to(dtype)
        for rows in (1, 2, 12, 13):
            hidden = torch.randn(rows, width, dtype=dtype)
            expected = denoiser.head(hidden)
            usual.clear()
            with torch.no_grad(), Spy():
                logits = denoiser.head(hidden)
            torch.testing.assert_close(logits, expected)
            assert logits.is_contiguous() == expected.is_contiguous()
            assert (not usual) == (rows <= 12 and dtype == torch.float32)


def gradients(denoiser: TransformersDenoiser) -> tuple[dict[str, Tensor | None], int]:
    """(gradient by parameter, numbers that were kept for the backward pass)."""
    denoiser.train().zero_grad(set_to_none=True)
    tokens, is_valid, time = some_rows()
    num_kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal num_kept
        num_kept += tensor.numel()
        return tensor

    torch.manual_seed(0)  # dropout
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = denoiser.head(denoiser.encode(tokens, is_valid, time)[is_valid])
        loss = F.cross_entropy(logits, tokens[is_valid])
    loss.backward()
    return {name: p.grad for name, p in denoiser.named_parameters() if p.requires_grad}, num_kept


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_gradient_reaches_every_parameter_and_recomputing_keeps_it(model_type: str) -> None:
    """DistributedDataParallel fails, or waits for ever, for a parameter without a gradient."""
    denoiser = tiny_denoiser(model_type)
    expected, num_kept = gradients(denoiser)
    assert not [name for name, gradient in expected.items() if gradient is None]
    if model_type == "albert":
        with pytest.raises(InputError, match="has none for models of type 'albert'; turn it off"):
            denoiser.recompute_activations()
        return
    denoiser.recompute_activations()
    assert any(getattr(module, "gradient_checkpointing", False) for module in denoiser.modules())
    again, num_kept_again = gradients(denoiser)
    assert num_kept_again < num_kept / 2
    torch.testing.assert_close(again, expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    ("model_type", "backend"),
    [
        ("qwen2", "inductor"),
        # What torch makes of the graph takes half a minute a model; the graph is what is ours.
        ("modernbert", "aot_eager"),
        ("tokendiff_dit", "aot_eager"),
        pytest.param("modernbert", "inductor", marks=pytest.mark.deep),
        pytest.param("tokendiff_dit", "inductor", marks=pytest.mark.deep),
    ],
)
def test_compiled_encoder_gives_the_same_hidden_states(
    model_type: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    denoiser = tiny_denoiser(model_type)
    tokens, is_valid, time = some_rows()
    with torch.no_grad():
        eager = denoiser.encode(tokens, is_valid, time)[is_valid]
        torch._dynamo.utils.counters.clear()
        denoiser.compile_encoder()
        compiled = denoiser.encode(tokens, is_valid, time)[is_valid]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


# The diffusion transformer.


def test_rotation_is_that_of_llama() -> None:
    config = tiny_config("llama", head_dim=8)
    query, key = torch.randn(2, 1, 2, LENGTH, 8).unbind()
    cosine, sine = LlamaRotaryEmbedding(config)(query, torch.arange(LENGTH)[None])
    expected = torch.stack(apply_rotary_pos_emb(query, key, cosine, sine))
    rotation = dit._rotation(torch.arange(LENGTH), tiny_config("tokendiff_dit"))
    ours = torch.stack([dit._rotate(query, rotation), dit._rotate(key, rotation)])
    torch.testing.assert_close(ours, expected)


def test_open_gates_without_shift_and_scale_are_the_unconditioned_model() -> None:
    plain = tiny_model("tokendiff_dit", is_time_conditioned=False)
    names = dict(plain.named_parameters())
    assert not [name for name in names if "modulation" in name or "time" in name]
    model = tiny_model("tokendiff_dit")
    model.load_state_dict(plain.state_dict(), strict=False)
    for name, parameter in model.named_parameters():
        if "modulation" in name:
            torch.nn.init.zeros_(parameter)
        if name.endswith((".attention.modulation.bias", ".mlp.modulation.bias")):
            parameter.data.chunk(3)[2].fill_(1.0)  # the gate
    tokens, is_valid, time = some_rows()
    with torch.no_grad():
        expected = plain(tokens, is_valid).logits
        torch.testing.assert_close(model(tokens, is_valid, time).logits, expected)


@pytest.mark.slow
def test_untrained_dit_predicts_uniformly_and_trained_one_reads_its_time() -> None:
    denoiser = loading.load_denoiser(
        "builtin:dit-tiny", tokenizer=letter_tokenizer(), max_length=LENGTH
    ).eval()
    tokens, is_valid, _ = some_rows()
    assert not logits_of(denoiser, tokens % 16, is_valid).any()
    # Four classes of time, the closest two 0.01 apart: only the time tells what to predict.
    times = torch.tensor([0.1, 0.11, 0.5, 0.9], dtype=torch.float64)
    rows = torch.ones(4, LENGTH, dtype=torch.int64)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=3e-3)
    for _ in range(80):
        logits = denoiser.head(denoiser.encode(rows, torch.ones_like(rows).bool(), times))
        loss = F.cross_entropy(logits.flatten(0, 1), torch.arange(4).repeat_interleave(LENGTH))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
    flipped = denoiser.head(denoiser.encode(rows, torch.ones_like(rows).bool(), times.flip(0)))
    assert flipped.argmax(-1).eq(torch.tensor([3, 2, 1, 0])[:, None]).all()


def test_dit_refuses_a_time_that_is_missing_misshapen_or_not_wanted() -> None:
    tokens, _, time = some_rows()
    model = tiny_model("tokendiff_dit")
    for wrong in (None, time[:1], time[:, None], torch.tensor(0.5)):
        with pytest.raises(ValueError, match=r"time must have shape \[2\], one per row; got"):
            model(tokens, time=wrong)
    with pytest.raises(ValueError, match="time was given to a model with is_time_conditioned F"):
        tiny_model("tokendiff_dit", is_time_conditioned=False)(tokens, time=time)
    with pytest.raises(ValueError, match="hidden_size 18 must be a multiple of twice"):
        tiny_config("tokendiff_dit", hidden_size=18)


def test_dit_drops_out_in_training_alone() -> None:
    tokens, is_valid, time = some_rows()
    for dropout in (0.0, 0.5):
        model = tiny_model("tokendiff_dit", dropout=dropout)
        for training in (False, True):
            model.train(training)
            twice = [model(tokens, is_valid, time).logits for _ in range(2)]
            assert torch.equal(*twice) == (dropout == 0.0 or not training)


@torch.no_grad()
def test_dit_holds_the_states_of_one_layer_at_a_time() -> None:
    model = tiny_model("tokendiff_dit", num_hidden_layers=3)
    inputs: list[weakref.ref[Tensor]] = []
    num_held: list[int] = []

    def note(layer: Any, args: tuple[Any, ...]) -> None:
        num_held.append(sum(state() is not None for state in inputs))
        inputs.append(weakref.ref(args[0]))

    for layer in model.model.layers:
        layer.register_forward_pre_hook(note)
    model.eval()(*some_rows())
    assert num_held == [0, 0, 0]


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("is_time_conditioned", [False, True])
def test_dit_is_saved_opened_and_resized_by_transformers(
    is_time_conditioned: bool, is_tied: bool, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {
        "is_time_conditioned": is_time_conditioned,
        "tie_word_embeddings": is_tied,
    }
    fresh = AutoModelForMaskedLM.from_config(tiny_config("tokendiff_dit", **fields))
    assert fresh.lm_head.weight.any() == is_tied, "tied to the embedding, it cannot start at zero"
    model = tiny_model("tokendiff_dit", **fields)
    model.save_pretrained(tmp_path)
    opened = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(opened.state_dict(), model.state_dict(), rtol=0, atol=0)
    encoder = AutoModel.from_pretrained(tmp_path).eval()
    tokens, is_valid, time = some_rows()
    condition = {"time": time} if is_time_conditioned else {}
    output = opened(tokens, is_valid, output_hidden_states=True, **condition)
    hidden = encoder(tokens, is_valid, **condition).last_hidden_state
    assert len(output.hidden_states) == opened.config.num_hidden_layers + 1
    torch.testing.assert_close(output.hidden_states[-1], hidden)

    opened.resize_token_embeddings(40)
    assert opened.config.vocab_size == 40
    tied = opened.get_input_embeddings().weight is opened.get_output_embeddings().weight
    assert tied == is_tied
    grown = opened(tokens, is_valid, **condition).logits
    assert grown.shape == (2, LENGTH, 40)
    torch.testing.assert_close(grown[..., :32], output.logits)


# Loading by name.


@pytest.mark.slow
def test_opening_a_saved_dit_registers_it_and_importing_does_nothing(tmp_path: Path) -> None:
    tiny_model("tokendiff_dit").save_pretrained(tmp_path)
    script = f"""
import sys
from tests.builders import letter_tokenizer
from tokendiff.models.opening import load_denoiser
assert "transformers" not in sys.modules
model = load_denoiser({str(tmp_path)!r}, tokenizer=letter_tokenizer(), max_length=9).model
assert type(model).__name__ == "DiffusionTransformerForMaskedLM"
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["bert-tiny", "dit-tiny"])
def test_seed_decides_new_weights(name: str) -> None:
    def weights(seed: int) -> Tensor:
        torch.rand(1)  # the global generator must not matter
        denoiser = loading.load_denoiser(
            f"builtin:{name}", tokenizer=letter_tokenizer(), max_length=LENGTH, seed=seed
        )
        return denoiser.model.get_input_embeddings().weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_builtin_names_are_those_of_the_config() -> None:
    from tokendiff.config.train import BUILTIN_MODEL_PREFIX, BUILTIN_MODELS

    assert BUILTIN_PREFIX == BUILTIN_MODEL_PREFIX
    for name in BUILTIN_MODELS:
        config = builtin_config(
            name, vocab_size=16, max_length=LENGTH, tokenizer=letter_tokenizer()
        )
        family = {"tokendiff_dit": "dit", "modernbert": "bert"}
        assert name.startswith(family.get(config.model_type, config.model_type))
        longest = 4096 if name.startswith("qwen3") else LENGTH
        assert config.max_position_embeddings == longest
    with pytest.raises(InputError, match="builtin:dit-giant: no such built-in model; there are"):
        loading.load_denoiser("builtin:dit-giant", tokenizer=letter_tokenizer(), max_length=9)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "qwen2", "tokendiff_dit"])
def test_embedding_grows_with_the_tokenizer_and_it_is_said(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    model.resize_token_embeddings(20)
    model.save_pretrained(tmp_path)
    said: list[str] = []
    tokenizer = letter_tokenizer(24)
    denoiser = loading.load_denoiser(
        str(tmp_path), tokenizer=tokenizer, max_length=LENGTH, warn=said.append
    )
    (message,) = said
    token = tokenizer.convert_ids_to_tokens(20)
    assert message == (
        f"4 tokens of the tokenizer are new to the model, {token!r} for one: their embeddings "
        "start at the mean of the others; the embedding grows from 20 rows to 24"
    )
    old = model.get_input_embeddings().weight.detach()
    new = denoiser.model.get_input_embeddings().weight.detach()
    assert torch.equal(new[:20], old)
    torch.testing.assert_close(new[20:], old.mean(0).expand(4, -1), rtol=1e-3, atol=1e-3)
    tokens, is_valid, _ = some_rows()
    assert logits_of(denoiser.eval(), tokens % 24, is_valid).shape == (2, LENGTH, 24)

    said.clear()
    tokenizer = letter_tokenizer(18)  # models are often padded to a round size
    loading.load_denoiser(str(tmp_path), tokenizer=tokenizer, max_length=LENGTH, warn=said.append)
    assert not said


def test_what_leads_to_no_logit_is_frozen_and_said(tmp_path: Path) -> None:
    tiny_model("layoutlm").save_pretrained(tmp_path)
    said: list[str] = []
    with torch.no_grad():  # as in a notebook that goes on to sample
        denoiser = loading.load_denoiser(
            str(tmp_path), tokenizer=letter_tokenizer(VOCAB), max_length=LENGTH, warn=said.append
        )
    frozen = [name for name, p in denoiser.model.named_parameters() if not p.requires_grad]
    assert frozen == ["layoutlm.pooler.dense.weight", "layoutlm.pooler.dense.bias"]
    assert said == [f"2 parameters do not lead to logits and stay as they are: {frozen}"]
    reached, _ = gradients(denoiser)
    assert len(reached) > 20
    assert all(gradient is not None for gradient in reached.values())


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_dropout_is_set_everywhere(model_type: str, tmp_path: Path) -> None:
    tiny_model(model_type).save_pretrained(tmp_path)
    tokens, is_valid, time = some_rows()
    for dropout in (0.0, 0.5):
        denoiser = loading.load_denoiser(
            str(tmp_path), tokenizer=letter_tokenizer(), max_length=LENGTH, dropout=dropout
        ).train()
        modules = [m for m in denoiser.modules() if isinstance(m, torch.nn.Dropout)]
        assert all(module.p == dropout for module in modules)
        twice = [denoiser.head(denoiser.encode(tokens, is_valid, time)) for _ in range(2)]
        assert torch.equal(*twice) == (dropout == 0.0)


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "roberta", "qwen2"])
def test_from_scratch_takes_the_tokenizers_ids(model_type: str, tmp_path: Path) -> None:
    """Samples would end at what another tokenizer calls EOS, here no token, else any other one."""
    others = {"pad_token_id": 99, "bos_token_id": 98, "eos_token_id": 97}
    tiny_config(model_type, vocab_size=100, **others).save_pretrained(tmp_path)
    tokenizer = letter_tokenizer()
    denoiser = loading.load_denoiser(
        str(tmp_path), tokenizer=tokenizer, max_length=LENGTH, from_scratch=True
    )
    assert denoiser.model.get_input_embeddings().num_embeddings == 16
    for name in others:
        assert getattr(denoiser.model.config, name) == getattr(tokenizer, name)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mamba", "a causal language model that is not known to work with attention in both"),
        ("gemma2", "a causal language model that is not known to work with attention in both"),
        ("vit", "which is no language model"),
    ],
)
def test_architectures_that_do_not_fit_are_refused(
    model_type: str, reason: str, tmp_path: Path
) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(InputError) as caught:
        loading.load_denoiser(str(tmp_path), tokenizer=letter_tokenizer(), max_length=LENGTH)
    assert f"is of type '{model_type}', {reason}" in str(caught.value)
    assert "or a causal one of type gpt2" in str(caught.value)


@pytest.mark.parametrize(("model_type", "longest"), [("gpt2", 64), ("roberta", 63)])
def test_rows_longer_than_the_positions_are_refused(
    model_type: str, longest: int, tmp_path: Path
) -> None:
    tiny_model(model_type).save_pretrained(tmp_path)
    options: dict[str, Any] = {"tokenizer": letter_tokenizer()}
    denoiser = loading.load_denoiser(str(tmp_path), max_length=longest, **options)
    tokens = torch.ones(1, longest, dtype=torch.int64)
    logits_of(denoiser, tokens, tokens.bool())
    with pytest.raises(InputError, match=f"takes at most {longest} tokens; max_length is"):
        loading.load_denoiser(str(tmp_path), max_length=longest + 1, **options)


def test_mask_token_must_be_in_the_vocabulary() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0, "a": 1, "[MASK]": 7}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]")
    with pytest.raises(InputError, match=r"'\[MASK\]' has id 7, outside its vocabulary of 3"):
        loading.load_denoiser("builtin:bert-tiny", tokenizer=tokenizer, max_length=LENGTH)
    without = letter_tokenizer()
    without.mask_token = None
    with pytest.raises(InputError, match=r"has no mask token; jobs\.preprocess adds one"):
        loading.load_denoiser("builtin:bert-tiny", tokenizer=without, max_length=LENGTH)


# Isolated documents.


ISOLATING = tuple(name for name in ALL_TYPES if name != "distilbert")
RUNS = ((4, 1, 6), (7, 2))  # documents of each row; the second row is padded


def packed_rows() -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, document, times) of rows that hold several documents."""
    document = torch.full((2, 11), -1)
    for row, runs in enumerate(RUNS):
        document[row, : sum(runs)] = torch.arange(len(runs)).repeat_interleave(torch.tensor(runs))
    tokens = torch.randint(1, VOCAB, (2, 11), generator=torch.Generator().manual_seed(2))
    return tokens, document, torch.tensor([0.25, 0.75], dtype=torch.float64)


def isolated_logits(denoiser: TransformersDenoiser, tokens: Tensor) -> Tensor:
    _, document, time = packed_rows()
    with torch.no_grad():
        return denoiser.head(denoiser.encode(tokens, document >= 0, time, document))


@pytest.mark.parametrize("kernel", ["tiles", "dense", "flex"])
@pytest.mark.parametrize("model_type", ISOLATING)
def test_isolated_documents_are_what_each_is_alone(model_type: str, kernel: Any) -> None:
    """By every kernel; a model with a window of 2 keeps it. Between two calls with isolation, the
    documents alone go the way of rows that are not isolated.
    """
    if (model_type, kernel) == ("gpt2", "flex"):
        pytest.skip("transformers gives GPT-2 no flex_attention; on CUDA it attends by tiles")
    fields: dict[str, Any] = {"local_attention": 4} if model_type == "modernbert" else {}
    model = tiny_model(model_type, **fields)
    denoiser = TransformersDenoiser(model, vocab_size=VOCAB, attention_kernel=kernel)
    tokens, document, time = packed_rows()
    with torch.compiler.set_stance("force_eager"):
        together = isolated_logits(denoiser, tokens)
        assert model.config._attn_implementation == IMPLEMENTATIONS[kernel]
        for row, runs in enumerate(RUNS):
            for index in range(len(runs)):
                alone = tokens[row : row + 1, document[row] == index]
                valid = torch.ones_like(alone, dtype=torch.bool)
                with torch.no_grad():
                    hidden = denoiser.encode(alone, valid, time[row : row + 1])
                    expected = denoiser.head(hidden)[0]
                ours = together[row, document[row] == index]
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(isolated_logits(denoiser, tokens), together)


@pytest.mark.parametrize("kernel", ["tiles", "dense"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_two_denoisers_around_a_model_leave_each_other_its_attention(
    attention: str, kernel: Any
) -> None:
    model = tiny_model("bert", attention=attention)
    tokens, is_valid, _ = some_rows()
    packed = packed_rows()[0]
    first = TransformersDenoiser(model, vocab_size=VOCAB, attention_kernel=kernel)
    expected = logits_of(first, tokens, is_valid)
    together = isolated_logits(first, packed)
    second = TransformersDenoiser(model, vocab_size=VOCAB, attention_kernel=kernel)
    for denoiser in (second, first):
        assert torch.equal(logits_of(denoiser, tokens, is_valid), expected)
        assert model.config._attn_implementation == attention
        assert torch.equal(isolated_logits(denoiser, packed), together)


@pytest.mark.parametrize("model_type", ISOLATING)
def test_a_changed_neighbour_changes_no_bit(model_type: str) -> None:
    denoiser = tiny_denoiser(model_type)
    tokens, document, _ = packed_rows()
    before = isolated_logits(denoiser, tokens)
    for index in (0, 1, -1):
        is_changed = document == index
        other = torch.where(is_changed, 1 + tokens % (VOCAB - 1), tokens)
        after = isolated_logits(denoiser, other)
        assert torch.equal(
            before[~is_changed & (document >= 0)], after[~is_changed & (document >= 0)]
        )
        if index >= 0:
            assert not torch.equal(before[is_changed], after[is_changed])


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "tokendiff_dit"])
def test_isolation_has_the_gradients_of_the_documents_alone(model_type: str) -> None:
    """Also with activations that are computed again."""
    tokens, document, time = packed_rows()
    gradients = []
    for recomputes in (False, True):
        denoiser = tiny_denoiser(model_type)
        parameters = [p for p in denoiser.parameters() if p.requires_grad]
        if recomputes:
            denoiser.train()
            for module in denoiser.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            denoiser.recompute_activations()
        hidden = denoiser.encode(tokens, document >= 0, time, document)
        loss = denoiser.head(hidden[document >= 0]).logsumexp(-1).sum()
        gradients.append(torch.autograd.grad(loss, parameters, materialize_grads=True))
    denoiser = tiny_denoiser(model_type)
    total = torch.zeros(())
    for row, runs in enumerate(RUNS):
        for index in range(len(runs)):
            alone = tokens[row : row + 1, document[row] == index]
            valid = torch.ones_like(alone, dtype=torch.bool)
            hidden = denoiser.encode(alone, valid, time[row : row + 1])
            total = total + denoiser.head(hidden).logsumexp(-1).sum()
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    expected = torch.autograd.grad(total, parameters, materialize_grads=True)
    for ours in gradients:
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_rows_of_one_document_each_are_read_as_without_isolation() -> None:
    denoiser = tiny_denoiser("bert")
    tokens, is_valid, time = some_rows()
    whole = torch.zeros_like(tokens)
    with torch.no_grad():
        ours = denoiser.encode(tokens, whole == 0, time, whole)
        assert torch.equal(ours, denoiser.encode(tokens, whole == 0, time))
        padded = denoiser.encode(tokens, is_valid, time, is_valid.long() - 1)[is_valid]
        torch.testing.assert_close(padded, denoiser.encode(tokens, is_valid, time)[is_valid])


def test_an_architecture_that_cannot_isolate_is_refused() -> None:
    tokens, document, time = packed_rows()
    with pytest.raises(InputError, match=r"'distilbert'.*isolate_documents.*bert"):
        tiny_denoiser("distilbert").encode(tokens, document >= 0, time, document)
