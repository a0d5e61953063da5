"""What all samplers share: their start and end, and a model's belief where it is asked for."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tokendiff.diffusion.devices import sent
from tokendiff.diffusion.interfaces import Denoiser, Samples, StepCallback
from tokendiff.diffusion.kernels import AbsorbingKernel, ForwardKernel, UniformKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.samplers.categorical import (
    check_filters,
    draw_by_logits,
    filter_logits,
    without_token,
)
from tokendiff.samplers.commit_rules import Candidates
from tokendiff.samplers.hidden_states import HiddenStates, fitted

_CPU_CHUNK, _GPU_CHUNK = 256, 4096  # positions whose [N, V] logits exist at once
_GPU_LOGITS = 2**28  # of them, at most: 1 GiB in float32, and a sampler makes a few of that size
_PRIOR = -1  # steps are numbered from 0


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """The belief x_theta of a model, and the frame of a sampler.

    Temperature and filters change x_theta itself: it is what tokens are drawn from, and what says
    how likely a token is to be noise.

    Attributes:
        prediction: what the model's output is: "loo", the leave-one-out posterior that the reverse
            step is built on, or "posterior", given all of x_t, which is converted.
        temperature: 0 is argmax.
        top_k, top_p: see `categorical.filter_logits`.
        guidance_scale: classifier-free guidance towards what is given,
            ln x_theta = ln x_free + scale (ln x_given - ln x_free) + const, where x_free sees masks
            in place of what is given; 1 is off, and costs no second pass. Source: arXiv 2410.18514.
    """

    kernel: ForwardKernel
    prediction: str = "loo"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.prediction not in ("loo", "posterior"):
            raise ValueError(f"prediction must be loo or posterior, got {self.prediction!r}")
        check_filters(self.temperature, self.top_k, self.top_p)
        if not self.guidance_scale >= 0.0:
            raise ValueError(f"guidance_scale must not be negative, got {self.guidance_scale}")
        if self.guidance_scale != 1.0 and isinstance(self.kernel, UniformKernel):
            raise ValueError(
                f"guidance_scale must be 1 with uniform noise, got {self.guidance_scale}: guidance "
                "shows the model masks in place of what is given, and it was not trained on them"
            )

    @torch.no_grad()
    def sample(
        self,
        model: Denoiser,
        tokens: Tensor,
        is_given: Tensor,
        generator: RowGenerator,
        *,
        is_valid: Tensor | None = None,
        on_step: StepCallback | None = None,
    ) -> Samples:
        """Fill every position that is not given.

        Args:
            tokens: [B, L] int64; read where `is_given`, not written to. Rows may be on the CPU
                whatever the model's device is; then a pass waits for what is drawn, and no more.
            is_given: [B, L] bool: the prompt, or any other subset; never changed.
            generator: one key per row; a row's sample depends on no other row.
            is_valid: [B, L] bool, False on padding at the right of rows that are shorter, which is
                neither seen nor changed; None where there is none.
            on_step: called with (1.0, x_1) and then after every step.
        """
        if is_valid is not None:
            is_given = is_given | ~is_valid
        x_t = self._start(tokens, is_given, generator)
        report = on_step if on_step is not None else _ignore
        report(1.0, x_t)
        predictor = self._predictor(model, is_given, is_valid)
        x_0 = self._denoise(x_t, ~is_given, predictor, generator, report)
        is_mask = ~is_given & (x_0 == self.kernel.mask_token_id)
        assert not bool(is_mask.any()), "the last step removes all noise"
        return Samples(tokens=x_0, num_model_calls=predictor.num_model_calls)

    def _start(self, tokens: Tensor, is_given: Tensor, generator: RowGenerator) -> Tensor:
        """x_1 [B, L]: tokens where they are given, else noise."""
        one = torch.ones((), dtype=torch.float64, device=tokens.device)
        prior = self.kernel.draw_noise(one, generator.fold_in(_PRIOR).uniform(tokens.shape[1]))
        return torch.where(is_given, tokens, prior)

    def _predictor(self, model: Denoiser, is_given: Tensor, is_valid: Tensor | None) -> "Predictor":
        return Predictor(self, model, is_given, is_valid)

    @abstractmethod
    def num_steps(self, is_given: Tensor) -> int:
        """How many steps it takes to fill rows [B, L] where they are not given."""

    @abstractmethod
    def _denoise(
        self,
        x_t: Tensor,
        is_open: Tensor,
        predictor: "Predictor",
        generator: RowGenerator,
        on_step: StepCallback,
    ) -> Tensor:
        """Clean tokens [B, L] from x_1; only positions that are open change."""

    def _draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """[N] tokens from logits [N, V] that `Predictor.logits` gave, by numbers [N] in (0, 1), on
        the device of those.
        """
        if self.temperature == 0.0:
            return logits.argmax(-1).to(uniform.device)
        return draw_by_logits(logits, sent(uniform, logits.device)).to(uniform.device)


def positions_at_once(device: torch.device, vocab_size: int = 1) -> int:
    """How many positions' logits are computed together."""
    if device.type == "cpu":
        return _CPU_CHUNK
    return max(1, min(_GPU_CHUNK, _GPU_LOGITS // vocab_size))


def check_absorbing(kernel: ForwardKernel, reason: str) -> None:
    """Raise ValueError, with the reason, unless the kernel is the absorbing one."""
    if not isinstance(kernel, AbsorbingKernel):
        raise ValueError(f"needs the absorbing kernel, got {type(kernel).__name__}: {reason}")


class Predictor:
    """A model's belief about one batch of rows while it is sampled.

    Attributes:
        is_given, is_valid: [B, L].
        num_model_calls: [B] int64, so far; unconditional passes count too.
    """

    def __init__(
        self,
        sampler: Sampler,
        model: Denoiser,
        is_given: Tensor,
        is_valid: Tensor | None = None,
        *,
        has_memory: bool = False,
        passes_per_refresh: int | None = None,
    ) -> None:
        self.is_given = is_given
        self.is_valid = valid = torch.ones_like(is_given) if is_valid is None else is_valid
        self.num_model_calls = is_given.new_zeros(len(is_given), dtype=torch.int64)
        self._sampler, self._model = sampler, model
        self._conditional, self._unconditional = (
            HiddenStates(model, valid, has_memory=has_memory, passes_per_refresh=passes_per_refresh)
            for _ in range(2)
        )

    @property
    def _is_guided(self) -> Tensor:
        """[B] bool. A row without anything given would be guided towards what it is guided away
        from.
        """
        return (self.is_given & self.is_valid).any(1) & (self._sampler.guidance_scale != 1.0)

    def replace(self, rows: Tensor, is_given: Tensor, is_valid: Tensor) -> None:
        """Other texts in rows [n]: is_given and is_valid [n, L] of them. L may differ from what it
        was; other rows are cut there, or padded.
        """
        self.is_given = fitted(self.is_given, is_given.shape[1], True)
        self.is_valid = fitted(self.is_valid, is_given.shape[1], False)
        self.is_given[rows], self.is_valid[rows] = is_given, is_valid
        self.num_model_calls[rows] = 0
        for states in (self._conditional, self._unconditional):
            states.replace(rows, self.is_valid)

    def move_window(self, window: Tensor) -> None:
        """Say which positions [B, L] a pass reads from now on; see `HiddenStates`."""
        self._conditional.move(window)
        self._unconditional.move(window)

    def logits(
        self, x_t: Tensor, is_needed: Tensor, time: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """ln x_theta but for a constant per position, in chunks.

        Rows that need nothing take part in no forward pass, and the head sees no other position.

        Args:
            x_t: [B, L] noisy tokens.
            is_needed: [B, L] where the belief is asked for.
            time: [B].

        Yields:
            (row [n], position [n], logits [n, V] float32, the mask at -inf), in row-major order;
            logits are on the device of the model.
        """
        for row, position, logits in self._unfiltered(x_t, is_needed, time):
            yield row, position, self._filtered(logits)

    def candidates(
        self, x_t: Tensor, is_needed: Tensor, time: Tensor, uniform: Tensor
    ) -> Candidates:
        """A token for each position where one is asked for, drawn by numbers [B, L] in (0, 1), and
        how sure the model is of it.
        """
        found = Candidates.none(x_t)
        for row, position, logits in self._unfiltered(x_t, is_needed, time):
            at_random = sent(uniform[row, position], logits.device)
            drawn = self._sampler._draw(self._filtered(logits), at_random)
            found.put((row, position), drawn, logits)
        return found

    def _filtered(self, logits: Tensor) -> Tensor:
        sampler = self._sampler
        return filter_logits(
            logits, temperature=sampler.temperature, top_k=sampler.top_k, top_p=sampler.top_p
        )

    def _unfiltered(
        self, x_t: Tensor, is_needed: Tensor, time: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """As `logits`, before temperature and filters."""
        rows, positions = is_needed.nonzero(as_tuple=True)
        if not rows.numel():
            return
        is_needed_row = is_needed.any(1)
        self.num_model_calls += self._conditional.update(x_t, is_needed_row, time)
        if self._sampler.guidance_scale != 1.0:
            free = x_t.masked_fill(self.is_given, self._sampler.kernel.mask_token_id)
            self.num_model_calls += self._unconditional.update(
                free, is_needed_row & self._is_guided, time
            )
        size = positions_at_once(self._conditional.device)
        for row, position in zip(rows.split(size), positions.split(size), strict=True):
            yield row, position, self._belief(row, position, x_t[row, position], time[row])

    def _belief(self, row: Tensor, position: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        sampler = self._sampler
        logits = self._model.head(self._conditional.at(row, position))
        if sampler.guidance_scale != 1.0:
            logits = self._guided(logits.float(), row, position)
        logits = without_token(logits, sampler.kernel.mask_token_id)
        if sampler.prediction == "posterior":
            there = logits.device
            logits = sampler.kernel.loo_logits(logits, sent(x_t, there), sent(time, there))
        return logits

    def _guided(self, logits: Tensor, row: Tensor, position: Tensor) -> Tensor:
        guided = self._is_guided[row].nonzero()[:, 0]
        if not guided.numel():
            return logits
        hidden = self._unconditional.at(row[guided], position[guided])
        free = self._model.head(hidden).float()
        guided = sent(guided, logits.device)
        return logits.index_copy(
            0, guided, guide(logits[guided], free, self._sampler.guidance_scale)
        )


def guide(given: Tensor, free: Tensor, scale: float) -> Tensor:
    """Logits [N, V] moved away from those of the unconditional pass; what `given` excludes stays
    excluded.
    """
    return (free + scale * (given - free)).masked_fill(given == -torch.inf, -torch.inf)


def _ignore(time: float, x_t: Tensor) -> None:
    pass
