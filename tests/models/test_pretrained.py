"""Models by name: whichever field gives the name, the same is read, and the same is refused."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import _CACHED_NO_EXIST
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import httpx
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from tests.builders import letter_tokenizer, tiny_causal
from tokendiff.artifacts.model_folders import revision_of
from tokendiff.data.tokenizers import open_tokenizer
from tokendiff.errors import InputError, input_errors
from tokendiff.evaluation.reference import check_reference, generative_perplexity
from tokendiff.models.checkpoints import load_for_inference
from tokendiff.models.decoding import find_stop_tokens, open_causal, open_causal_config
from tokendiff.models.default_sampler import default_sampler
from tokendiff.models.dflash.planning import DraftPlan, new_draft_config, open_target_config
from tokendiff.models.dflash.trainee import load_trainee
from tokendiff.models.opening import load_causal_denoiser, load_denoiser
from tokendiff.models.pretrained import commit_of, dtype_in_files, open_config, open_weights

V, LENGTH = 16, 9
BERT: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


def saved(folder: Path, model: Any) -> str:
    """A model of 16 ids beside the tokenizer that they are of."""
    model.float().save_pretrained(folder)
    letter_tokenizer(V).save_pretrained(folder)
    return str(folder)


def causal(folder: Path, **fields: Any) -> str:
    return saved(folder, tiny_causal(vocab_size=V, num_hidden_layers=6, **fields))


def target_of(name: str) -> Any:
    target = open_target_config(name)
    draft = new_draft_config(
        target, target_model_id=name, num_layers=1, block_size=2, mask_token_id=1
    )
    plan = DraftPlan(draft=draft, target=target, target_model_id=name, draft_model_id=None)
    return load_trainee(plan, device=torch.device("cpu")).target


def reference(name: str) -> Any:
    sizes: dict[str, Any] = {"batch_size": 2, "max_length": 8, "device": "cpu"}
    return generative_perplexity(["abc"], name, given=[""], **sizes)


# Every field that names a causal model, and what opens it.
FIELDS: dict[str, Callable[[str], Any]] = {
    "model_name_or_path": lambda name: load_causal_denoiser(
        name, tokenizer=letter_tokenizer(V), max_length=LENGTH
    ),
    "model_id": open_causal,
    "target_model_id": target_of,
    "reference_model_name_or_path": reference,
}


@pytest.mark.parametrize("field", FIELDS)
def test_sdar_is_opened_as_the_qwen3_that_it_is_by_every_field(field: str, tmp_path: Path) -> None:
    folder = Path(causal(tmp_path))
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"model_type": "sdar", "auto_map": {"AutoModelForCausalLM": "modeling.SDAR"}}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="sdar"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert open_config(str(folder), field=field, remedy="").published_model_type == "sdar"
    FIELDS[field](str(folder))


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    "text",
    [
        "{",
        "5",
        "[]",
        '{"model_type": "qwen3", "hidden_size": "wide"}',
        '{"model_type": "qwen3", "rope_parameters": 5}',
        '{"model_type": "nobody"}',
    ],
)
def test_a_config_that_cannot_be_read_is_bad_input(field: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=rf"^{field} '.*' cannot be opened \(.*\); give "):
        FIELDS[field](str(tmp_path))


@pytest.mark.parametrize("field", FIELDS)
def test_weights_that_cannot_be_read_are_bad_input(field: str, tmp_path: Path) -> None:
    folder = Path(causal(tmp_path))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:999])
    with pytest.raises(InputError, match=rf"^{field} '.*': weights cannot be read \(.*header"):
        FIELDS[field](str(folder))
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    with pytest.raises(InputError, match=rf"^{field} '.*': weights cannot be read"):
        FIELDS[field](str(folder))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=rf"^{field} '.*': a config but no weights; "):
        FIELDS[field](str(folder))
    tensors = {"lm_head.weight": torch.ones(3, 3), "model.norm.weight": torch.ones(32)}
    save_file(tensors, weights, metadata={"format": "pt"})
    shape = rf"^{field} '.*': 1 of its weights have another shape .*lm_head.weight is \[3, 3\], not"
    with pytest.raises(InputError, match=shape):
        FIELDS[field](str(folder))


@pytest.mark.parametrize("opened", [open_causal_config, check_reference])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_bad_input(
    opened: Callable[[str], Any], name: str, text: str, tmp_path: Path
) -> None:
    folder = Path(causal(tmp_path))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=r"holds no tokenizer \(no tokenizer\.json"):
        opened(str(folder))
    (folder / name).write_text(text)
    with pytest.raises(InputError, match="no tokenizer can be opened there"):
        opened(str(folder))


@pytest.mark.parametrize("opened", [open_causal_config, check_reference])
@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "a/folder/model"])
def test_a_folder_that_is_not_there_is_no_name_of_the_hub(
    opened: Callable[[str], Any], name: str
) -> None:
    with pytest.raises(InputError, match=r"\(there is no folder /.*(nowhere|a/folder)"):
        opened(name)


# Weights that the folder does not have.


def heard(name: str, **options: Any) -> tuple[Any, list[str]]:
    said: list[str] = []
    fields: dict[str, Any] = {"tokenizer": letter_tokenizer(V), "max_length": LENGTH, **options}
    return load_denoiser(name, warn=said.append, **fields), said


def names_in(folder: str) -> set[str]:
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_a_head_that_is_new_is_named_and_so_is_what_is_not_used(tmp_path: Path) -> None:
    encoder = saved(tmp_path, BertModel(BertConfig(**BERT)))
    denoiser, said = heard(encoder)
    new, unused = said
    # By names alone: what the model has of its own, but for what is tied.
    model = denoiser.model
    read = {f"bert.{name}" for name in names_in(encoder)}
    missing = {name: p for name, p in model.named_parameters() if name not in read}
    assert missing
    share = sum(map(Tensor.numel, missing.values())) / sum(map(Tensor.numel, model.parameters()))
    assert new == (
        f"model_name_or_path {encoder!r} has no weights for {', '.join(list(missing)[:3])} and "
        f"{len(missing) - 3} more; {len(missing)} parameters, {100 * share:.2g} % of the model, "
        "start new and random"
    )
    assert unused == (
        f"model_name_or_path {encoder!r}: 2 of its weights have no place in the model and are not "
        "used: pooler.dense.bias, pooler.dense.weight"
    )


def test_new_weights_are_of_the_seed(tmp_path: Path) -> None:
    encoder = saved(tmp_path, BertModel(BertConfig(**BERT)))

    def head(seed: int) -> Tensor:
        return heard(encoder, seed=seed)[0].model.cls.predictions.transform.dense.weight

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


@pytest.mark.parametrize(
    ("model", "unused"),
    [
        (lambda: BertForMaskedLM(BertConfig(**BERT)), None),
        (lambda: BertForPreTraining(BertConfig(**BERT)), "cls.seq_relationship.bias"),
        (lambda: tiny_causal(vocab_size=V), None),
        (lambda: tiny_causal(vocab_size=V, tie_word_embeddings=True), None),
        # Its head is its embedding, so nothing is new.
        (lambda: Qwen3Model(tiny_causal(vocab_size=V, tie_word_embeddings=True).config), None),
        (lambda: tiny_causal("gpt2", vocab_size=V), None),
    ],
)
def test_whole_models_have_no_new_weights(
    model: Callable[[], Any], unused: str | None, tmp_path: Path
) -> None:
    _, said = heard(saved(tmp_path, model()))
    assert len(said) == (unused is not None)
    assert all("have no place in the model" in text and str(unused) in text for text in said)


def test_a_buffer_is_no_weight(tmp_path: Path) -> None:
    """RoBERTa's older files hold its positions, and no file needs to."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    config = RobertaConfig(**BERT, pad_token_id=0)
    folder = saved(tmp_path, RobertaForMaskedLM(config))
    path = tmp_path / "model.safetensors"
    positions = {"roberta.embeddings.position_ids": torch.arange(64)[None]}
    save_file({**load_file(path), **positions}, path, metadata={"format": "pt"})
    assert heard(folder)[1] == []


