"""Block diffusion whose noise is other tokens: uniform diffusion inside each block.

    -ln p(x) <= sum over blocks b of the bound of `tokendiff.objectives.token_noise` on
                -ln p(x_b | x of the blocks before it),

with alpha_t x + (1 - alpha_t) / K over the K ids that are not the mask as the noise of block b. All
blocks are trained in one pass over rows `[x_t ; x_0]`, as in `block_diffusion`, and
`ar_loss_weight` adds the next-token loss of the clean half, which is then causal.

The model learns the leave-one-out posterior, what the other positions of the block and the clean
text before it say of a token. It is not told the time. With loss_type "cross_entropy" it learns
p(x_0 | x_t) instead, as DiffusionGemma did: the mean over times of the negative log-likelihood.

A model that takes it (`SelfConditionedDenoiser`) is told in half of the rows, drawn anew each time,
what a first pass without gradient found. Sources: UDLM (arXiv 2412.10193), BD3-LM (arXiv
2503.09573), Analog Bits (arXiv 2208.04202) for self-conditioning.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokendiff.diffusion.devices import sent_at
from tokendiff.diffusion.interfaces import (
    CausalDenoiser,
    LossOutput,
    SelfConditionedDenoiser,
    TokenBatch,
)
from tokendiff.diffusion.kernels import UniformKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.objectives.block_diffusion import block_strata, encode_noisy, joint_loss
from tokendiff.objectives.blocks import BlockRows, BlockSight, block_rows
from tokendiff.objectives.token_noise import TokenNoiseDiffusion

_TOLD = -12  # what a row's random numbers are for, beside its times and tokens
_TOLD_SHARE = 0.5  # of the rows, as the released models were trained


@dataclass(frozen=True, kw_only=True)
class UniformBlockDiffusion:
    """
    Attributes:
        block_length: tokens of a block.
        eos_token_id: fills up the block that a document ends in; see `tokendiff.objectives.blocks`.
        loss_type: see `TokenNoiseDiffusion`.
        max_loss_weight: clips the weight r_t / q_t.
        restarts_at_answers, ar_loss_weight, diffusion_loss_weight, predicts_next: as in
            `BlockDiffusion`.
        lambda_conf: weight of the confidence term, over the correctly predicted tokens.
    """

    kernel: UniformKernel
    block_length: int
    eos_token_id: int | None
    loss_type: Literal["elbo", "cross_entropy"] = "elbo"
    min_time: float = 1e-3
    max_loss_weight: float | None = None
    restarts_at_answers: bool = False
    ar_loss_weight: float = 0.0
    diffusion_loss_weight: float = 1.0
    predicts_next: bool = False
    lambda_conf: float = 0.0
    conf_temperature: float = 1.0

    def __post_init__(self) -> None:
        self._of_tokens()
        if self.block_length < 1:
            raise ValueError(f"block_length must be at least 1, got {self.block_length}")
        if self.ar_loss_weight < 0.0 or self.diffusion_loss_weight <= 0.0:
            raise ValueError(
                "ar_loss_weight must not be negative and diffusion_loss_weight positive, got "
                f"{self.ar_loss_weight} and {self.diffusion_loss_weight}"
            )

    def _of_tokens(self) -> TokenNoiseDiffusion:
        return TokenNoiseDiffusion(
            kernel=self.kernel,
            loss_type=self.loss_type,
            min_time=self.min_time,
            max_loss_weight=self.max_loss_weight,
            lambda_conf=self.lambda_conf,
            conf_temperature=self.conf_temperature,
        )

    @property
    def sight(self) -> BlockSight:
        return BlockSight(
            context_is_causal=self.ar_loss_weight > 0.0, predicts_next=self.predicts_next
        )

    def loss(self, model: CausalDenoiser, batch: TokenBatch, generator: RowGenerator) -> LossOutput:
        """Draw a time per block, stratified as in `BlockDiffusion.loss`, and noisy tokens, and take
        the loss there.
        """
        rows = block_rows(
            batch,
            block_length=self.block_length,
            fill_token_id=self.eos_token_id,
            restarts_at_answers=self.restarts_at_answers,
        )
        u = block_strata(rows, generator)
        if self.loss_type == "elbo":
            t, slope = self.kernel.warped_time(u, min_time=self.min_time)
        else:
            t, slope = self.min_time + (1.0 - self.min_time) * u, torch.ones_like(u)
        uniform = generator.uniform(rows.tokens.shape[1])
        x_t = self.kernel.corrupt(
            rows.tokens, t, uniform=uniform, is_noisable=self._is_target(rows)
        )
        is_told = None
        if isinstance(model, SelfConditionedDenoiser):
            is_told = generator.fold_in(_TOLD).uniform(1)[:, 0] < _TOLD_SHARE
        return self.loss_at(model, rows, x_t, t, slope, is_told=is_told)

    def _is_target(self, rows: BlockRows) -> Tensor:
        # A literal mask token in the text is context, never a target.
        return self.sight.told(rows) & (rows.tokens != self.kernel.mask_token_id)

    def loss_at(
        self,
        model: CausalDenoiser,
        rows: BlockRows,
        x_t: Tensor,
        t: Tensor,
        slope: Tensor,
        *,
        is_told: Tensor | None = None,
    ) -> LossOutput:
        """The loss at given noisy tokens x_t ([B, W]) and their blocks' times t ([B, W]); nothing
        is drawn here.

        Args:
            slope: [B, W] what a block's bound counts: dt/du of the draw of t.
            is_told: see `encode_noisy`.
        """
        is_target = self._is_target(rows)
        noisy, clean = encode_noisy(model, rows, x_t, sight=self.sight, is_told=is_told)
        blocks = self._of_tokens().loss_of_states(
            model.head,
            noisy[sent_at(is_target.nonzero(as_tuple=True), noisy.device)],
            rows.tokens,
            x_t,
            t,
            slope,
            is_target,
            (is_target & rows.is_text).sum(),
        )
        return joint_loss(
            blocks,
            model,
            rows,
            clean,
            ar_loss_weight=self.ar_loss_weight,
            diffusion_loss_weight=self.diffusion_loss_weight,
            metric="elbo" if self.loss_type == "elbo" else "denoising_nll",
        )
