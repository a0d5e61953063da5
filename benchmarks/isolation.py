"""What it costs a denoiser to hide the documents of a row from each other: a forward and a backward
pass over the same packed rows with and without, one behind the other in one run. Then how many
tokens of conversations each way of making rows trains in the same time: whole ones by best fit,
hidden from each other; laid end to end and cut; and one padded row each.

    python -m benchmarks.isolation
"""

import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.builders import letter_tokenizer
from tokendiff.data.fitting import fit
from tokendiff.models.builtin import BUILTIN_PREFIX, builtin_config
from tokendiff.models.denoiser import TransformersDenoiser

ROWS, REPEATS, VOCAB = 4, 5, 4096
MEAN_DOCUMENT = 160  # tokens; the lengths are log-normal, as those of chats are
NUM_CHATS, CHAT_ROW = 400, 512


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


def seconds(
    denoiser: TransformersDenoiser,
    tokens: Tensor,
    document: Tensor | None,
    is_valid: Tensor | None = None,
) -> float:
    if is_valid is None:
        is_valid = torch.ones_like(tokens, dtype=torch.bool)
    times = torch.full((len(tokens),), 0.5)
    start = time.process_time()
    denoiser.encode(tokens, is_valid, times, document).square().sum().backward()
    return time.process_time() - start


def rows_of_chats() -> dict[str, Tensor]:
    """[R, CHAT_ROW] which document a position is of, -1 on padding; of all, the same documents."""
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(np.log(MEAN_DOCUMENT) - 0.32, 0.8, NUM_CHATS)
    lengths = drawn.astype(np.int64).clip(1, CHAT_ROW)

    def laid(rows: list[list[int]]) -> Tensor:
        document = np.full((len(rows), CHAT_ROW), -1)
        for row, chosen in enumerate(rows):
            run = np.repeat(np.arange(len(chosen)), lengths[chosen])
            document[row, : len(run)] = run
        return torch.from_numpy(document)

    total = int(lengths.sum())
    end_to_end = np.full(-(-total // CHAT_ROW) * CHAT_ROW, -1)
    end_to_end[:total] = 0  # as text is cut: nothing is hidden
    return {
        "best fit, isolated": laid(fit(lengths, CHAT_ROW)),
        "cut every row": torch.from_numpy(end_to_end.reshape(-1, CHAT_ROW)),
        "one padded row each": laid([[number] for number in range(NUM_CHATS)]),
    }


def compare_rows(name: str) -> None:
    """Tokens of conversations a second, as a multiple of those of padded rows, in turn."""
    denoiser = denoiser_of(name, CHAT_ROW)
    rows = rows_of_chats()
    found: dict[str, list[float]] = {kind: [] for kind in rows}
    for turn in range(REPEATS + 1):
        for kind, document in rows.items():
            # Other rows in every turn, of each kind as many.
            first = turn * ROWS % (len(document) - ROWS)
            chosen = document[first : first + ROWS]
            tokens = torch.full_like(chosen, 5)
            isolated = chosen if kind == "best fit, isolated" else None
            took = seconds(denoiser, tokens, isolated, is_valid=chosen >= 0)
            found[kind].append(int((chosen >= 0).sum()) / took)
    padded = statistics.fmean(found["one padded row each"][1:])
    print(f"  {name}, rows of {CHAT_ROW}:")
    for kind, document in rows.items():
        speed = statistics.fmean(found[kind][1:]) / padded
        filled = float((document >= 0).double().mean())
        print(f"    {kind:<20} {filled:6.1%} filled, {speed:.2f} times the tokens/s of padded rows")


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
    print(f"{NUM_CHATS} conversations, of {MEAN_DOCUMENT} tokens on average")
    for name in ("bert", f"{BUILTIN_PREFIX}dit-mini"):
        compare_rows(name)


if __name__ == "__main__":
    main()
