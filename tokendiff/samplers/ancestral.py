"""Ancestral sampling along a time grid, for every kernel.

In a step from t to s each token becomes a draw from x_theta, or noise of time s, or stays
(`ForwardKernel.move_probability`). The first two are never likelier than if x_theta(x_t) were 0, so
the uniform number that decides between them is drawn before any model is called: where it lies
beyond these bounds the token stays. Rows in which every token is decided so need no forward pass,
and logits are computed at the undecided positions alone. The samples are those of the loop that
computes everything at every step. Sources: MDLM (arXiv 2406.07524), 3.2.2; D3PM (arXiv 2107.03006).

After each step but the last, a corrector may draw some of the tokens again
(`tokendiff.samplers.corrector`). At time 0, which the last step reaches, a model would be asked
about tokens without any noise, on which it was not trained.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tokendiff.diffusion.devices import sent
from tokendiff.diffusion.interfaces import StepCallback
from tokendiff.diffusion.random import RowGenerator
from tokendiff.samplers.base import Predictor, Sampler
from tokendiff.samplers.corrector import RANDOM, Corrector, check_correctable

MOVE, TOKEN, NOISE, CORRECTOR = 0, 1, 2, 3  # what a row's random numbers of one step are for


@dataclass(frozen=True, kw_only=True)
class AncestralSampler(Sampler):
    """Steps down a uniform grid of times, each with the corrector's sweeps behind it.

    Attributes:
        num_inference_steps: steps of the time grid.
        corrector_steps: sweeps after each step but the last, of one forward pass each; 0 is off.
        corrector_k, corrector_selection: see `Corrector`.
    """

    num_inference_steps: int = 128
    corrector_steps: int = 0
    corrector_k: int = 1
    corrector_selection: str = RANDOM

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._corrector().steps:
            check_correctable(self.kernel)
        if self.num_inference_steps < 1:
            raise ValueError(
                f"num_inference_steps must be at least 1, got {self.num_inference_steps}"
            )

    def _corrector(self) -> Corrector:
        return Corrector(
            steps=self.corrector_steps, k=self.corrector_k, selection=self.corrector_selection
        )

    def num_steps(self, is_given: Tensor) -> int:
        return self.num_inference_steps

    def _denoise(
        self,
        x_t: Tensor,
        is_open: Tensor,
        predictor: Predictor,
        generator: RowGenerator,
        on_step: StepCallback,
    ) -> Tensor:
        times = torch.linspace(1.0, 0.0, self.num_inference_steps + 1, dtype=torch.float64)
        for step, (t, s) in enumerate(times.to(x_t.device).unfold(0, 2, 1)):
            of_step = generator.fold_in(step)
            x_t = self._step(x_t, is_open, predictor, of_step, s=s, t=t)
            if step < self.num_inference_steps - 1:
                x_t = self._corrected(x_t, is_open, predictor, of_step.fold_in(CORRECTOR), s=s)
            on_step(float(times[step + 1]), x_t)
        return x_t

    def _step(
        self,
        x_t: Tensor,
        is_open: Tensor,
        predictor: Predictor,
        generator: RowGenerator,
        *,
        s: Tensor,
        t: Tensor,
    ) -> Tensor:
        move, token, noise = (
            generator.fold_in(purpose).uniform(x_t.shape[1]) for purpose in (MOVE, TOKEN, NOISE)
        )
        mask_token_id = self.kernel.mask_token_id
        to_clean, to_noise = self._move_probability(x_t, torch.zeros_like(move), s=s, t=t)
        is_clean = is_open & (move < to_clean)
        is_noise = is_open & ~is_clean & (move < to_clean + to_noise)
        new_noise = self.kernel.draw_noise(s, noise)
        # The belief about a mask is 0, and where noise puts in masks alone it decides nothing.
        has_belief = (x_t != mask_token_id) & (self.kernel.noise(t).token > 0.0)
        x_s = torch.where(is_noise & ~has_belief, new_noise, x_t)
        is_undecided = is_clean | (is_noise & has_belief)
        time = self._model_time(t, x_t, is_open, predictor.is_given)
        for row, position, logits in predictor.logits(x_t, is_undecided, time):
            at = (row, position)
            belief = _belief_in(x_t[at], logits, where=has_belief[at])
            to_clean, to_noise = self._move_probability(x_t[at], belief, s=s, t=t)
            tokens = torch.where(move[at] < to_clean + to_noise, new_noise[at], x_t[at])
            drawn = (move[at] < to_clean).nonzero()[:, 0]
            tokens[drawn] = self._draw(logits[sent(drawn, logits.device)], token[at][drawn])
            x_s[at] = tokens
        return x_s

    def _corrected(
        self,
        x_s: Tensor,
        is_open: Tensor,
        predictor: Predictor,
        generator: RowGenerator,
        *,
        s: Tensor,
    ) -> Tensor:
        corrector = self._corrector()
        for sweep in range(corrector.steps):
            time = self._model_time(s, x_s, is_open, predictor.is_given)
            beliefs = partial(predictor.logits, x_s, time=time)
            x_s = corrector.sweep(
                self.kernel, x_s, is_open, beliefs, self._draw, generator.fold_in(sweep), s=time
            )
        return x_s

    def _move_probability(
        self, x_t: Tensor, belief: Tensor, *, s: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.kernel.move_probability(x_t, belief, s=s, t=t)

    def _model_time(self, t: Tensor, x_t: Tensor, is_open: Tensor, is_given: Tensor) -> Tensor:
        """[B] the time that the model is told."""
        return t.expand(len(x_t))


def _belief_in(tokens: Tensor, logits: Tensor, *, where: Tensor) -> Tensor:
    """[N] float64: the probability of each token under logits [N, V], and 0 elsewhere."""
    index = where.nonzero()[:, 0]
    zeros = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
    if not index.numel():
        return zeros
    chosen = logits[sent(index, logits.device)]
    of_tokens = sent(tokens[index, None], logits.device)
    log_belief = chosen.gather(-1, of_tokens)[:, 0] - chosen.logsumexp(-1)
    return zeros.index_copy(0, index, log_belief.double().exp().to(tokens.device))
