"""Ancestral sampling of an absorbing process: reveal masked positions along a time grid.

A step from t to s reveals each masked position with probability (alpha_s - alpha_t)/(1 - alpha_t),
to a sample of x_theta. Which positions are revealed does not depend on the model, so it is drawn
first: rows in which nothing is revealed need no forward pass, and logits are computed at the
revealed positions alone. The samples are those of the loop that computes everything at every step.
Source: MDLM (arXiv 2406.07524), 3.2.2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokendiff.interfaces import Denoiser, Samples, StepCallback
from tokendiff.kernels import AbsorbingKernel
from tokendiff.random import RowGenerator
from tokendiff.samplers.categorical import choose_tokens

_CHUNK_TOKENS = 1024
_REVEAL, _TOKEN = 0, 1  # what a row's random numbers of one step are for


@dataclass(frozen=True, kw_only=True)
class AncestralSampler:
    kernel: AbsorbingKernel
    num_inference_steps: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise ValueError(
                f"num_inference_steps must be at least 1, got {self.num_inference_steps}"
            )
        if self.temperature < 0.0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")

    @torch.no_grad()
    def sample(
        self,
        model: Denoiser,
        tokens: Tensor,
        is_given: Tensor,
        generator: RowGenerator,
        *,
        on_step: StepCallback | None = None,
    ) -> Samples:
        """Fill every position that is not given.

        Args:
            tokens: [B, L] int64; read where `is_given`, not written to.
            is_given: [B, L] bool: the prompt, or any other subset; never changed.
            generator: one key per row; a row's sample depends on no other row.
            on_step: called with (1.0, x_1) and then after every step.
        """
        x_t = torch.where(is_given, tokens, self.kernel.mask_token_id)
        is_masked = ~is_given
        num_model_calls = torch.zeros(tokens.shape[0], dtype=torch.int64, device=tokens.device)
        times = torch.linspace(
            1.0, 0.0, self.num_inference_steps + 1, dtype=torch.float64, device=tokens.device
        )
        reveal_share = self.kernel.reveal_probability(times[1:], times[:-1])
        if on_step is not None:
            on_step(1.0, x_t)
        for step, share in enumerate(reveal_share):
            noise = generator.fold_in(step)
            is_revealed = is_masked & (noise.fold_in(_REVEAL).uniform(tokens.shape[1]) < share)
            rows = is_revealed.any(1).nonzero()[:, 0]
            if rows.numel():
                uniform = noise.fold_in(_TOKEN).uniform(tokens.shape[1])
                x_t = x_t.masked_scatter(
                    is_revealed, self._predict(model, x_t[rows], is_revealed[rows], uniform[rows])
                )
                is_masked = is_masked & ~is_revealed
                num_model_calls[rows] += 1
            if on_step is not None:
                on_step(float(times[step + 1]), x_t)
        assert not bool(is_masked.any()), "the last step reveals with probability 1"
        return Samples(tokens=x_t, num_model_calls=num_model_calls)

    def _predict(
        self, model: Denoiser, x_t: Tensor, is_revealed: Tensor, uniform: Tensor
    ) -> Tensor:
        """[N] tokens for the N revealed positions, in row-major order."""
        hidden = model.encode(x_t, torch.ones_like(is_revealed))[is_revealed]
        mask = torch.tensor([self.kernel.mask_token_id], device=hidden.device)
        chosen = []
        # Few steps reveal many positions at once; [N, V] in float64 must not grow with them.
        for chunk, draws in zip(
            hidden.split(_CHUNK_TOKENS), uniform[is_revealed].split(_CHUNK_TOKENS), strict=True
        ):
            # SUBS; index_fill copies, and the head's own tensor is left alone.
            logits = model.head(chunk).float().index_fill(-1, mask, -torch.inf)
            chosen.append(
                choose_tokens(
                    logits,
                    draws,
                    temperature=self.temperature,
                    top_k=self.top_k,
                    top_p=self.top_p,
                )
            )
        return torch.cat(chosen)
