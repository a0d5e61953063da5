"""The hidden states of a batch while it is sampled, made anew only where something has changed."""

from typing import Any

import torch
from torch import Tensor

from tokendiff.diffusion.devices import sent, sent_at
from tokendiff.diffusion.interfaces import Denoiser, WindowedDenoiser


class HiddenStates:
    """Hidden states of a batch; a row is encoded again where its tokens have changed, or, for a
    model that is conditioned on it, the time.

    With a memory, a pass reads the positions of a window alone, beside the keys and values that are
    kept of the others. Every `passes_per_refresh` passes, and where the window moves, whole rows
    are read.
    """

    def __init__(
        self,
        model: Denoiser,
        is_valid: Tensor,
        *,
        has_memory: bool,
        passes_per_refresh: int | None,
    ) -> None:
        self._model, self._is_valid = model, is_valid
        self._tokens: Tensor | None = None
        self._hidden: Tensor | None = None
        self._memory: Any = None
        if has_memory:
            if not isinstance(model, WindowedDenoiser):
                raise ValueError("a cache needs a model that can read parts of a row")
            self._memory = model.new_memory(len(is_valid))
        self._window = torch.ones_like(is_valid)
        self._most = passes_per_refresh
        # Passes of each row since the last over all of it; 0 asks for one.
        self._num_passes = torch.zeros(len(is_valid), dtype=torch.int64, device=is_valid.device)

    def move(self, window: Tensor) -> None:
        """Read the positions of another window [B, L] from now on."""
        self._window = window
        self._num_passes.zero_()

    def replace(self, rows: Tensor, is_valid: Tensor) -> None:
        """Forget what was read of rows [n], which hold other texts now.

        Args:
            is_valid: [B, L] of all rows; L may differ from what it was.
        """
        self._is_valid, self._window = is_valid, torch.ones_like(is_valid)
        self._num_passes[rows] = 0
        if self._tokens is not None and self._hidden is not None:
            self._tokens = fitted(self._tokens, is_valid.shape[1], -1)
            self._tokens[rows] = -1
            self._hidden = fitted(self._hidden, is_valid.shape[1], 0.0)

    def update(self, tokens: Tensor, is_needed: Tensor, time: Tensor) -> Tensor:
        """Make the rows that are needed ([B] bool) those of tokens [B, L] at times [B].

        Returns:
            [B] bool: the rows that it took a forward pass for.
        """
        is_stale = is_needed
        if self._tokens is not None and not self._model.is_time_conditioned:
            is_stale = is_needed & (tokens != self._tokens).any(1)
        is_whole = torch.ones_like(is_stale)
        if self._memory is not None:
            is_whole = (self._num_passes == 0) | (self._num_passes >= (self._most or torch.inf))
        if (rows := (is_stale & is_whole).nonzero()[:, 0]).numel():
            self._read_whole(tokens, rows, time)
        if (rows := (is_stale & ~is_whole).nonzero()[:, 0]).numel():
            self._read_window(tokens, rows)
        self._num_passes = torch.where(is_whole, 0, self._num_passes) + is_stale.long()
        return is_stale

    def _read_whole(self, tokens: Tensor, rows: Tensor, time: Tensor) -> None:
        is_valid = self._is_valid[rows]
        if self._memory is None:
            hidden = self._model.encode(tokens[rows], is_valid, time[rows])
        else:
            every = torch.arange(tokens.shape[1], device=tokens.device).expand(len(rows), -1)
            hidden = self._encode_window(tokens, every, rows)
        if self._hidden is None or self._tokens is None:
            self._hidden = hidden.new_empty(len(tokens), *hidden.shape[1:])
            self._tokens = torch.full_like(tokens, -1)
        self._hidden[sent(rows, hidden.device)], self._tokens[rows] = hidden, tokens[rows]

    def _read_window(self, tokens: Tensor, rows: Tensor) -> None:
        assert self._hidden is not None, "the first pass is over whole rows"
        assert self._tokens is not None
        window = self._window[rows]
        count = window.sum(1)
        place = torch.arange(int(count.max()), device=tokens.device)
        begin = window.long().argmax(1)
        positions = begin[:, None] + torch.minimum(place, count[:, None] - 1)
        hidden = self._encode_window(tokens, positions, rows)
        which, at = (place < count[:, None]).nonzero(as_tuple=True)
        places = sent_at((rows[which], positions[which, at]), hidden.device)
        self._hidden[places] = hidden[sent_at((which, at), hidden.device)]
        self._tokens[rows] = tokens[rows]

    def _encode_window(self, tokens: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        assert isinstance(self._model, WindowedDenoiser)
        is_valid = self._is_valid[rows]
        return self._model.encode_window(tokens[rows], positions, is_valid, self._memory, rows)

    def at(self, row: Tensor, position: Tensor) -> Tensor:
        """[N, D]."""
        assert self._hidden is not None, "update comes first"
        return self._hidden[sent_at((row, position), self._hidden.device)]

    @property
    def device(self) -> torch.device:
        """Where the hidden states are."""
        assert self._hidden is not None, "update comes first"
        return self._hidden.device


def fitted(states: Tensor, length: int, value: float) -> Tensor:
    """A copy of [B, L, ...] that is cut at `length`, or padded with a value up to it."""
    fit = states.new_full((len(states), length, *states.shape[2:]), value)
    kept = min(length, states.shape[1])
    fit[:, :kept] = states[:, :kept]
    return fit
