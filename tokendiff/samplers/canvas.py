"""Blocks of random tokens that are denoised, behind a cache of finished blocks.

A block begins as a canvas of noise. Each of its steps asks the model for its belief about the clean
tokens of the whole canvas and moves every token by one of four rules:

    entropy_bound   the most certain candidates stay, all others become random tokens again; the
                    temperature falls from step to step. What the last step finds likeliest is
                    written, as in transformers' `DiffusionGemmaForBlockDiffusion.generate`.
    ddim            q(x_s | x_t, x_0) with a draw of x_0 from p(x_0 | x_t)
    ancestral       the reverse step of the uniform kernel with the leave-one-out posterior, as
                    `tokendiff.samplers.ancestral` takes it on whole rows
    block_refinement
                    candidates are committed by confidence and a quota per step, so that the last
                    step commits the last of them; all others become random tokens again

`ddim` and `ancestral` have the same distribution at temperature 1 where the model is exact; they
differ once temperature or filters change the belief. After each of their steps but the last, a
corrector may draw some tokens again (`tokendiff.samplers.corrector`). A canvas that is stable and
certain is written before its steps are over: its likeliest tokens.

A model that reads clean text and canvases in passes of their own (`CanvasDecoder`) is told at each
step what the step before found; the corrector's passes are told what the step found that they
follow. Sources: BD3-LM (arXiv 2503.09573) for the blocks, `canvas_rules` for the steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokendiff.diffusion.devices import sent, sent_at
from tokendiff.diffusion.interfaces import CanvasDecoder, Decoder
from tokendiff.diffusion.kernels import UniformKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.samplers.base import positions_at_once
from tokendiff.samplers.block_cache import CachedBlockSampler
from tokendiff.samplers.canvas_rules import (
    annealed_temperature,
    commit_by_quota,
    is_settled,
    keep_certain,
    move_to,
    posterior_chances,
    unchanged_steps,
)
from tokendiff.samplers.canvas_state import CanvasBelief, CanvasState
from tokendiff.samplers.categorical import draw, entropy_of, filter_logits, without_token
from tokendiff.samplers.commit_rules import edit_confident
from tokendiff.samplers.corrector import RANDOM, Corrector
from tokendiff.samplers.open_ended import encode_known
from tokendiff.samplers.slots import Slots

RULES = ("entropy_bound", "ddim", "ancestral", "block_refinement")
# What the rules that walk back along the noise draw clean tokens from.
_WANTED = {"ddim": "posterior", "ancestral": "loo"}
# What a row's random numbers of one step are for.
START, TOKEN, MOVE, NOISE, CORRECTOR = 0, 1, 2, 3, 4
# What is kept of a canvas from step to step.
_LIKELIEST, _COMMITTED, _FOUND = "likeliest", "committed", "found"


@dataclass(frozen=True, kw_only=True)
class CanvasSampler(CachedBlockSampler):
    """
    Attributes:
        kernel: of the noise that the model was trained on.
        prediction: what the model's output is: "loo" or "posterior"; see `NoiseProcess`. Rule
            ddim takes the second and rule ancestral the first, and each converts the other.
        canvas_rule: "entropy_bound", "ddim", "ancestral" or "block_refinement".
        num_inference_steps: of a canvas at most.
        entropy_bound: of rule entropy_bound, nats.
        t_max, t_min: of rule entropy_bound, the temperature at the first step and the one that it
            falls to; `temperature` is that of the other rules.
        threshold: of rule block_refinement, the confidence above which a candidate is committed
            whatever the quota; above 1, the quota alone is.
        editing_threshold: of rule block_refinement, the confidence above which a candidate takes
            the place of a committed token; None is off.
        corrector_steps: of rules ddim and ancestral, sweeps after each step but the last, of one
            forward pass each; 0 is off.
        corrector_k, corrector_selection: see `Corrector`.
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
    threshold: float = 0.95
    editing_threshold: float | None = None
    corrector_steps: int = 0
    corrector_k: int = 1
    corrector_selection: str = RANDOM
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
        if not self.threshold >= 0.0 or not (self.editing_threshold or 0.0) >= 0.0:
            raise ValueError(
                "threshold and editing_threshold must not be negative, got "
                f"{self.threshold} and {self.editing_threshold}"
            )
        if self._corrector().steps and self.canvas_rule not in _WANTED:
            raise ValueError(
                f"corrector_steps {self.corrector_steps} goes with canvas_rule "
                f"{' or '.join(_WANTED)}, whose steps reach the noise of a known time; "
                f"got {self.canvas_rule!r}"
            )

    def _corrector(self) -> Corrector:
        return Corrector(
            steps=self.corrector_steps, k=self.corrector_k, selection=self.corrector_selection
        )

    def _denoise(self, model: Decoder, slots: Slots, rows: Tensor) -> None:
        begin = self._begin(slots)[rows]
        at = (rows[:, None], begin[:, None] + torch.arange(self.block_length, device=rows.device))
        canvas = self._canvas(slots, rows, at)
        found = self._found_before(model, slots, rows, canvas)
        hidden, offset = self._read(model, slots, rows, canvas, at, found)
        belief = self._belief(model, hidden, offset, canvas)
        if belief.found is not None:
            slots.keep(rows, belief.found.flatten(1), name=_FOUND)
        settled = self._is_settled(slots, rows, canvas, belief)
        is_last = canvas.step + 1 >= self.num_inference_steps
        is_over = is_last | settled
        tokens = self._moved(slots, rows, canvas, belief)
        writes_likeliest = is_over if self.canvas_rule == "entropy_bound" else settled
        tokens = torch.where(writes_likeliest[:, None], belief.likeliest, tokens)
        tokens = torch.where(canvas.is_open, tokens, canvas.tokens)
        if self.corrector_steps and (going := (~is_over).nonzero()[:, 0]).numel():
            tokens[going] = self._corrected(
                model,
                slots,
                rows[going],
                canvas.moved(going, tokens[going]),
                (at[0][going], at[1][going]),
                None if belief.found is None else belief.found[going],
            )
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

    def _found_before(
        self, model: Decoder, slots: Slots, rows: Tensor, canvas: CanvasState
    ) -> Tensor | None:
        """[n, K, D] what the step before found, 0 where there was none; None where there was none
        of any row, and of a model that is not told.
        """
        if not isinstance(model, CanvasDecoder) or bool((canvas.step == 0).all()):
            return None
        found = slots.kept(rows, name=_FOUND).unflatten(1, (self.block_length, -1))
        return found.masked_fill(sent(canvas.step == 0, found.device)[:, None, None], 0.0)

    def _read(
        self,
        model: Decoder,
        slots: Slots,
        rows: Tensor,
        canvas: CanvasState,
        at: tuple[Tensor, Tensor],
        found: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states [n, N, D] and where in them the canvas begins, [n]. What stands before it
        is read first where it is new, and kept.
        """
        slots.tokens[at] = canvas.tokens
        cached, begin = slots.cache.lengths[rows], at[1][:, 0]
        offset = begin - cached
        if isinstance(model, CanvasDecoder):
            if (new := offset.nonzero()[:, 0]).numel():
                rule = self._rule(slots, rows[new], model.device)
                encode_known(model, slots, rows[new], offset[new], rule)
                slots.cache.extend(rows, offset)
            slots["num_calls"][rows] += 1
            hidden = model.denoise(canvas.tokens, found, slots.cache, rows)
            return hidden, torch.zeros_like(offset)
        counts = offset + self.block_length
        hidden = encode_known(model, slots, rows, counts, self._rule(slots, rows, model.device))
        slots.cache.extend(rows, offset)
        if self.predicts_next:
            return self._shifted(hidden, offset, slots, rows), torch.zeros_like(offset)
        return hidden, offset

    def _logits(
        self, model: Decoder, hidden: Tensor, offset: Tensor, where: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Row and position [N] of all places that `where` [n, K] says, on its device, with logits
        [N, V], in chunks.
        """
        which, position = where.nonzero(as_tuple=True)
        size = positions_at_once(hidden.device, self.kernel.vocab_size)
        for row, place in zip(which.split(size), position.split(size), strict=True):
            states = hidden[sent_at((row, offset[row] + place), hidden.device)]
            yield row, place, without_token(model.head(states), self.mask_token_id)

    def _corrected(
        self,
        model: Decoder,
        slots: Slots,
        rows: Tensor,
        canvas: CanvasState,
        at: tuple[Tensor, Tensor],
        found: Tensor | None,
    ) -> Tensor:
        """[n, K] the tokens of canvases at time t, after the corrector's sweeps."""
        corrector, tokens, device = self._corrector(), canvas.tokens, model.device
        # A sweep is made where the model is: it may need logits of all positions.
        t, is_open = sent(canvas.t, device), sent(canvas.is_open, device)
        keys = sent(canvas.generator.fold_in(CORRECTOR).keys, device)
        for sweep in range(corrector.steps):
            canvas = replace(canvas, tokens=tokens)
            hidden, offset = self._read(model, slots, rows, canvas, at, found)
            x_t, begin = sent(tokens, device), sent(offset, device)

            def beliefs(
                is_needed: Tensor, hidden: Tensor = hidden, x_t: Tensor = x_t, begin: Tensor = begin
            ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
                for row, place, logits in self._logits(model, hidden, begin, is_needed):
                    yield row, place, self._converted(logits, x_t[row, place], t[row], to="loo")

            generator = RowGenerator(keys=keys).fold_in(sweep)
            tokens = corrector.sweep(
                self.kernel, x_t, is_open, beliefs, self._draw, generator, s=t
            ).to(tokens.device)
        return tokens

    def _belief(
        self, model: Decoder, hidden: Tensor, offset: Tensor, canvas: CanvasState
    ) -> CanvasBelief:
        """From hidden states [n, N, D], in which the canvas begins at `offset` [n]."""
        is_told = isinstance(model, CanvasDecoder)
        belief = CanvasBelief.none(canvas.tokens, torch.zeros_like(hidden) if is_told else None)
        uniform = canvas.uniform(TOKEN)
        places, figures = list[tuple[Tensor, Tensor]](), list[Tensor]()
        for row, place, logits in self._logits(model, hidden, offset, canvas.is_open):
            at = (row, place)
            tokens = sent(canvas.tokens[at], logits.device)
            if self.canvas_rule == "entropy_bound":
                temperature = annealed_temperature(
                    canvas.step[row], self.num_inference_steps, t_max=self.t_max, t_min=self.t_min
                )
                logits = logits / sent(temperature[:, None].to(logits.dtype), logits.device)
            source = logits
            if self.canvas_rule in _WANTED:
                t = sent(canvas.t[row], logits.device)
                source = self._converted(logits, tokens, t, to=_WANTED[self.canvas_rule])
            drawn, *chances = self._drawn(source, tokens, sent(uniform[at], logits.device))
            if isinstance(model, CanvasDecoder) and belief.found is not None:
                belief.found[sent_at(at, hidden.device)] = model.expected_embedding(logits)
            entropy = entropy_of(logits.log_softmax(-1)).double()
            ids = (logits.argmax(-1).double(), drawn.double())  # exact in float64
            places.append(at)
            figures.append(torch.stack([entropy, *ids, *chances]))
        # Together, so that a device is waited for once.
        of_all = torch.cat(figures, dim=1).cpu()
        row, place = map(torch.cat, zip(*places, strict=True))
        at = (row, place)
        belief.entropy[at], belief.of_token[at], belief.confidence[at] = of_all[[0, 3, 4]]
        belief.likeliest[at], belief.candidates[at] = of_all[1:3].long()
        return belief

    def _converted(self, logits: Tensor, tokens: Tensor, t: Tensor, *, to: str) -> Tensor:
        """Logits [N, V] of the belief given the token that stands there ("posterior") or given all
        others ("loo"), from those of the model.
        """
        if to == self.prediction:
            return logits
        if to == "loo":
            return self.kernel.loo_logits(logits, tokens, t)
        return self.kernel.posterior_logits(logits, tokens, t)

    def _drawn(
        self, logits: Tensor, tokens: Tensor, uniform: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[N] draws, and in what they are drawn from the probabilities [N] of `tokens` [N] and of
        the draws; at temperature 0 that of the draws is the model's.
        """
        temperature = 1.0 if self.canvas_rule == "entropy_bound" else self.temperature
        kept = filter_logits(logits, temperature=temperature, top_k=self.top_k, top_p=self.top_p)
        probabilities = kept.softmax(-1)
        of_token = probabilities.gather(-1, tokens[:, None])[:, 0].double()
        drawn = draw(probabilities, uniform)
        judged = logits.softmax(-1) if temperature == 0.0 else probabilities
        return drawn, of_token, judged.gather(-1, drawn[:, None])[:, 0].double()

    def _moved(
        self, slots: Slots, rows: Tensor, canvas: CanvasState, belief: CanvasBelief
    ) -> Tensor:
        """[n, K] tokens at time s; what stands at given positions means nothing."""
        s, t = canvas.s[:, None], canvas.t[:, None]
        noise = self.kernel.draw_noise(t, canvas.uniform(NOISE))
        candidates = belief.candidates
        if self.canvas_rule == "entropy_bound":
            return keep_certain(
                candidates, belief.entropy, noise, canvas.is_open, bound=self.entropy_bound
            )
        if self.canvas_rule == "block_refinement":
            return self._refined(slots, rows, canvas, belief, noise)
        if self.canvas_rule == "ddim":
            chances = posterior_chances(
                self.kernel, canvas.tokens, candidates, s=canvas.s, t=canvas.t
            )
        else:
            chances = self.kernel.move_probability(canvas.tokens, belief.of_token, s=s, t=t)
        return move_to(canvas.tokens, candidates, noise, canvas.uniform(MOVE), chances)

    def _refined(
        self, slots: Slots, rows: Tensor, canvas: CanvasState, belief: CanvasBelief, noise: Tensor
    ) -> Tensor:
        """[n, K] tokens that are committed, and noise."""
        before = slots.kept(rows, like=canvas.is_open, name=_COMMITTED)
        before = before & (canvas.step > 0)[:, None]
        is_new = commit_by_quota(
            belief.confidence,
            before,
            canvas.is_open,
            step=canvas.step,
            num_steps=self.num_inference_steps,
            threshold=self.threshold,
        )
        is_written = is_new
        if self.editing_threshold is not None:
            is_written = is_new | edit_confident(
                belief.confidence,
                belief.candidates,
                canvas.tokens,
                before,
                threshold=self.editing_threshold,
            )
        slots.keep(rows, before | is_new, name=_COMMITTED)
        tokens = torch.where(is_written, belief.candidates, canvas.tokens)
        return torch.where(before | is_new, tokens, noise)

    def _is_settled(
        self, slots: Slots, rows: Tensor, canvas: CanvasState, belief: CanvasBelief
    ) -> Tensor:
        """[n] bool: which canvases are stable and certain."""
        if self.confidence_threshold is None:
            return torch.zeros_like(rows, dtype=torch.bool)
        before = slots.kept(rows, like=belief.likeliest, name=_LIKELIEST)
        count = slots["unchanged"][rows]
        unchanged = unchanged_steps(belief.likeliest, before, count, canvas.step)
        slots.keep(rows, belief.likeliest, name=_LIKELIEST)
        slots["unchanged"][rows] = unchanged
        return is_settled(
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
