"""Block refinement with the confidence-aware term (CAP): a model trained to fill masks, and to be
sure where it is right, so that more tokens pass the sampler's threshold in each step.

    loss = sum over masked tokens of -ln p(x_0)
         + lambda_conf * mean entropy(softmax(logits / conf_temperature)) over the masked tokens
           whose argmax is already right

Each block of each row draws its own masking probability p ~ U(0,1). Two views are trained in one
batch of 2B rows: what was masked, and its complement, so each token is a target exactly once.
Sources: LLaDA (arXiv 2502.09992), LLaDA2.0 technical report.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tokendiff.diffusion.attention_masks import block_causal, causal
from tokendiff.diffusion.devices import device_of, sent, sent_at
from tokendiff.diffusion.interfaces import CausalDenoiser, LossOutput, TokenBatch
from tokendiff.diffusion.random import RowGenerator
from tokendiff.objectives.block_diffusion import encode_beside_clean
from tokendiff.objectives.blocks import BlockRows, BlockSight, block_rows
from tokendiff.objectives.masked import MaskedTokens, check_loss_fields, masked_loss


@dataclass(frozen=True, kw_only=True)
class BlockRefinement:
    """
    Attributes:
        block_length: tokens of a block.
        attention_mask_mode: "2d", a position sees up to itself, as in the causal model; "4d", also
            the rest of its block.
        clean_context: whether earlier blocks are clean, as they are in decoding, by rows
            `[x_t ; x_0]` of twice the length; else they are as noisy as their own draws made them.
        prompt_length: tokens at the start of each row that are never masked.
        eos_token_id: in mode 4d fills up the block that a document ends in; see
            `tokendiff.objectives.blocks`. In mode 2d no token sees what stands behind it.
        restarts_at_answers: blocks start anew at each answer; see `tokendiff.objectives.blocks`.
        lambda_conf: the mean of the confidence term is taken per row, over both its views, and a
            row weighs as many tokens as it has: the mean over a micro-batch would depend on how
            rows are spread over workers.

    The filling counts in the loss but not among the tokens.
    """

    mask_token_id: int
    block_length: int
    eos_token_id: int | None
    attention_mask_mode: Literal["2d", "4d"] = "2d"
    clean_context: bool = False
    prompt_length: int = 0
    restarts_at_answers: bool = False
    lambda_conf: float = 0.0
    conf_temperature: float = 1.0

    def __post_init__(self) -> None:
        check_loss_fields(None, self.lambda_conf, self.conf_temperature)
        if self.block_length < 1:
            raise ValueError(f"block_length must be at least 1, got {self.block_length}")
        if self.attention_mask_mode not in ("2d", "4d"):
            raise ValueError(
                f"attention_mask_mode must be '2d' or '4d', got {self.attention_mask_mode!r}"
            )
        if self.prompt_length < 0:
            raise ValueError(f"prompt_length must not be negative, got {self.prompt_length}")

    @property
    def sight(self) -> BlockSight:
        return BlockSight(is_causal=self.attention_mask_mode == "2d")

    def rows(self, batch: TokenBatch) -> BlockRows:
        fill = self.eos_token_id if self.attention_mask_mode == "4d" else None
        return block_rows(
            batch,
            block_length=self.block_length,
            fill_token_id=fill,
            restarts_at_answers=self.restarts_at_answers,
        )

    def is_target(self, rows: BlockRows) -> Tensor:
        """[B, W] which tokens are learnt: targets, except the prompt and masks in the text."""
        is_prompt = rows.is_text & (rows.source < self.prompt_length)
        return self.sight.told(rows) & ~is_prompt & (rows.tokens != self.mask_token_id)

    def loss(self, model: CausalDenoiser, batch: TokenBatch, generator: RowGenerator) -> LossOutput:
        rows = self.rows(batch)
        uniform = generator.uniform(rows.tokens.shape[1])
        return self.loss_at(model, rows, uniform < rows.block_uniform(generator))

    def loss_at(self, model: CausalDenoiser, rows: BlockRows, is_masked: Tensor) -> LossOutput:
        """The loss where the first view masks the targets in `is_masked` ([B, W] bool)."""
        is_target = self.is_target(rows)
        views = torch.cat([is_target & is_masked, is_target & ~is_masked])
        hidden = self._encode(model, _twice(rows), views)
        at = views.nonzero(as_tuple=True)
        return masked_loss(
            model.head,
            MaskedTokens(
                hidden=hidden[sent_at(at, hidden.device)],
                targets=rows.tokens.repeat(2, 1)[at],
                row=at[0] % len(rows.tokens),
                weight=torch.ones(len(at[0]), dtype=torch.float64, device=views.device),
                row_tokens=is_target.sum(1),
                num_tokens=(is_target & rows.is_text).sum(),
            ),
            mask_token_id=self.mask_token_id,
            max_weight=None,
            lambda_conf=self.lambda_conf,
            conf_temperature=self.conf_temperature,
        )

    def _encode(self, model: CausalDenoiser, rows: BlockRows, is_masked: Tensor) -> Tensor:
        if self.clean_context:
            return encode_beside_clean(
                model, rows, is_masked, mask_token_id=self.mask_token_id, sight=self.sight
            )
        there = device_of(model, like=rows.tokens)
        rows, is_masked = rows.to(there), sent(is_masked, there)
        x_t = rows.tokens.masked_fill(is_masked, self.mask_token_id)
        rule = causal(rows.document)
        if self.attention_mask_mode == "4d":
            rule = block_causal(rows.document, rows.block, rows.text_to_see)
        return model.encode(x_t, rows.position, rule)


def _twice(rows: BlockRows) -> BlockRows:
    columns: Any = {name: v for name, v in vars(rows).items() if isinstance(v, Tensor)}
    return replace(rows, **{name: column.repeat(2, 1) for name, column in columns.items()})