@pytest.mark.parametrize(("kept", "is_refused"), [(2, False), (1, True)])
def test_a_folder_that_gives_less_than_half_is_refused_unless_all_is_to_be_new(
    kept: int, is_refused: bool, tmp_path: Path
) -> None:
    """Of four layers, without two 48 % of the model are new, without three 72 %."""
    model = tiny_causal(vocab_size=V, num_hidden_layers=4).float()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    left = {
        name: value
        for name, value in tensors.items()
        if ".layers." not in name or int(name.split(".")[2]) < kept
    }
    save_file(left, tmp_path / "model.safetensors", metadata={"format": "pt"})
    total = sum(map(Tensor.numel, model.parameters()))
    share = 1 - sum(map(Tensor.numel, left.values())) / total
    assert (share > 0.5) == is_refused
    said: list[str] = []
    options: dict[str, Any] = {"tokenizer": letter_tokenizer(V), "max_length": LENGTH}
    if is_refused:
        with pytest.raises(InputError, match=f"more, {100 * share:.2g} % of the model; give the"):
            load_causal_denoiser(str(tmp_path), warn=said.append, **options)
        anew = load_causal_denoiser(str(tmp_path), from_scratch=True, **options)
        assert sum(map(Tensor.numel, anew.parameters())) == total
    else:
        load_causal_denoiser(str(tmp_path), warn=said.append, **options)
        assert f"{100 * share:.2g} % of the model, start new and random" in said[0]


