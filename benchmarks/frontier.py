"""The frontier of a small model, held against an exhaustive run.

A block diffusion model learns a Markov chain of which every probability is known. A pipeline
measures samplers x thresholds x steps, chooses an operating point by each of two rules, and
registers the model with both. Then a plain loop measures the same settings again: one sample at a
time, forward passes counted in the model itself, quality by the chain's own probabilities, the
front by comparing all pairs. Points, fronts and operating points must be the same, and the model
that a server loads must write what the sampler writes with the chosen settings.

    python -m benchmarks.frontier [--out FOLDER]

Exits with 1 where anything differs. Minutes on one core. FOLDER gets the plots and reports.
"""

import argparse
import math
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.toy_chain import FIRST_STATE, LENGTH, NUM_STATES, VOCAB_SIZE, MarkovChain
from pipelines.runner import run_pipeline
from tests.builders import letter_tokenizer, tiny_causal, token_folder
from tokendiff.artifacts.manifest import load_manifest
from tokendiff.config.pipeline import Config
from tokendiff.diffusion.interfaces import Request
from tokendiff.diffusion.splitmix import key_from
from tokendiff.models.decoding import open_causal
from tokendiff.samplers.block_refinement import BlockRefinementSampler
from tokendiff.samplers.open_ended import OpenEndedSampler
from tokendiff.samplers.sdar import SDARSampler
from tokendiff.tracking.mlflow_store import resolve_uri

MASK, EOS, BLOCK, SEED = 1, 2, 4, 0
PROMPTS = "abcdefgh"[:NUM_STATES]  # one of each state
NEW = LENGTH - 1
SAMPLERS = [
    {"name": "sdar", "max_new_tokens": NEW},
    {"name": "block_refinement", "gen_length": NEW, "temperature": 0.0},  # likely, and all alike
]
RULES: dict[str, dict[str, float]] = {
    "best": {"within": 0.02},
    "varied": {"within": 0.3, "min_entropy_nats": 1.2},
}
Load = Callable[[str, str], Any]  # (store, URI of a model) -> the model as it is served


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to train, what to try, and how much to draw of each prompt."""

    steps: int = 400
    rows: int = 2**14
    num_samples: int = 4
    num_steps: tuple[int, ...] = (1, 2, 4)
    thresholds: tuple[float, ...] = (0.3, 0.6, 0.9)

    @property
    def over(self) -> dict[str, list[Any]]:
        """The grid: the same values for the fields of both samplers."""
        steps, thresholds = list(self.num_steps), list(self.thresholds)
        return {
            "denoising_steps": steps,
            "confidence_threshold": thresholds,
            "num_inference_steps": steps,
            "threshold": thresholds,
        }


SHORT = Effort(steps=40, rows=2**10, num_samples=1, num_steps=(1, 4), thresholds=(0.3, 0.9))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A setting, and what it came to.

    Attributes:
        entropy: nats of the tokens of a sample, averaged over the samples.
    """

    sampler: dict[str, Any]
    perplexity: float
    tokens_per_forward: float
    entropy: float

    def differs(self, other: "Measured") -> bool:
        """By more than the rounding of a reference model in float32."""
        ours, theirs = ((m.perplexity, m.tokens_per_forward, m.entropy) for m in (self, other))
        near = (math.isclose(a, b, rel_tol=1e-4) for a, b in zip(ours, theirs, strict=True))
        return self.sampler != other.sampler or not all(near)


def write_chain(chain: MarkovChain, folder: Path) -> None:
    """The chain as a causal language model: its layers add nothing to one-hot embeddings, so the
    logits of a position are the row of ln p for its token.
    """
    model = tiny_causal(vocab_size=VOCAB_SIZE, num_hidden_layers=1, tie_word_embeddings=False)
    size = model.config.hidden_size
    table = torch.full((VOCAB_SIZE, VOCAB_SIZE), -1e4, dtype=torch.float64)
    table[FIRST_STATE:, FIRST_STATE:] = torch.from_numpy(chain.transition).log()
    (layer,) = model.model.layers
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB_SIZE, size))
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :VOCAB_SIZE] = table.T / math.sqrt(size)  # a norm of sqrt(size)
    model.float().save_pretrained(folder)
    letter_tokenizer(VOCAB_SIZE).save_pretrained(folder)


