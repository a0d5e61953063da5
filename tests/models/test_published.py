"""Published denoisers of whole rows: opened without their code, trained, saved as they came."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.builders import letter_tokenizer, random_rows, tiny_causal, token_folder
from tests.models.published import (
    EMBEDDINGS,
    EOS,
    FAMILIES,
    LLADA_CONFIG,
    LLADA_MOE_CONFIG,
    MASK,
    V,
    dream,
    llada,
    llada_moe,
    llada_names,
    reference_logits,
)
from tests.training.distributed import assert_same_weights, run_distributed
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.train import TrainConfig
from tokendiff.data.prompts import GenerationRow
from tokendiff.data.rows import TokenData
from tokendiff.data.tokenizers import build_tokenizer, open_tokenizer
from tokendiff.errors import InputError
from tokendiff.models.checkpoints import load_for_inference
from tokendiff.models.completion import CompletionSetup
from tokendiff.models.decoding import find_stop_tokens
from tokendiff.models.dflash.planning import open_target_config
from tokendiff.models.opening import load_causal_denoiser, load_denoiser
from tokendiff.models.pretrained import open_config
from tokendiff.models.sampling import PromptCheck, SamplingModel
from tokendiff.training.inputs import check_inputs
from tokendiff.training.run import train_in_process

LENGTH = 12


def opened(folder: Path, **fields: Any) -> Any:
    given = {"tokenizer": letter_tokenizer(V), "max_length": LENGTH, "allow_new_weights": False}
    return load_denoiser(str(folder), **{**given, **fields}).eval()


def some_tokens(rows: int = 3) -> torch.Tensor:
    tokens = torch.tensor(random_rows(rows, LENGTH))
    tokens[:, 3:7] = MASK
    return tokens


def logits_of(denoiser: Any, tokens: torch.Tensor, is_valid: torch.Tensor | None = None) -> Any:
    valid = torch.ones_like(tokens).bool() if is_valid is None else is_valid
    with torch.no_grad():
        return denoiser.head(denoiser.encode(tokens, valid, torch.zeros(len(tokens))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes", [{}, {"weight_tying": True}, {"n_kv_heads": 4}, {"embedding_size": 40}]
)
def test_llada_is_a_llama_that_sees_whole_rows(
    changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = llada(tmp_path, dtype=dtype, **changes)
    tokens = some_tokens()
    torch.testing.assert_close(logits_of(opened(tmp_path), tokens), reference_logits(model, tokens))


def test_dream_is_a_qwen2_whose_states_tell_what_is_behind_them(tmp_path: Path) -> None:
    model = dream(tmp_path, dtype=torch.bfloat16)
    tokens = some_tokens()
    expected = reference_logits(model, tokens)
    ours = logits_of(opened(tmp_path), tokens)
    torch.testing.assert_close(ours[:, 1:], expected[:, :-1])
    torch.testing.assert_close(ours[:, 0], expected[:, 0])  # which no state stands before


def test_llada_moe_is_a_qwen3_with_experts(tmp_path: Path) -> None:
    model = llada_moe(tmp_path)
    assert "model.layers.1.mlp.experts.5.up_proj.weight" in load_file(
        tmp_path / "model.safetensors"
    )
    tokens = some_tokens()
    torch.testing.assert_close(logits_of(opened(tmp_path), tokens), reference_logits(model, tokens))
    sampler = {"name": "blockwise", "cache": "dual", "block_size": 4}
    sampling = SamplingModel(None, generate_config(tmp_path, sampler=sampler), device="cpu")
    (record,) = sampling.sample([GenerationRow(id=0, prompt="ab")])
    assert MASK not in record["tokens"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"objective": {"name": "udlm"}}, "objective 'udlm' would make another model of one of"),
        ({"objective": {"name": "hybrid"}}, "would make another .*'lladamoe', which could not be"),
        ({"objective": {"name": "mdlm", "predict": "next"}}, "loaders assume predict 'own'"),
        ({"optimizer": "muon"}, "optimizer 'muon' with a model of type 'lladamoe': its experts"),
        ({"objective": {"name": "ar"}}, "a denoiser of whole rows; train it with objective 'mdlm'"),
    ],
)
def test_what_could_not_be_saved_of_a_llada_moe_is_not_trained(
    changes: dict[str, Any], says: str, data: TokenData, tmp_path: Path
) -> None:
    llada_moe(tmp_path)
    for make in (check_inputs, lambda cfg, rows: train_in_process(cfg, rows, tmp_path / "run")):
        with pytest.raises(InputError, match=says):
            make(train_config(tmp_path, **changes), data)


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_is_not_seen(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name](tmp_path)
    tokens = some_tokens()
    is_valid = torch.ones_like(tokens).bool()
    is_valid[1, 8:] = False
    ours = logits_of(opened(tmp_path), tokens, is_valid)
    expected = reference_logits(model, tokens[1:2, :8])[0]
    if name == "Dream":
        expected = torch.cat([expected[:1], expected[:-1]])
    torch.testing.assert_close(ours[1, :8], expected)


def test_isolated_documents_are_told_from_within(tmp_path: Path) -> None:
    dream(tmp_path)
    denoiser, tokens = opened(tmp_path), some_tokens(1)
    document = torch.tensor([[0] * 5 + [1] * 7])
    valid = torch.ones_like(tokens).bool()
    with torch.no_grad():
        ours = denoiser.encode(tokens, valid, torch.zeros(1), document)
        apart = [
            denoiser.encode(part, torch.ones_like(part).bool(), torch.zeros(1))
            for part in (tokens[:, :5], tokens[:, 5:])
        ]
    torch.testing.assert_close(ours, torch.cat(apart, dim=1), rtol=1e-4, atol=1e-5)


def test_weights_stay_in_their_files_where_they_may(tmp_path: Path) -> None:
    llada(tmp_path, dtype=torch.bfloat16)
    denoiser = opened(tmp_path, is_on_disk=True)
    layer = denoiser.model.model.layers[0].mlp.up_proj.weight
    assert layer.dtype == torch.bfloat16
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    homes = [fields[0].split("-") for fields in maps if fields[-1].endswith("model.safetensors")]
    assert any(int(a, 16) <= layer.data_ptr() < int(b, 16) for a, b in homes)


# Training.


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    folder = token_folder(
        tmp_path_factory.mktemp("tokens") / "data",
        files=[random_rows(40, LENGTH)],
        max_length=LENGTH,
        tokenizer=letter_tokenizer(V),
    )
    return TokenData.open(folder, split="train")


def train_config(folder: Path, **changes: Any) -> TrainConfig:
    fields = {
        "model_name_or_path": str(folder),
        "max_train_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "objective": {"name": "mdlm"},
    }
    return TrainConfig.model_validate({**fields, **changes})


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2, "ema_decay": 0.5}])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_trained_is_saved_in_the_layout_that_it_came_in(
    name: str, changes: dict[str, Any], data: TokenData, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    model = FAMILIES[name](source)
    (source / "modeling_own.py").write_text("raise RuntimeError('never run')\n")
    (source / "generation_config.json").write_text('{"eos_token_id": 2, "alg": "entropy"}')
    final = train_in_process(train_config(source, **changes), data, tmp_path / "run")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, Path(final)))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    configs = [json.loads((Path(f) / "config.json").read_text()) for f in (source, final)]
    configs[0] |= {"torch_dtype": "float32"} if name == "Dream" else {}
    assert configs[0] == configs[1]
    for file in ("modeling_own.py", "generation_config.json"):
        assert (Path(final) / file).read_text() == (source / file).read_text()
    # Read as the published loader does, name by name.
    names = llada_names() if name == "llada" else {}
    if name == "lladamoe":  # the names of transformers
        model = type(model).from_pretrained(final, config=model.config)
    else:
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(after[names.get(key, key)])
    denoiser, _, process = load_for_inference(final)
    assert process.predict == ("next" if name == "Dream" else "own")
    tokens = some_tokens()
    expected = reference_logits(model, tokens)
    if name == "Dream":
        expected = torch.cat([expected[:, :1], expected[:, :-1]], dim=1)
    torch.testing.assert_close(logits_of(denoiser, tokens), expected, rtol=1e-4, atol=1e-4)
    again = train_in_process(train_config(Path(final)), data, tmp_path / "again")
    assert load_file(Path(again) / "model.safetensors").keys() == before.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llada", "lladamoe"])
def test_an_interrupted_run_goes_on_from_published_names(
    name: str, data: TokenData, tmp_path: Path
) -> None:
    FAMILIES[name](tmp_path / "source")
    fields = {"checkpointing_steps": 1, "lr_scheduler": "constant", "ema_decay": 0.5}
    cfg, short = (
        train_config(tmp_path / "source", **fields, max_train_steps=steps) for steps in (2, 1)
    )
    whole = train_in_process(cfg, data, tmp_path / "whole")
    train_in_process(short, data, tmp_path / "cut")
    cut = train_in_process(cfg, data, tmp_path / "cut")
    files = [load_file(Path(folder) / "model.safetensors") for folder in (whole, cut)]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


@pytest.mark.slow
def test_workers_that_share_a_llada_moe_write_what_one_does(
    data: TokenData, tmp_path: Path
) -> None:
    llada_moe(tmp_path / "source")
    fields: dict[str, Any] = {"checkpointing_steps": 1, "learning_rate": 1e-4}
    one = train_config(tmp_path / "source", **fields)
    train_in_process(one, data, tmp_path / "one")
    both = train_config(tmp_path / "source", **fields, sharding="full")
    run_distributed([(both, tmp_path / "two")], data, 2)
    assert_same_weights(tmp_path / "two/final", tmp_path / "one/final")


def test_other_noise_makes_a_plain_llama_of_it(data: TokenData, tmp_path: Path) -> None:
    llada(tmp_path / "source")
    cfg = train_config(tmp_path / "source", objective={"name": "udlm"})
    final = Path(train_in_process(cfg, data, tmp_path / "run"))
    fields = json.loads((final / "config.json").read_text())
    assert (fields["model_type"], fields["is_causal"]) == ("llama", False)
    assert not any(name.startswith("published") for name in fields)
    assert "model.embed_tokens.weight" in load_file(final / "model.safetensors")
    load_for_inference(final)


def test_a_larger_vocabulary_is_written_into_the_published_config(tmp_path: Path) -> None:
    llada(tmp_path / "source")
    folder = token_folder(
        tmp_path / "data",
        files=[random_rows(8, LENGTH)],
        max_length=LENGTH,
        tokenizer=letter_tokenizer(EMBEDDINGS + 6),
    )
    rows = TokenData.open(folder, split="train")
    final = Path(train_in_process(train_config(tmp_path / "source"), rows, tmp_path / "run"))
    fields = json.loads((final / "config.json").read_text())
    assert fields["embedding_size"] == fields["vocab_size"] == EMBEDDINGS + 6
    assert load_for_inference(final)[0].vocab_size == EMBEDDINGS + 6


def sdar(folder: Path, **changes: Any) -> None:
    tiny_causal(vocab_size=EMBEDDINGS).save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text()) | {"model_type": "sdar"} | changes
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("write", "objective"),
    [
        (llada, {"name": "mdlm"}),
        (dream, {"name": "mdlm"}),
        (llada_moe, {"name": "mdlm"}),
        (sdar, {"name": "block_diffusion", "block_length": 4}),
    ],
)
def test_what_starts_from_scratch_has_the_special_tokens_of_its_rows(
    write: Callable[..., Any], objective: dict[str, Any], data: TokenData, tmp_path: Path
) -> None:
    """The ids of the source are beyond the vocabulary of the rows."""
    source = tmp_path / "source"
    write(source, pad_token_id=V + 1, bos_token_id=V + 2, eos_token_id=V + 2)
    (source / "generation_config.json").write_text(f'{{"eos_token_id": {V + 2}}}')
    cfg = train_config(source, from_scratch=True, objective=objective)
    final = Path(train_in_process(cfg, data, tmp_path / "run"))
    saved = json.loads((final / "config.json").read_text())
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "vocab_size")
    assert [saved[name] for name in names] == [0, None, EOS, V]
    assert saved["model_type"] == json.loads((source / "config.json").read_text())["model_type"]
    assert find_stop_tokens(
        str(final), open_config(str(final), field="x", remedy="y"), letter_tokenizer(V)
    ) == (EOS,)
    load_for_inference(final)
    train_in_process(train_config(final, objective=objective), data, tmp_path / "again")


def test_a_hub_model_keeps_pointing_at_its_code(tmp_path: Path) -> None:
    from tokendiff.models.families import FAMILIES as TABLE
    from tokendiff.models.layouts import write_beside

    llada(tmp_path)
    config = open_config(str(tmp_path), field="model_id", remedy="")
    config.published_name = "someone/llada"
    (tmp_path / "out").mkdir()
    layout = TABLE["llada"].layout
    assert layout is not None
    write_beside(config, layout, tmp_path / "out")
    fields = json.loads((tmp_path / "out/config.json").read_text())
    assert fields["auto_map"]["AutoModel"] == "someone/llada--modeling_llada.LLaDAModelLM"


# Sampling.


def generate_config(folder: Path | str, **changes: Any) -> GenerateConfig:
    fields: dict[str, Any] = {"model_id": str(folder), "seq_len": LENGTH, "num_samples": 1}
    return GenerateConfig.model_validate({**fields, **changes})


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_samples_fill_one_by_one_what_the_reference_says(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name](tmp_path)
    sampler = {"name": "blockwise", "block_size": 1, "num_inference_steps": 1, "temperature": 0.0}
    rows = [GenerationRow(id=0, prompt="abc")]
    sampling = SamplingModel(None, generate_config(tmp_path, sampler=sampler), device="cpu")
    (record,) = sampling.sample(rows)
    tokens = torch.full((1, LENGTH), MASK)
    tokens[0, :3] = torch.tensor([4, 5, 6])
    for place in range(3, LENGTH):
        logits = reference_logits(model, tokens)[0, place - (name == "Dream")]
        logits[MASK] = -torch.inf
        tokens[0, place] = logits.argmax()
    assert record["tokens"] == tokens[0].tolist()


def test_chats_are_written_as_the_family_writes_them(tmp_path: Path) -> None:
    llada(tmp_path)
    check = PromptCheck.of(
        None, generate_config(tmp_path, use_chat_template=True, add_generation_prompt=True)
    )
    messages = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "yes"}]
    text = check.encoder.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, bos_token="<|startoftext|>"
    )
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert text == (
        "<|startoftext|>" + head.format("user") + "hi<|eot_id|>" + head.format("assistant")
    ) + "yes<|eot_id|>" + head.format("assistant")


# What does not go.

CHANGES: list[tuple[dict[str, Any], str]] = [
    (LLADA_MOE_CONFIG | {"qk_layernorm": None}, "qk_layernorm None"),
    (LLADA_MOE_CONFIG | {"shared_expert_intermediate_size": 8}, "shared_expert_.*size 8"),
    (LLADA_MOE_CONFIG | {"moe_router_enable_expert_bias": True}, "enable_expert_bias True"),
    (LLADA_MOE_CONFIG | {"moe_router_score_function": "sigmoid"}, "score_function 'sigmoid'"),
    (LLADA_MOE_CONFIG | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    (LLADA_MOE_CONFIG | {"routed_scaling_factor": 2.5}, "routed_scaling_factor 2.5"),
    (LLADA_MOE_CONFIG | {"n_group": 8}, "n_group 8"),
    (LLADA_MOE_CONFIG | {"num_shared_experts": 1}, "num_shared_experts 1"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling .*linear"),
    ({"residual_dropout": 0.3}, "residual_dropout 0.3"),
    ({"embedding_dropout": 0.3}, "embedding_dropout 0.3"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"alibi": True}, "alibi True"),
    ({"layer_norm_type": "default"}, "layer_norm_type 'default'"),
    ({"scale_logits": True}, "scale_logits True"),
    ({"activation_type": "swiglu"}, "activation_type 'swiglu'"),
    ({"d_model": "wide"}, "must have d_model, a whole number, got 'wide'"),
]


@pytest.mark.parametrize(("changes", "says"), CHANGES)
def test_a_llada_that_is_no_llama_is_refused(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLADA_CONFIG | changes))
    with pytest.raises(InputError, match=rf"^model_id '.*' cannot be opened \(.*{says}.*; give"):
        open_config(str(tmp_path), field="model_id", remedy="give another")


@pytest.mark.parametrize(
    "fields",
    [
        LLADA_CONFIG | {"residual_dropout": 0.0, "rope_scaling": None, "partial_rotary_factor": 1},
        LLADA_CONFIG | {"flash_attention": False, "precision": "amp_bf16", "mlp_ratio": 4},
        LLADA_MOE_CONFIG | {"partial_rotary_factor": 1, "moe_router_score_function": "softmax"},
        LLADA_MOE_CONFIG | {"routed_scaling_factor": 1, "router_num_group": -2, "n_group": None},
    ],
)
def test_fields_that_change_nothing_are_allowed(fields: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = open_config(str(tmp_path), field="model_id", remedy="give another")
    assert config.model_type == ("tokendiff_lladamoe" if "num_experts" in fields else "llama")


def test_what_does_not_go_with_a_denoiser_is_said(data: TokenData, tmp_path: Path) -> None:
    llada(tmp_path / "llada")
    dream(tmp_path / "dream")
    with pytest.raises(InputError, match="type 'llada', a denoiser of whole rows; train it with"):
        load_causal_denoiser(
            str(tmp_path / "llada"), tokenizer=letter_tokenizer(V), max_length=LENGTH
        )
    cfg = train_config(tmp_path / "dream", objective={"name": "mdlm", "predict": "own"})
    says = r"predict 'own': .*'Dream'.* predict 'next'; remove predict"
    with pytest.raises(InputError, match=says):
        check_inputs(cfg, data)
    sdar = GenerateConfig.model_validate({"model_id": str(tmp_path / "llada"), "sampler": "sdar"})
    with pytest.raises(InputError, match=r"sampler 'sdar': .*'llada'.*use sampler 'blockwise'"):
        CompletionSetup.of(sdar, None)
    with pytest.raises(InputError, match="not a causal language model"):
        open_target_config(str(tmp_path / "llada"))


def test_published_denoisers_are_listed_where_another_model_is_given(tmp_path: Path) -> None:
    tiny_causal(vocab_size=V).save_pretrained(tmp_path)
    letter_tokenizer(V).save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"'qwen3', and published .* are Dream, llada, lladamoe; use .* 'ar'"
    ):
        PromptCheck.of(None, generate_config(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "nobody", "auto_map": {"AutoConfig": 1}}')
    with pytest.raises(
        InputError,
        match=r"of type 'nobody' \(tokendiff adds Dream, diffusion_gemma, llada, .*sdar",
    ):
        PromptCheck.of(None, generate_config(tmp_path))
    with pytest.raises(
        InputError, match=r"model_id 'nobody/there' cannot be opened \(.*; give the hub"
    ):
        PromptCheck.of(None, generate_config("nobody/there"))


def test_a_mask_that_the_model_did_not_learn_is_refused(data: TokenData, tmp_path: Path) -> None:
    llada(tmp_path, mask_token_id=5)
    with pytest.raises(InputError, match=r"its mask is id 5, .* is '\[MASK\]', id 1; preprocess"):
        check_inputs(train_config(tmp_path), data)
    (tmp_path / "config.json").write_text(json.dumps(LLADA_CONFIG | {"mask_token_id": V + 3}))
    with pytest.raises(InputError, match=f"mask token has id {V + 3}, but its tokenizer"):
        PromptCheck.of(None, generate_config(tmp_path))


def test_the_mask_of_the_config_wins_over_that_of_the_tokenizer(tmp_path: Path) -> None:
    llada(tmp_path, mask_token_id=5)
    assert PromptCheck.of(None, generate_config(tmp_path)).encoder.tokenizer.mask_token_id == 5
    assert SamplingModel(None, generate_config(tmp_path), device="cpu").process.mask_token_id == 5


@pytest.mark.parametrize("token", ["<|mdm_mask|>", "<|mask|>"])
def test_preprocessing_takes_the_mask_that_a_tokenizer_has(token: str, tmp_path: Path) -> None:
    tokenizer = letter_tokenizer(V)
    tokenizer.add_tokens([token], special_tokens=True)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path)
    found, notes = build_tokenizer(str(tmp_path), documents=(), vocab_size=0)
    assert (found.mask_token, found.mask_token_id, len(found)) == (token, V, V + 1)
    assert any(token in note for note in notes)


def test_dreams_tokenizer_is_qwen2s(tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    letters = {letter: index for index, letter in enumerate("abcdefgh")}
    vocabulary = {**letters, "ab": 8, "Ġ": 9, "Ġab": 10}
    merges: Any = [("a", "b"), ("Ġ", "ab")]
    own = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "DreamTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
                "eos_token": "<|endoftext|>",
                "mask_token": "<|mask|>",
                "added_tokens_decoder": {
                    "11": {"content": "<|endoftext|>", "special": True},
                    "12": {"content": "<|mask|>", "special": True},
                },
            }
        )
    )
    tokenizer = open_tokenizer(tmp_path, field="model_id")
    text = "ab abcab"
    assert tokenizer(text)["input_ids"] == own(text)["input_ids"]
    assert (tokenizer.eos_token_id, tokenizer.mask_token_id) == (11, 12)
    tokenizer.save_pretrained(tmp_path / "again")
    assert (
        open_tokenizer(tmp_path / "again", field="x")(text)["input_ids"] == own(text)["input_ids"]
    )


def test_config_fields_that_have_no_effect(tmp_path: Path) -> None:
    makes: list[tuple[Callable[[], Any], str]] = [
        (
            lambda: generate_config("m", trust_remote_code=True),
            "trust_remote_code True has no effect with sampler 'ancestral', which runs no remote",
        ),
        (
            lambda: generate_config("m", seq_len=None),
            "with a model_id needs the length of a sample",
        ),
    ]
    for make, says in makes:
        with pytest.raises(ValueError, match=says):
            make()


@pytest.mark.parametrize(
    ("objective", "model_type"),
    [({"name": "block_diffusion", "block_length": 4}, "sdar"), ({"name": "ar"}, "qwen3")],
)
def test_sdar_stays_sdar_as_long_as_it_is_one(
    objective: dict[str, Any], model_type: str, data: TokenData, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    sdar(source)
    letter_tokenizer(V).save_pretrained(source)
    fields = json.loads((source / "config.json").read_text())
    final = Path(
        train_in_process(train_config(source, objective=objective), data, tmp_path / "run")
    )
    saved = json.loads((final / "config.json").read_text())
    assert saved["model_type"] == model_type
    assert not any(name.startswith("published") for name in saved)
    assert (saved == fields | {"dtype": "float32"}) == (model_type == "sdar")
