"""What it costs a denoiser to hide the documents of a row from each other: a forward and a backward
pass over the same packed rows with and without, one behind the other in one run.

    python -m benchmarks.isolation
"""

import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.builders import letter_tokenizer
from tokendiff.models.builtin import BUILTIN_PREFIX, builtin_config
from tokendiff.models.denoiser import TransformersDenoiser

ROWS, REPEATS, VOCAB = 4, 5, 4096
MEAN_DOCUMENT = 160  # tokens; the lengths are log-normal, as those of chats are


def packed_documents(length: int) -> Tensor:
    """[ROWS, length] which document of its row a position is in, no row being padded."""
    rng = np.random.default_rng(0)
    stops = rng.lognormal(np.log(MEAN_DOCUMENT) - 0.32, 0.8, (ROWS, length)).cumsum(1)
    return torch.from_numpy((np.arange(length)[None, :, None] >= stops[:, None]).sum(-1))


def denoiser_of(name: str, length: int) -> TransformersDenoiser:
    from transformers import AutoConfig, AutoModelForMaskedLM

    if name.startswith(BUILTIN_PREFIX):
        config: Any = builtin_config(
            name, vocab_size=VOCAB, max_length=length, tokenizer=letter_tokenizer()
        )
    else:
        config = AutoConfig.for_model(
            name,
            vocab_size=VOCAB,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=4,
            max_position_embeddings=length,
            pad_token_id=0,
        )
    torch.manual_seed(0)
    return TransformersDenoiser(AutoModelForMaskedLM.from_config(config), vocab_size=VOCAB)


def seconds(denoiser: TransformersDenoiser, tokens: Tensor, document: Tensor | None) -> float:
    is_valid = torch.ones_like(tokens, dtype=torch.bool)
    times = torch.full((len(tokens),), 0.5)
    start = time.process_time()
    denoiser.encode(tokens, is_valid, times, document).square().sum().backward()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    print(f"{ROWS} rows, documents of {MEAN_DOCUMENT} tokens on average; time with isolation over")
    print("time without, of the processor, forward and backward through the encoder, one thread")
    for name in ("bert", "modernbert", f"{BUILTIN_PREFIX}dit-mini"):
        for length in (256, 512, 1024):
            denoiser, document = denoiser_of(name, length), packed_documents(length)
            generator = torch.Generator().manual_seed(0)
            tokens = torch.randint(1, VOCAB, (ROWS, length), generator=generator)
            ratios = []
            for _ in range(REPEATS + 1):
                plain = seconds(denoiser, tokens, None)
                ratios.append(seconds(denoiser, tokens, document) / plain)
            low, *_, high = sorted(ratios[1:])  # the first warms up
            middle = statistics.median(ratios[1:])
            print(
                f"  {name:<18} {length:>5} tokens: {middle:.2f} ({low:.2f}-{high:.2f})", flush=True
            )


if __name__ == "__main__":
    main()