def pipeline_of(folder: Path, effort: Effort) -> Config:
    """Train and evaluate; then by each rule a frontier, and a registered model."""
    stages: dict[str, Any] = {
        "train": {"kind": "train"},
        "evaluate": {"kind": "evaluate", "inputs": {"checkpoint": "train"}},
    }
    for rule, fields in RULES.items():
        inputs = {"candidate": "evaluate", "frontier": rule}
        name = {"registered_model": rule}
        stages[rule] = {"kind": "frontier", "inputs": {"checkpoint": "train"}, "config": fields}
        stages[f"promote-{rule}"] = {"kind": "promote", "inputs": inputs, "config": name}
    return Config.model_validate(
        {
            "name": "frontier",
            "root": str(folder / "root"),
            "train": {
                "data_path": str(folder / "data"),
                "objective": {"name": "block_diffusion", "block_length": BLOCK},
                "model_name_or_path": "builtin:qwen3-tiny",
                "max_train_steps": effort.steps,
                "per_device_train_batch_size": 64,
                "learning_rate": 3e-3,
                "lr_warmup_steps": effort.steps // 20,
                "checkpointing_steps": effort.steps,
            },
            "generate": {"sampler": {"name": "sdar", "max_new_tokens": NEW}},
            "evaluate": {"num_mask_samples": 1, "max_eval_rows": 64},
            "frontier": {
                "samplers": SAMPLERS,
                "over": effort.over,
                "prompt": list(PROMPTS),
                "num_samples": effort.num_samples,
                "batch_size": 64,
                "seed": SEED,
                "reference_model_name_or_path": str(folder / "chain"),
            },
            "stages": stages,
        }
    )


class Alone:
    """The checkpoint, sampled one row at a time; `num_calls` counts its forward passes."""

    def __init__(self, checkpoint: Path) -> None:
        self._model, self.tokenizer = open_causal(str(checkpoint))
        self.num_calls = 0
        self._model.model.base_model.register_forward_hook(self._count)

    def _count(self, *of_hook: Any) -> None:
        self.num_calls += 1

    def write(self, sampler: OpenEndedSampler, prompt: str, row: int) -> list[int]:
        """The new tokens."""
        (token,) = self.tokenizer(prompt)["input_ids"]
        request, key = Request(id=row, prompt=(token,)), key_from(SEED, "sample")
        (completion,) = sampler.complete(self._model, [request], key=key, num_slots=1)
        return list(completion.tokens)


def sampler_of(fields: dict[str, Any]) -> OpenEndedSampler:
    """The sampler's class with a section's fields, and what the model was trained with."""
    own = {name: value for name, value in fields.items() if name != "name"}
    trained: dict[str, Any] = {
        "mask_token_id": MASK,
        "block_length": BLOCK,
        "stop_token_ids": (EOS,),
    }
    if fields["name"] == "sdar":
        return SDARSampler(**own, **trained)
    own["max_new_tokens"] = own.pop("gen_length")
    return BlockRefinementSampler(**own, **trained, attention_mask_mode="4d")


def settings_of(effort: Effort) -> list[dict[str, Any]]:
    """The grid, in the order in which the stage tries it."""
    found = []
    for sampler, names in zip(
        SAMPLERS,
        (("denoising_steps", "confidence_threshold"), ("num_inference_steps", "threshold")),
        strict=True,
    ):
        for steps in effort.num_steps:
            for threshold in effort.thresholds:
                values = dict(zip(names, (steps, threshold), strict=True))
                found.append({**sampler, **values})
    return found