def test_opening_a_model_writes_nothing_to_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers draws a bar, and prints a table of the weights that are missing, and of those
    that its tensor parallelism would not spread.
    """
    for handler in logging.getLogger("transformers").handlers:
        if type(handler) is logging.StreamHandler:  # which keeps the stderr of its import
            monkeypatch.setattr(handler, "stream", sys.stderr)
    folder = Path(causal(tmp_path))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said: list[str] = []
    options: dict[str, Any] = {"tokenizer": letter_tokenizer(V), "max_length": LENGTH}
    capfd.readouterr()
    load_causal_denoiser(str(folder), warn=said.append, **options)
    assert capfd.readouterr() == ("", "")
    assert "model.layers.3.mlp.up_proj.weight" in said[0]


@pytest.mark.parametrize("field", [field for field in FIELDS if field != "model_name_or_path"])
def test_a_model_that_is_used_as_it_is_must_be_whole(field: str, tmp_path: Path) -> None:
    folder = Path(causal(tmp_path))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.3.mlp.up_proj.weight"], tensors["lm_head.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    lost = "model.layers.3.mlp.up_proj.weight, lm_head.weight"
    with pytest.raises(InputError, match=rf"^{field} '.*' has no weights for {lost}; give a f"):
        FIELDS[field](str(folder))
    said: list[str] = []
    load_causal_denoiser(
        str(folder), tokenizer=letter_tokenizer(V), max_length=LENGTH, warn=said.append
    )
    assert "2 parameters" in said[0]


def test_a_checkpoint_that_lost_weights_is_not_sampled_from(tmp_path: Path) -> None:
    """One of the published scripts, which has no manifest to tell."""
    model = BertForMaskedLM(BertConfig(**BERT))
    saved(tmp_path, model)
    scheduler = {
        "_class_name": "TokenDiffusionScheduler",
        "vocab_size": V,
        "mask_token_id": 1,
        "forward_process": "absorbing",
    }
    (tmp_path / "scheduler_config.json").write_text(json.dumps(scheduler))
    load_for_inference(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["cls.predictions.transform.dense.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"^checkpoint_path .* has no weights for cls.predictions"):
        load_for_inference(tmp_path)


def test_a_draft_is_no_model_to_train_or_to_decode_with(tmp_path: Path) -> None:
    config = tiny_causal(vocab_size=V).config
    config.architectures = ["DFlashDraftModel"]
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is a DFlash draft; give it as draft_model_id"):
        FIELDS["model_name_or_path"](str(tmp_path))
    for field in ("target_model_id", "reference_model_name_or_path"):
        with pytest.raises(InputError, match=f"{field} .* is a DFlash draft; give the model it"):
            FIELDS[field](str(tmp_path))


def test_weights_are_those_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(**BERT, num_key_value_heads=1, head_dim=8)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    weights = open_weights(
        AutoModelForCausalLM,
        str(tmp_path),
        open_config(str(tmp_path), field="model_id", remedy=""),
        field="model_id",
        dtype=torch.float32,
    )
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(weights.complete().state_dict(), expected.state_dict())
    assert (weights.missing, weights.unused, weights.missing_share) == ([], [], 0.0)


def unanswered(status: int = 503) -> Exception:
    """What huggingface_hub raises where a hub does not answer and its cache lacks the file."""
    url = httpx.Request("HEAD", "https://hub.example/org/model/resolve/main/config.json")
    error = LocalEntryNotFoundError("not in the cache")
    error.__cause__ = HfHubHTTPError(
        f"{status} Server Error", response=httpx.Response(status, request=url)
    )
    return error


def test_a_hub_that_does_not_answer_is_no_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise unanswered()

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", download)
    monkeypatch.setattr("transformers.utils.hub.snapshot_download", download)
    for opened in (open_config, open_tokenizer):
        with pytest.raises(ConnectionError, match=r"model_id 'org/model'.*503 Server Error"):
            opened("org/model", field="model_id", remedy="give another")
    config = tiny_causal(vocab_size=V).config
    with pytest.raises(ConnectionError, match=r"weights cannot be read.*503 Server Error"):
        open_weights(
            AutoModelForCausalLM, "org/model", config, field="model_id", dtype=torch.float32
        )


OLD, NEW = "a" * 40, "b" * 40  # commits


@pytest.fixture
def published_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub model of which two commits are in the cache; the first has a tag, which has a slash."""
    repository = tmp_path / "models--some--model"
    for place, (commit, ref) in enumerate(((OLD, "refs/pr/1"), (NEW, "main"))):
        folder = repository / "snapshots" / commit
        causal(folder, seed=place)
        letter_tokenizer(V - place).save_pretrained(folder)
        ends = {"eos_token_id": 5 + place}
        (folder / "generation_config.json").write_text(json.dumps(ends))
        named = repository / "refs" / ref
        named.parent.mkdir(parents=True, exist_ok=True)
        named.write_text(commit)
    weights = repository / "snapshots" / OLD / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(weights).items()}, weights, {"format": "pt"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return "some/model"


@pytest.mark.parametrize(
    ("revision", "commit"), [("", NEW), ("@refs/pr/1", OLD), (f"@{OLD}", OLD), (f"@{NEW}", NEW)]
)
def test_a_hub_name_may_end_in_its_revision(
    published_twice: str, revision: str, commit: str, tmp_path: Path
) -> None:
    """Weights, config, tokenizer and what ends an answer are all of that commit."""
    name = published_twice + revision
    folder = tmp_path / "models--some--model" / "snapshots" / commit
    model, tokenizer = open_causal(name)
    assert tokenizer.get_vocab() == open_tokenizer(folder, field="model_id").get_vocab()
    expected = load_file(folder / "model.safetensors")
    found = model.model.state_dict()
    assert all(torch.equal(found[key], value.float()) for key, value in expected.items())
    config = open_causal_config(name, field="model_id")[0]
    stops = {*find_stop_tokens(name, config, tokenizer)}
    assert stops == {5 + (commit == NEW), tokenizer.eos_token_id}
    assert dtype_in_files(name) == (torch.float32 if commit == NEW else torch.bfloat16)
    assert default_sampler(name) == "ar"
    assert commit_of(name) == commit


def test_a_revision_that_is_not_there_is_named(published_twice: str) -> None:
    with pytest.raises(InputError, match="model_id 'some/model@nowhere' cannot be opened"):
        open_causal(f"{published_twice}@nowhere")
    with pytest.raises(InputError, match="model_id 'some/model@nowhere' cannot be opened"):
        default_sampler(f"{published_twice}@nowhere")


def test_a_folder_is_not_opened_in_place_of_a_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    causal(tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    said = "runs/mine@v2: there is no such folder, and runs/mine, .* leave @v2 out"
    with pytest.raises(InputError, match=said):
        open_causal("runs/mine@v2")
    with pytest.raises(InputError, match=said):
        open_tokenizer("runs/mine@v2", field="model_id")


def test_a_folder_may_have_an_at_in_its_name(tmp_path: Path) -> None:
    name = causal(tmp_path / "a@b")
    assert revision_of(name) == {}
    assert commit_of(name) is None
    open_causal(name)


def test_what_ends_an_answer_is_not_forgotten_where_the_hub_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, tokenizer = tiny_causal(vocab_size=V).config, letter_tokenizer(V)
    without = find_stop_tokens("org/model", config, tokenizer)  # offline: nobody is asked

    def download(*args: Any, **kwargs: Any) -> str:
        raise unanswered()

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", download)
    with pytest.raises(ConnectionError, match=r"generation_config.json of 'org/model'"):
        find_stop_tokens("org/model", config, tokenizer)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: _CACHED_NO_EXIST)
    assert find_stop_tokens("org/model", config, tokenizer) == without


@pytest.mark.parametrize(("status", "is_outage"), [(401, False), (404, False), (429, True)])
def test_what_a_hub_refuses_is_bad_input(status: int, is_outage: bool) -> None:
    with (
        pytest.raises(ConnectionError if is_outage else InputError, match="cannot be opened"),
        input_errors("model_id 'org/model' cannot be opened", "give another"),
    ):
        raise unanswered(status)


def test_that_a_server_does_not_answer_is_said_once() -> None:
    """With the first place and the last, and the reason."""
    with (
        pytest.raises(ConnectionError) as caught,
        input_errors("model_id 'org/model' cannot be opened", "give another"),
        input_errors("weights of 'org/model'", "give another"),
    ):
        raise unanswered()
    said = str(caught.value)
    assert said.startswith("model_id 'org/model' cannot be opened: weights of 'org/model': the ")
    assert said.count("does not answer as it should") == 1
    assert "503" in said
