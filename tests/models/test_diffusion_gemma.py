"""DiffusionGemma: opened as it was published, and decoded as the released code decodes it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSamplerConfig,
)

from jobs import generate
from tests.models.diffusion_gemma import CANVAS, EOS, WINDOW, V, diffusion_gemma
from tests.samplers.canvas_reference import SameNumbers, by_pipeline
from tokendiff.config.generate import GenerateConfig
from tokendiff.data.prompts import GenerationRow
from tokendiff.data.samples import read_samples
from tokendiff.diffusion.attention_masks import causal_by_position
from tokendiff.diffusion.interfaces import CanvasDecoder
from tokendiff.diffusion.splitmix import key_from
from tokendiff.errors import InputError
from tokendiff.models.completion import CompletionModel, CompletionSetup
from tokendiff.models.diffusion_gemma import EncoderDecoder, uniform_noise
from tokendiff.models.requests import check_generation
from tokendiff.samplers.canvas import CanvasSampler

KERNEL, KEY = uniform_noise(V), key_from(7, "sample")
# Shorter and longer than the window, and than a canvas.
PROMPTS = ("abc", "abcdefghijk", "fed")


def config_of(folder: Path, **sampler: Any) -> GenerateConfig:
    fields = {"max_new_tokens": 3 * CANVAS, "num_inference_steps": 6, **sampler}
    return GenerateConfig.model_validate(
        {"model_id": str(folder), "seed": 7, "batch_size": 2, "num_samples": len(PROMPTS)}
        | {"sampler": {"name": "canvas", **fields}}
    )


def completions(folder: Path, **sampler: Any) -> tuple[CanvasSampler, list[list[int]], list[int]]:
    """The sampler, new tokens, and forward passes of each prompt."""
    model = CompletionModel(config_of(folder, **sampler))
    built: Any = model.setup.sampler
    records = model.sample([GenerationRow(id=i, prompt=text) for i, text in enumerate(PROMPTS)])
    tokens = [record["tokens"][record["num_prompt_tokens"] :] for record in records]
    return built, tokens, [record["num_model_calls"] for record in records]


def numbers_of(row: int, model: Any) -> SameNumbers:
    """A canvas is drawn after each pass of the encoder."""
    numbers = SameNumbers(row, key=KEY, kernel=KERNEL, block=CANVAS)
    model.model.encoder.register_forward_pre_hook(
        lambda *args: setattr(numbers, "is_start", True), with_kwargs=True
    )
    return numbers


def prompt_of(text: str) -> tuple[int, ...]:
    return tuple(ord(letter) - ord("a") + 4 for letter in text)


def up_to_stop(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_rows_of_any_length_are_those_of_transformers(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    reference: Any = diffusion_gemma(tmp_path, dtype=dtype)
    model = CompletionModel(config_of(tmp_path))._model
    assert isinstance(model, EncoderDecoder)
    assert isinstance(model, CanvasDecoder)
    generator = torch.Generator().manual_seed(1)
    lengths, rows = torch.tensor([2 * WINDOW, 3, WINDOW]), torch.tensor([2, 0, 1])
    tokens = torch.randint(0, V, (3, 2 * WINDOW), generator=generator)
    canvas = torch.randint(0, V, (3, CANVAS), generator=generator)
    before = 3.0 * torch.randn(3, CANVAS, V, generator=generator)
    cache = model.new_cache(3)
    with torch.no_grad():
        # In pieces: the first two tokens of each row, then the rest.
        for begin, counts in ((0, torch.full((3,), 2)), (2, lengths - 2)):
            part = tokens[:, begin : begin + int(counts.max())]
            encoded = model.encode(part, counts, cache, rows, causal_by_position)
            cache.extend(rows, counts)
        found = model.expected_embedding(before.flatten(0, 1)).unflatten(0, (3, CANVAS))
        for told, logits in ((None, None), (found, before)):
            ours = model.head(model.denoise(canvas, told, cache, rows))
            for row, length in enumerate(lengths.tolist()):
                one = slice(row, row + 1)
                theirs = reference(
                    input_ids=tokens[one, :length],
                    decoder_input_ids=canvas[one],
                    self_conditioning_logits=None if logits is None else logits[one],
                )
                torch.testing.assert_close(ours[row], theirs.logits[0], rtol=1e-4, atol=1e-5)
                last = theirs.encoder_last_hidden_state[0, -1]
                torch.testing.assert_close(encoded[row, length - 3], last, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(ours, model.head(model.denoise(canvas, None, cache, rows)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"entropy_bound": 1.0, "confidence_threshold": None},
        {"entropy_bound": 0.4, "t_min": 0.1, "t_max": 0.3, "confidence_threshold": 1.9},
    ],
)
def test_tokens_are_those_of_generate(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference: Any = diffusion_gemma(tmp_path)
    sampler, ours, calls = completions(tmp_path, **fields)
    for row, text in enumerate(PROMPTS):
        numbers = numbers_of(row, reference)
        with monkeypatch.context() as patched:
            numbers.patch(patched)
            output = reference.generate(
                torch.tensor([prompt_of(text)]),
                max_new_tokens=sampler.max_new_tokens,
                max_denoising_steps=sampler.num_inference_steps,
                sampler_config=EntropyBoundSamplerConfig(entropy_bound=sampler.entropy_bound),
                t_min=sampler.t_min,
                t_max=sampler.t_max,
                # Never met: there the thresholds have defaults, and cannot be left out.
                confidence_threshold=sampler.confidence_threshold or 1e-9,
                stability_threshold=sampler.stability_threshold,
                pad_token_id=0,
                eos_token_id=EOS,
            )
        tokens = output.sequences[0, len(text) :].tolist()
        assert ours[row] == up_to_stop(tokens)
    # A canvas takes a pass of the encoder and one for each step, unless it is finished early.
    is_early = any(count % (1 + sampler.num_inference_steps) for count in calls)
    assert is_early == (sampler.confidence_threshold is not None)


@pytest.mark.filterwarnings("default:.past_key_values. is deprecated")  # by diffusers
@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"entropy_bound": 1.0, "confidence_threshold": None},
        {"canvas_rule": "ddim", "temperature": 0.0, "confidence_threshold": None},
        {"canvas_rule": "ddim", "temperature": 0.7, "confidence_threshold": 1.9},
        {"canvas_rule": "block_refinement", "temperature": 0.0, "confidence_threshold": None},
        {
            "canvas_rule": "block_refinement",
            "temperature": 0.0,
            "threshold": 0.3,
            "editing_threshold": 0.2,
            "confidence_threshold": None,
        },
        {
            "canvas_rule": "block_refinement",
            "temperature": 0.8,
            "threshold": 0.5,
            "confidence_threshold": 1.9,
        },
    ],
)
def test_tokens_are_those_of_the_released_pipeline(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference: Any = diffusion_gemma(tmp_path)
    sampler, ours, _ = completions(tmp_path, **fields)
    for row, text in enumerate(PROMPTS):
        numbers = numbers_of(row, reference)
        theirs = by_pipeline(reference, prompt_of(text), sampler, numbers, monkeypatch)
        assert ours[row] == up_to_stop(theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "canvas_rule": "ddim",
            "corrector_steps": 2,
            "corrector_k": 2,
            "corrector_selection": "lowest_maxprob",
        },
    ],
)
def test_rows_depend_on_neither_batch_nor_slot(fields: dict[str, Any], tmp_path: Path) -> None:
    diffusion_gemma(tmp_path)
    configs = [
        config_of(tmp_path, **fields).model_copy(update={"batch_size": size}) for size in (1, 3)
    ]
    rows = [GenerationRow(id=i, prompt=text) for i, text in enumerate((*PROMPTS, "hhhhhhh"))]
    alone, together = (
        [record["tokens"] for record in CompletionModel(config).sample(rows)] for config in configs
    )
    assert alone == together


def test_half_precision_decodes(tmp_path: Path) -> None:
    diffusion_gemma(tmp_path)
    config = config_of(tmp_path).model_copy(update={"mixed_precision": "bf16"})
    model = CompletionModel(config)
    assert next(model._model.parameters()).dtype == torch.bfloat16  # type: ignore[attr-defined]
    (record,) = model.sample([GenerationRow(id=0, prompt="abcdefghijk")])
    assert record["tokens"]


@pytest.mark.slow
def test_the_command_takes_the_family_and_its_sampler(
    tmp_path: Path, in_this_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # its tracking store is written here
    diffusion_gemma(tmp_path / "model")
    options = ["--max_new_tokens", "6", "--num_inference_steps", "2", "--output_format", "jsonl"]
    for name, sampler in (("named", ["--sampler", "canvas"]), ("default", [])):
        out = ["--prompt", "abc", "--output_dir", str(tmp_path / name)]
        assert generate.main(["--model_id", str(tmp_path / "model"), *sampler, *options, *out]) == 0
    texts = [
        [record["text"] for record in read_samples(tmp_path / name)]
        for name in ("named", "default")
    ]
    assert texts[0] == texts[1]
    assert all(text.startswith("abc") for text in texts[0])


# What does not go.


@pytest.mark.parametrize("name", ["ar", "sdar", "block_refinement", "self_speculation"])
def test_other_samplers_are_refused_with_the_one_that_fits(name: str, tmp_path: Path) -> None:
    diffusion_gemma(tmp_path)
    config = GenerateConfig.model_validate({"model_id": str(tmp_path), "sampler": {"name": name}})
    with pytest.raises(InputError, match=r"'diffusion_gemma', a denoiser of canv.*use .* 'canvas'"):
        CompletionSetup.of(config, None)


def test_samplers_of_whole_rows_are_refused_too(tmp_path: Path) -> None:
    diffusion_gemma(tmp_path)
    config = GenerateConfig.model_validate(
        {"model_id": str(tmp_path), "sampler": {"name": "ancestral"}, "seq_len": 8}
    )
    with pytest.raises(InputError, match=r"'diffusion_gemma'.*use sampler 'canvas'"):
        check_generation(config, checkpoint_path=None)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention 'all' lets clean"),
        ({"num_experts": None}, "num_experts must be a whole number, got None"),
    ],
)
def test_configs_that_ask_for_more_are_refused(
    changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    diffusion_gemma(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["text_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=problem):
        CompletionSetup.of(config_of(tmp_path), None)


def test_missing_weights_are_named_and_scales_of_layers_too(tmp_path: Path) -> None:
    diffusion_gemma(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in (
        "model.encoder.language_model.layers.1.layer_scalar",
        "model.decoder.self_conditioning.up_proj.weight",
    ):
        left = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file(left, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=f"has no weights for {name}"):
            CompletionModel(config_of(tmp_path))