def measured_alone(
    alone: Alone, fields: dict[str, Any], chain: MarkovChain, num_samples: int
) -> Measured:
    """One sample at a time, judged by the chain."""
    sampler, before = sampler_of(fields), alone.num_calls
    num_new, nats, num_scored = 0, 0.0, 0
    entropies: list[float] = []
    for row in range(len(PROMPTS) * num_samples):
        prompt = PROMPTS[row // num_samples]
        new = alone.write(sampler, prompt, row)
        num_new += len(new)
        entropies.append(-sum(n / len(new) * math.log(n / len(new)) for n in Counter(new).values()))
        states = [ord(prompt) - ord("a"), *(i - FIRST_STATE for i in new if i >= FIRST_STATE)]
        for state, following in pairwise(states):
            nats -= math.log(chain.transition[state, following])
            num_scored += 1
    return Measured(
        sampler=fields,
        perplexity=math.exp(nats / num_scored),
        tokens_per_forward=num_new / (alone.num_calls - before),
        entropy=sum(entropies) / len(entropies),
    )


def measured_by_stage(point: dict[str, Any]) -> Measured:
    figures = point["figures"]
    return Measured(
        sampler=point["sampler"],
        perplexity=figures["generative_perplexity"],
        tokens_per_forward=figures["tokens_per_forward"],
        entropy=figures["unigram_entropy_sample_nats"],
    )


def front_by_pairs(points: list[Measured], min_entropy_nats: float = 0.0) -> set[int]:
    """Places of the varied points that no varied point beats."""
    varied = [at for at, point in enumerate(points) if point.entropy >= min_entropy_nats]
    beaten = set()
    for one in varied:
        for other in varied:
            a, b = points[one], points[other]
            is_as_good = (
                b.tokens_per_forward >= a.tokens_per_forward and b.perplexity <= a.perplexity
            )
            is_same = (b.tokens_per_forward, b.perplexity) == (a.tokens_per_forward, a.perplexity)
            if is_as_good and not is_same:
                beaten.add(one)
    return set(varied) - beaten


def chosen_by(points: list[Measured], within: float, min_entropy_nats: float = 0.0) -> int:
    """The rule in plain words: of the varied points that are nearly the best, the fastest."""
    varied = [at for at, point in enumerate(points) if point.entropy >= min_entropy_nats]
    best = min(points[at].perplexity for at in varied)
    good = [at for at in varied if points[at].perplexity <= best * (1 + within)]
    most = max(points[at].tokens_per_forward for at in good)
    fastest = [at for at in good if points[at].tokens_per_forward == most]
    return min(fastest, key=lambda at: points[at].perplexity)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the exhaustive run measured, what each rule chose, and what differs from the stages."""

    points: list[Measured]
    fronts: dict[str, set[int]]
    chosen: dict[str, int]
    differences: list[str]


def run(chain: MarkovChain, folder: Path, effort: Effort, load: Load) -> Findings:
    """The pipeline, and then everything again without it.

    Args:
        load: loads a registered model as a server would.
    """
    rows = chain.rows(effort.rows, seed=1).tolist()
    tokenizer = letter_tokenizer(VOCAB_SIZE)
    token_folder(
        folder / "data",
        files=[rows],
        heldout=chain.rows(64, seed=2).tolist(),
        max_length=LENGTH,
        tokenizer=tokenizer,
        row_group_rows=1024,
    )
    write_chain(chain, folder / "chain")
    config = pipeline_of(folder, effort)
    record = run_pipeline(config, folder / "root")
    alone = Alone(Path(record.of("train").result["checkpoint"]))
    points = [measured_alone(alone, s, chain, effort.num_samples) for s in settings_of(effort)]
    fronts: dict[str, set[int]] = {}
    chosen: dict[str, int] = {}
    differences: list[str] = []
    for rule, fields in RULES.items():
        stage = record.of(rule)
        made = load_manifest(Path(stage.folder)).metadata
        fronts[rule] = front_by_pairs(points, fields.get("min_entropy_nats", 0.0))
        chosen[rule] = chosen_by(points, **fields)
        served = load(resolve_uri(config.tracking, folder / "root"), f"models:/{rule}@champion")
        differences += [
            f"{rule}: {difference}"
            for difference in (
                *_differences(made, points, fronts[rule], chosen[rule]),
                *_served_otherwise(served, alone, points[chosen[rule]].sampler),
            )
        ]
    return Findings(points=points, fronts=fronts, chosen=chosen, differences=differences)


def _differences(
    made: dict[str, Any], points: list[Measured], front: set[int], chosen: int
) -> list[str]:
    """Between what a stage committed and the exhaustive run, in words."""
    theirs = [measured_by_stage(point) for point in made["points"]]
    found = [f"{len(theirs)} points, not {len(points)}"] if len(theirs) != len(points) else []
    found += [
        f"the stage has {their}, the exhaustive run {ours}"
        for their, ours in zip(theirs, points, strict=False)
        if their.differs(ours)
    ]
    if set(made["front"]) != front:
        found.append(f"the stage's front is {sorted(made['front'])}, not {sorted(front)}")
    if made["chosen"]["sampler"] != points[chosen].sampler:
        found.append(f"the stage chose {made['chosen']['sampler']}, not {points[chosen].sampler}")
    return found


def _served_otherwise(served: Any, alone: Alone, fields: dict[str, Any]) -> list[str]:
    """Where a registered model does not write what the sampler writes with the chosen settings."""
    answers = served.predict([{"prompt": prompt} for prompt in PROMPTS])
    sampler = sampler_of(fields)
    found: list[str] = []
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        before = alone.num_calls
        written = alone.tokenizer.decode(
            alone.write(sampler, prompt, row), skip_special_tokens=True
        )
        ours = {
            "text": prompt + written,
            "completion": written,
            "num_model_calls": alone.num_calls - before,
        }
        if answer != ours:
            found.append(f"the served model answers {answer}, the sampler {ours}")
    return found


def load_by_mlflow(store: str, uri: str) -> Any:
    import mlflow

    mlflow.set_tracking_uri(store)
    return mlflow.pyfunc.load_model(uri)


def table(findings: Findings) -> str:
    lines = [
        f"{'setting':<66}{'perplexity':>11}{'tokens/pass':>12}{'entropy':>8}  front of; chosen by"
    ]
    for at, point in enumerate(findings.points):
        label = " ".join(
            f"{name}={value}" for name, value in point.sampler.items() if name != "name"
        )
        fronts = ", ".join(rule for rule, front in findings.fronts.items() if at in front)
        chosen = ", ".join(rule for rule, place in findings.chosen.items() if place == at)
        lines.append(
            f"{point.sampler['name'] + ' ' + label:<66}{point.perplexity:>11.4f}"
            f"{point.tokens_per_forward:>12.3f}{point.entropy:>8.3f}  {fronts}"
            f"{'; ' + chosen if chosen else ''}"
        )
    return "\n".join(lines)


def keep_plots(root: Path, out: Path) -> None:
    for rule in RULES:
        (made,) = (root / "frontier").glob(f"{rule}-*/frontier.png")
        (out / rule).mkdir(parents=True, exist_ok=True)
        shutil.copy(made, out / rule)
        shutil.copy(made.parent / "report" / "index.html", out / rule)


def main() -> int:
    parser = argparse.ArgumentParser(description="A frontier against an exhaustive run.")
    parser.add_argument("--out", type=Path, help="folder for the plots and reports")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    start, chain = time.perf_counter(), MarkovChain.random(seed=7)
    with tempfile.TemporaryDirectory() as name:
        findings = run(chain, Path(name), Effort(), load_by_mlflow)
        if out is not None:
            keep_plots(Path(name) / "root", out)
    rate = -(chain.start[:, None] * chain.transition * np.log(chain.transition)).sum()
    print(f"the chain's own perplexity is {math.exp(rate):.4f}")
    print(table(findings))
    for difference in findings.differences:
        print(difference)
    print(f"{len(findings.differences)} differences; {time.perf_counter() - start:,.0f} s")
    return 1 if findings.differences else 0


if __name__ == "__main__":
    sys.exit(main())
