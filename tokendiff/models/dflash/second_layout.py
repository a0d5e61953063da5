"""What drafts of the second layout (DFlash 2) add to the layers of the first: convolutions over the
places of a block, and a selector of candidates.
"""

import torch
from torch import Tensor, nn

from tokendiff.models.dflash.config import DFlashDraftConfig


class DynamicConvolution(nn.Module):
    """Two convolutions over the positions of a block, whose kernels depend on the position.

    Side 0 stands before a part of a layer and side 1 behind it. Both kernels come from what the
    part is given, h. With g(c) = c // group, the group that channel c is in:

        out[i, c] = sum over taps t of (base[s, t, c] + (P h_i)[s, t, g(c)]) x[i - t, c]

    x is 0 before the first place of a block, so blocks that stand beside each other in a row do not
    mix.
    """

    def __init__(self, config: DFlashDraftConfig) -> None:
        super().__init__()
        width, group = config.hidden_size, config.second("conv_group_size")
        taps = config.second("conv_kernel_size")
        assert config.block_size is not None
        self.block_size, self.shape = config.block_size, (2, taps, width // group)
        self.base_kernel = nn.Parameter(torch.empty(2, taps, width))
        self.kernel_projection = nn.Linear(width, 2 * taps * (width // group), bias=False)

    @torch.no_grad()
    def start(self, initializer_range: float) -> None:
        """As if there were no convolution."""
        self.base_kernel.zero_()
        self.base_kernel[:, 0] = 1.0
        self.kernel_projection.weight.zero_()

    def deltas(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to the base kernels: [B, Q, taps, groups] of each side, of h [B, Q, D]."""
        both = self.kernel_projection(hidden).unflatten(-1, self.shape)
        return both[:, :, 0], both[:, :, 1]

    def forward(self, states: Tensor, delta: Tensor, *, side: int) -> Tensor:
        """Convolved states [B, Q, D], Q being one block, the front of one, or several blocks."""
        length, size, taps = states.shape[1], self.block_size, self.shape[1]
        if length > size and length % size:
            raise ValueError(f"{length} positions are not blocks of {size}")
        blocks = states.unflatten(1, (-1, min(size, length)))
        padded = nn.functional.pad(blocks, (0, 0, taps - 1, 0))
        output: Tensor | None = None
        for tap in range(taps):
            shifted = padded[:, :, taps - 1 - tap : padded.shape[2] - tap].flatten(1, 2)
            grouped = shifted.unflatten(-1, (self.shape[-1], -1)) * delta[:, :, tap, :, None]
            part = shifted * self.base_kernel[side, tap] + grouped.flatten(-2)
            output = part if output is None else output + part
        assert output is not None
        return output.to(states.dtype)


class CandidateSelector(nn.Module):
    """What `tokendiff.diffusion.candidates` scores paths with."""

    def __init__(self, config: DFlashDraftConfig) -> None:
        super().__init__()
        rank, size = config.second("selector_rank"), config.vocab_size
        self.top_k = config.second("selector_top_k")
        self.hidden_projection = nn.Linear(config.hidden_size, rank, bias=False)
        self.predecessor_codebook = nn.Parameter(torch.empty(size, rank))
        self.successor_codebook = nn.Parameter(torch.empty(size, rank))

    @torch.no_grad()
    def start(self, initializer_range: float) -> None:
        """As if there were no selector: no token asks for another one behind it."""
        self.hidden_projection.weight.normal_(0.0, initializer_range)
        self.predecessor_codebook.normal_(0.0, initializer_range)
        self.successor_codebook.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """Features [..., R] of hidden states [..., D]."""
        features: Tensor = self.hidden_projection(hidden)
        return features
