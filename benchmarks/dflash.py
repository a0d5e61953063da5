"""What speculative decoding with a DFlash draft gains, and what it costs where nothing is accepted.

    python -m benchmarks.dflash [--rounds 3] [--threads N]

Target and draft have new weights, so what would be accepted is decided here: the draft runs, and
its proposals are replaced by what the target writes, each with the probability that heads the row.
Both sides run in turn, on the same rows, and are checked to write the same tokens: the exit status
is 1 where they do not. The spread is that of the rounds. Nothing else should be running on the
machine.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from tokendiff.diffusion.interfaces import Completion, Decoder, Request
from tokendiff.diffusion.random import RowGenerator
from tokendiff.diffusion.splitmix import key_from
from tokendiff.models.causal import CausalModel
from tokendiff.models.dflash.decoder import DraftedModel
from tokendiff.models.dflash.model import DFlashDraftModel
from tokendiff.models.dflash.planning import new_draft_config
from tokendiff.samplers.autoregressive import AutoregressiveSampler
from tokendiff.samplers.dflash import DFlashSampler
from tokendiff.samplers.open_ended import OpenEndedSampler
from tokendiff.samplers.slots import Slots
from tokendiff.samplers.speculation import GAINS

VOCAB_SIZE, WIDTH, LAYERS, DRAFT_LAYERS, BLOCK = 8192, 256, 8, 2, 16
PROMPT, NEW_TOKENS, ROWS = 32, 64, 8
QUALITIES = (0.0, 0.5, 0.8, 0.95, 1.0)
Texts = dict[int, list[int]]


@dataclass(frozen=True, kw_only=True)
class Informed(DFlashSampler):
    """Proposes what is known to come, with probability `quality` per token."""

    texts: Texts = field(default_factory=dict)
    quality: float = 1.0

    def _verify(
        self, model: Decoder, slots: Slots, rows: Tensor, drafted: Tensor, *others: Any
    ) -> Tensor:
        for index, row in enumerate(rows.tolist()):
            request = slots._requests[row]
            done = int(slots["length"][row]) - len(request.prompt)
            known = torch.tensor(self.texts[request.id])[done : done + drafted.shape[1]]
            key = RowGenerator.for_rows(key_from("bench"), torch.tensor([request.id]))
            is_known = key.uniform(NEW_TOKENS)[0, done : done + len(known)] < self.quality
            drafted[index, : len(known)] = torch.where(is_known, known, 0)
        return super()._verify(model, slots, rows, drafted, *others)


def build() -> tuple[DraftedModel, list[Request]]:
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 32,
        num_key_value_heads=WIDTH // 64,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.1,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    target = Qwen3ForCausalLM(config).eval()
    draft_config = new_draft_config(
        config,
        target_model_id="bench",
        num_layers=DRAFT_LAYERS,
        block_size=BLOCK,
        mask_token_id=VOCAB_SIZE - 1,
    )
    draft = DFlashDraftModel(draft_config).eval()
    prompts = torch.randint(1, VOCAB_SIZE - 1, (ROWS, PROMPT))
    requests = [Request(id=row, prompt=tuple(ids)) for row, ids in enumerate(prompts.tolist())]
    return DraftedModel(CausalModel(target, vocab_size=VOCAB_SIZE), draft), requests


def by_transformers(model: DraftedModel, requests: list[Request]) -> Texts:
    """transformers' own DFlash decoder, which takes one row at a time."""
    texts = {}
    for request in requests:
        output = model.target.model.generate(
            torch.tensor([request.prompt]),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
            assistant_model=model._draft,
            speculation_type="dflash",
        )
        texts[request.id] = output[0, PROMPT:].tolist()
    return texts


def compare(
    slow: Callable[[], Texts], fast: Callable[[], Texts], expected: Texts, *, rounds: int
) -> tuple[str, bool]:
    """How many times as fast the second side is, with the spread; and whether both write what is
    expected. The sides take turns in going first; the first round is not counted.
    """
    ratios, is_same = [], True
    for round_ in range(rounds + 1):
        sides = [slow, fast] if round_ % 2 else [fast, slow]
        seconds = {}
        for side in sides:
            start = time.perf_counter()
            is_same &= side() == expected
            seconds[side] = time.perf_counter() - start
        if round_:
            ratios.append(seconds[slow] / seconds[fast])
    return f"{statistics.median(ratios):5.2f} ({min(ratios):.2f}-{max(ratios):.2f})", is_same


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, requests = build()
    greedy = AutoregressiveSampler(max_new_tokens=NEW_TOKENS, temperature=0.0)

    def run(sampler: OpenEndedSampler, used: Decoder, num_slots: int) -> dict[int, Completion]:
        done = sampler.complete(used, requests, key=0, num_slots=num_slots)
        return {completion.id: completion for completion in done}

    def texts_by(sampler: OpenEndedSampler, used: Decoder, num_slots: int) -> Callable[[], Texts]:
        return lambda: {i: c.tokens for i, c in run(sampler, used, num_slots).items()}

    texts = texts_by(greedy, model.target, ROWS)()
    print(
        f"target {LAYERS} layers, draft {DRAFT_LAYERS}, width {WIDTH}, vocabulary {VOCAB_SIZE}, "
        f"blocks of {BLOCK}; {ROWS} rows of {PROMPT} + {NEW_TOKENS} tokens, float32, CPU, "
        f"{args.threads} threads\n"
    )
    print("proposals   tokens   acceptance   speed-up over the target alone")
    print(f"right       a pass   length       row by row         {ROWS} rows at once", flush=True)
    all_same = True
    for quality in QUALITIES:
        sampler = Informed(max_new_tokens=NEW_TOKENS, temperature=0.0, texts=texts, quality=quality)
        columns = []
        for num_slots in (1, ROWS):
            slow = texts_by(greedy, model.target, num_slots)
            fast = texts_by(sampler, model, num_slots)
            column, is_same = compare(slow, fast, texts, rounds=args.rounds)
            columns.append(column)
            all_same &= is_same
        done = run(sampler, model, ROWS).values()
        gains = torch.tensor([completion.counts[GAINS] for completion in done]).sum(0)
        length = float((gains * torch.arange(1, BLOCK + 1)).sum() / gains.sum())
        passes = sum(completion.num_model_calls for completion in done)
        print(
            f"{quality:9.2f}   {ROWS * NEW_TOKENS / passes:6.2f}   {length:10.2f}   "
            f"{columns[0]:<17}  {columns[1]}",
            flush=True,
        )
    plain = DFlashSampler(max_new_tokens=NEW_TOKENS, temperature=0.0)
    ratio, is_same = compare(
        lambda: by_transformers(model, requests),
        texts_by(plain, model, ROWS),
        texts,
        rounds=args.rounds,
    )
    all_same &= is_same
    print(
        f"\n{ROWS} rows at once, against transformers' own DFlash decoder, which takes one, with "
        f"the draft as it is: {ratio.strip()} times as fast"
    )
    if not all_same:
        print("the sides do not write the same tokens", file=sys.stderr)
    return 0 if all_same else 1


if __name__ == "__main__":
    sys.exit(main())
