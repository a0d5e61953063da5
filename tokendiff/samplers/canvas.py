"""Blocks of random tokens that are denoised, behind a cache of finished blocks.

A block begins as a canvas of noise. Each of its steps asks the model for its belief about the clean
tokens of the whole canvas and moves every token by one of three rules:

    entropy_bound   the most certain candidates stay, all others become random tokens again; the
                    temperature falls from step to step. What the last step finds likeliest is
                    written, as in transformers' `DiffusionGemmaForBlockDiffusion.generate`.
    ddim            q(x_s | x_t, x_0) with a draw of x_0 from p(x_0 | x_t)
    ancestral       the reverse step of the uniform kernel with the leave-one-out posterior, as
                    `tokendiff.samplers.ancestral` takes it on whole rows

`ddim` and `ancestral` have the same distribution at temperature 1 where the model is exact; they
differ once temperature or filters change the belief. A canvas that is stable and certain is written
before its steps are over: its likeliest tokens. Sources: BD3-LM (arXiv 2503.09573) for the blocks,
`canvas_rules` for the steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokendiff.diffusion.devices import sent, sent_at
from tokendiff.diffusion.interfaces import Decoder
from tokendiff.diffusion.kernels import UniformKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.samplers.base import positions_at_once
from tokendiff.samplers.block_cache import CachedBlockSampler
from tokendiff.samplers.canvas_rules import (
    annealed_temperature,
    is_settled,
    keep_certain,
    move_to,
    posterior_chances,
    unchanged_steps,
)
from tokendiff.samplers.categorical import draw, filter_logits, without_token
from tokendiff.samplers.open_ended import encode_known
from tokendiff.samplers.slots import Slots

RULES = ("entropy_bound", "ddim", "ancestral")
# What a row's random numbers of one step are for.
START, TOKEN, MOVE, NOISE = 0, 1, 2, 3
_LIKELIEST = "likeliest"  # what is kept of a canvas from step to step


@dataclass(frozen=True, kw_only=True)
class CanvasState:
    """The canvases of n rows.

    Attributes:
        tokens: [n, K] at time t.
        is_open: [n, K] bool; elsewhere are tokens of the prompt.
        step: [n] steps that the canvas has had.
        t, s: [n] float64, times before and after the step.
        generator: of n rows, for this step.
    """

    tokens: Tensor
    is_open: Tensor
    step: Tensor
    t: Tensor
    s: Tensor
    generator: RowGenerator

    def uniform(self, purpose: int) -> Tensor:
        """[n, K]."""
        return self.generator.fold_in(purpose).uniform(self.tokens.shape[1])


@dataclass(frozen=True, kw_only=True)
class CanvasBelief:
    """What a step needs to know of the belief about n canvases, [n, K] each.

    Attributes:
        candidates: drawn.
        likeliest: tokens.
        entropy: nats, at the temperature of rule entropy_bound, else at 1.
        of_token: of rule ancestral, the probability that the clean token is the one that stands
            there.
    """

    candidates: Tensor
    likeliest: Tensor
    entropy: Tensor
    of_token: Tensor

    @classmethod
    def none(cls, like: Tensor) -> "CanvasBelief":
        """None yet, for tokens of the shape [n, K] of `like`."""
        zeros = torch.zeros_like(like, dtype=torch.float64)
        tokens = torch.zeros_like(like)
        return cls(
            candidates=tokens,
            likeliest=tokens.clone(),
            entropy=zeros,
            of_token=zeros.clone(),
        )


@dataclass(frozen=True, kw_only=True)
class CanvasSampler(CachedBlockSampler):
    """
    Attributes:
        kernel: of the noise that the model was trained on.
        prediction: what the model's output is: "loo" or "posterior"; see `NoiseProcess`. Rule
            ddim takes the second and rule ancestral the first, and each converts the other.
        canvas_rule: "entropy_bound", "ddim" or "ancestral".
        num_inference_steps: of a canvas at most.
        entropy_bound: of rule entropy_bound, nats.
        t_max, t_min: of rule entropy_bound, the temperature at the first step and the one that it
            falls to; `temperature` is that of the other rules.
        stability_threshold: steps in a row in which the likeliest tokens of a finished canvas did
            not change.
        confidence_threshold: mean entropy in nats below which a stable canvas is finished; None
            always takes all steps.
    """

    columns = ("unchanged",)

    kernel: UniformKernel
    prediction: str = "loo"
    canvas_rule: str = "entropy_bound"
    num_inference_steps: int = 48
    entropy_bound: float = 0.1
    t_max: float = 0.8
    t_min: float = 0.4
    stability_threshold: int = 1
    confidence_threshold: float | None = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.canvas_rule not in RULES:
            raise ValueError(
                f"canvas_rule must be one of {', '.join(RULES)}, got {self.canvas_rule!r}"
            )
        if self.prediction not in ("loo", "posterior"):
            raise ValueError(f"prediction must be loo or posterior, got {self.prediction!r}")
        if self.num_inference_steps < 1:
            raise ValueError(
                f"num_inference_steps must be at least 1, got {self.num_inference_steps}"
            )
        if not 0.0 < self.t_min <= self.t_max:
            raise ValueError(f"need 0 < t_min <= t_max, got t_min {self.t_min}, t_max {self.t_max}")
        if self.entropy_bound < 0.0 or self.stability_threshold < 0:
            raise ValueError(
                "entropy_bound and stability_threshold must not be negative, got "
                f"{self.entropy_bound} and {self.stability_threshold}"
            )

    def _denoise(self, model: Decoder, slots: Slots, rows: Tensor) -> None:
        cached, begin = slots.cache.lengths[rows], self._begin(slots)[rows]
        at = (rows[:, None], begin[:, None] + torch.arange(self.block_length, device=rows.device))
        canvas = self._canvas(slots, rows, at)
        slots.tokens[at] = canvas.tokens
        counts = begin + self.block_length - cached
        hidden = encode_known(model, slots, rows, counts, self._rule(slots, rows, model.device))
        slots.cache.extend(rows, begin - cached)
        offset = begin - cached
        if self.predicts_next:
            hidden, offset = self._shifted(hidden, offset, slots, rows), torch.zeros_like(offset)
        belief = self._belief(model, hidden, offset, canvas)
        is_over = self._is_over(slots, rows, canvas, belief)
        tokens = self._moved(canvas, belief)
        is_last = canvas.step + 1 >= self.num_inference_steps
        writes_likeliest = is_over & ~is_last
        if self.canvas_rule == "entropy_bound":
            writes_likeliest = is_over
        tokens = torch.where(writes_likeliest[:, None], belief.likeliest, tokens)
        tokens = torch.where(canvas.is_open, tokens, canvas.tokens)
        slots.tokens[at] = tokens
        self._conclude(slots, rows, canvas, tokens, begin, is_over)

    def _canvas(self, slots: Slots, rows: Tensor, at: tuple[Tensor, Tensor]) -> CanvasState:
        step = slots["step"][rows]
        generator = slots.generator.select(rows).fold_in(slots["num_draws"][rows])
        slots["num_draws"][rows] += 1
        one = torch.ones((), dtype=torch.float64, device=rows.device)
        start = self.kernel.draw_noise(one, generator.fold_in(START).uniform(self.block_length))
        is_open = at[1] >= slots["prompt_length"][rows, None]
        is_new = is_open & (step == 0)[:, None]
        left = (self.num_inference_steps - step).double()
        return CanvasState(
            tokens=torch.where(is_new, start, slots.tokens[at]),
            is_open=is_open,
            step=step,
            t=left / self.num_inference_steps,
            s=(left - 1.0) / self.num_inference_steps,
            generator=generator,
        )

    def _belief(
        self, model: Decoder, hidden: Tensor, offset: Tensor, canvas: CanvasState
    ) -> CanvasBelief:
        """From hidden states [n, N, D], in which the canvas begins at `offset` [n]."""
        belief, uniform = CanvasBelief.none(canvas.tokens), canvas.uniform(TOKEN)
        which, position = canvas.is_open.nonzero(as_tuple=True)
        size = positions_at_once(hidden.device)
        for row, place in zip(which.split(size), position.split(size), strict=True):
            at = (row, place)
            states = hidden[sent_at((row, offset[row] + place), hidden.device)]
            logits = without_token(model.head(states).float(), self.mask_token_id)
            tokens = sent(canvas.tokens[at], logits.device)
            if self.canvas_rule == "entropy_bound":
                temperature = annealed_temperature(
                    canvas.step[row], self.num_inference_steps, t_max=self.t_max, t_min=self.t_min
                )
                logits = logits / sent(temperature[:, None].to(logits.dtype), logits.device)
                source = logits
            else:
                source = self._converted(logits, tokens, sent(canvas.t[row], logits.device))
            drawn, of_token = self._drawn(source, tokens, sent(uniform[at], logits.device))
            log_p = logits.log_softmax(-1)
            least = torch.finfo(log_p.dtype).min
            entropy = -(log_p.exp() * log_p.clamp(min=least)).sum(-1).double()
            # Together, so that a device is waited for once; ids are exact in float64.
            ids = (logits.argmax(-1).double(), drawn.double())
            entropy, likeliest, drawn, of_token = torch.stack([entropy, *ids, of_token]).cpu()
            belief.entropy[at], belief.likeliest[at] = entropy, likeliest.long()
            belief.candidates[at], belief.of_token[at] = drawn.long(), of_token
        return belief

    def _converted(self, logits: Tensor, tokens: Tensor, t: Tensor) -> Tensor:
        """Logits [N, V] of what the rule draws from: rule ddim given the token that stands there,
        rule ancestral given all others.
        """
        wanted = "posterior" if self.canvas_rule == "ddim" else "loo"
        if wanted == self.prediction:
            return logits
        if wanted == "loo":
            return self.kernel.loo_logits(logits, tokens, t)
        return self.kernel.posterior_logits(logits, tokens, t)

    def _drawn(self, logits: Tensor, tokens: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """[N] draws, and the probability [N] of `tokens` [N] in what they are drawn from."""
        temperature = 1.0 if self.canvas_rule == "entropy_bound" else self.temperature
        kept = filter_logits(logits, temperature=temperature, top_k=self.top_k, top_p=self.top_p)
        probabilities = kept.softmax(-1)
        of_token = probabilities.gather(-1, tokens[:, None])[:, 0].double()
        return draw(probabilities, uniform), of_token

    def _moved(self, canvas: CanvasState, belief: CanvasBelief) -> Tensor:
        """[n, K] tokens at time s; what stands at given positions means nothing."""
        s, t = canvas.s[:, None], canvas.t[:, None]
        noise = self.kernel.draw_noise(t, canvas.uniform(NOISE))
        candidates = belief.candidates
        if self.canvas_rule == "entropy_bound":
            return keep_certain(
                candidates, belief.entropy, noise, canvas.is_open, bound=self.entropy_bound
            )
        if self.canvas_rule == "ddim":
            chances = posterior_chances(
                self.kernel, canvas.tokens, candidates, s=canvas.s, t=canvas.t
            )
        else:
            chances = self.kernel.move_probability(canvas.tokens, belief.of_token, s=s, t=t)
        return move_to(canvas.tokens, candidates, noise, canvas.uniform(MOVE), chances)

    def _is_over(
        self, slots: Slots, rows: Tensor, canvas: CanvasState, belief: CanvasBelief
    ) -> Tensor:
        """[n] bool: whose step was the last."""
        is_last = canvas.step + 1 >= self.num_inference_steps
        if self.confidence_threshold is None:
            return is_last
        before = slots.kept(rows, like=belief.likeliest, name=_LIKELIEST)
        count = slots["unchanged"][rows]
        unchanged = unchanged_steps(belief.likeliest, before, count, canvas.step)
        slots.keep(rows, belief.likeliest, name=_LIKELIEST)
        slots["unchanged"][rows] = unchanged
        return is_last | is_settled(
            unchanged,
            belief.entropy,
            canvas.is_open,
            stability_threshold=self.stability_threshold,
            confidence_threshold=self.confidence_threshold,
        )

    def _conclude(
        self,
        slots: Slots,
        rows: Tensor,
        canvas: CanvasState,
        tokens: Tensor,
        begin: Tensor,
        is_over: Tensor,
    ) -> None:
        """Note which canvases are finished, and which rows."""
        position = begin[:, None] + torch.arange(self.block_length, device=rows.device)
        limit, end = slots["limit"][rows], begin + self.block_length
        is_new = canvas.is_open & (position < limit[:, None]) & is_over[:, None]
        stop_at = self._first_stop(tokens, is_new)
        is_stopped = stop_at < self.block_length
        slots["is_done"][rows] = (is_stopped | (is_over & (end >= limit))).long()
        slots["end"][rows] = torch.where(is_stopped, begin + stop_at + 1, limit)
        slots["is_stopped"][rows] = is_stopped.long()
        slots["step"][rows] = torch.where(is_over, 0, canvas.step + 1)
        slots["length"][rows] = torch.where(is_over, end, slots["length"][rows])
