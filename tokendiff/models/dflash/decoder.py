"""A causal language model with a DFlash draft beside it, for `samplers.dflash`.

The draft's keys and values of what the target has read are made from the target's hidden states,
once per token, and kept per row like the target's own; those of a drafted block are seen by its one
pass alone.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokendiff.diffusion.attention_masks import MaskRule
from tokendiff.diffusion.candidates import Candidates
from tokendiff.diffusion.devices import sent
from tokendiff.diffusion.interfaces import DecodingCache
from tokendiff.errors import InputError
from tokendiff.models.causal import CausalModel
from tokendiff.models.dflash.config import FULL, SLIDING
from tokendiff.models.dflash.model import DFlashDraftModel, in_window
from tokendiff.models.dflash.planning import check_fit, open_draft_config, open_target_config
from tokendiff.models.dflash.second_layout import CandidateSelector
from tokendiff.models.layers import cache_argument
from tokendiff.models.ragged_cache import RaggedCache

if TYPE_CHECKING:
    from tokendiff.config.generate import GenerateConfig

_LOGITS_AT_ONCE = 256  # hidden states whose logits exist at once


def check_drafted(config: "GenerateConfig") -> str:
    """The name of the target, after seeing from the two configs that the draft is one of it.

    Raises:
        InputError: one of them is missing, or they do not go together; no weight is read.
    """
    target, draft = config.target_model_id, config.draft_model_id
    if target is None or draft is None:
        raise InputError(
            "sampler 'dflash' needs target_model_id, the causal language model whose text is "
            "written, and draft_model_id, its draft"
        )
    check_fit(
        open_draft_config(draft),
        open_target_config(target),
        draft_model_id=draft,
        target_model_id=target,
    )
    return target


class DraftedModel:
    """A `tokendiff.diffusion.interfaces.DraftedDecoder`.

    Args:
        target, draft: on one device; `planning.check_fit` says whether they go together.
    """

    def __init__(self, target: CausalModel, draft: DFlashDraftModel) -> None:
        self.target, self._draft = target, draft

    @property
    def device(self) -> torch.device:
        return self.target.device

    @property
    def block_size(self) -> int:
        size = self._draft.config.block_size
        assert size is not None
        return size

    def new_cache(self, num_rows: int) -> "DraftedCache":
        return DraftedCache(self.target, self._draft, num_rows)

    def encode(
        self,
        tokens: Tensor,
        num_tokens: Tensor,
        cache: DecodingCache,
        rows: Tensor,
        rule: MaskRule,
    ) -> Tensor:
        assert isinstance(cache, DraftedCache)
        hidden, states = self.target.encode_layers(
            tokens,
            num_tokens,
            cache.of_target,
            rows,
            rule,
            layers=self._draft.config.target_layer_ids,
        )
        cache.last_states = torch.cat(states, dim=-1)
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        return self.target.head(hidden)

    def draft(self, anchors: Tensor, cache: DecodingCache, rows: Tensor) -> Tensor | Candidates:
        assert isinstance(cache, DraftedCache)
        block = anchors.new_full((len(anchors), self.block_size), self._draft.config.mask_token_id)
        block[:, 0] = anchors
        embedded = self.target.model.get_input_embeddings()(sent(block, self.device))
        hidden = cache.read_unread(rows, embedded)[:, 1:]
        if self._draft.candidate_selector is None:
            return self.target.before_head(hidden.to(embedded.dtype))
        return self._candidates(hidden, self._draft.candidate_selector, embedded.dtype)

    def _candidates(
        self, hidden: Tensor, selector: CandidateSelector, dtype: torch.dtype
    ) -> Candidates:
        """Of hidden states [n, D, H] of the draft, whose [n D, V] logits are never held at once."""
        output, size = self.target.model.get_output_embeddings(), self.target.vocab_size
        found = []
        for states in hidden.flatten(0, 1).split(_LOGITS_AT_ONCE):
            logits = self._draft.config.shaped(output(states.to(dtype))[..., :size])
            best = logits.topk(min(selector.top_k, logits.shape[-1]))
            values = best.values.to(torch.promote_types(logits.dtype, torch.float32))
            found.append((best.indices, values))
        tokens, logits = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Candidates(
            tokens=tokens.unflatten(0, hidden.shape[:2]),
            logits=logits.unflatten(0, hidden.shape[:2]),
            features=selector(hidden),
            predecessors=selector.predecessor_codebook,
            successors=selector.successor_codebook,
            vocab_size=size,
        )


class DraftedCache:
    """The target's cache, the draft's, and the hidden states that the draft has not read yet.

    Hidden states of a few tokens wait for the next block of their row and go through the draft's
    one pass with it; those of many are read at once.

    Attributes:
        of_target: keys and values of the target.
        last_states: [n, N, n_layers D] what the target's last call gave for the draft.
    """

    def __init__(self, target: CausalModel, draft: DFlashDraftModel, num_rows: int) -> None:
        self.of_target = target.new_cache(num_rows)
        self._draft = draft
        self._of_draft = RaggedCache(
            num_rows,
            num_layers=draft.config.num_hidden_layers,
            device=target.device,
            recorder=target.recorder,
        )
        width, block_size = draft.fc.in_features, draft.config.block_size
        assert block_size is not None
        self._unread = draft.fc.weight.new_zeros(num_rows, block_size, width)
        self.last_states = self._unread[:0]

    @property
    def lengths(self) -> Tensor:
        return self.of_target.lengths

    def extend(self, rows: Tensor, counts: Tensor) -> None:
        states, size = self.last_states, self._unread.shape[1]
        # A block of one that nobody looks at: there is no attention without a query.
        nothing = states.new_zeros(len(rows), 1, self._draft.config.hidden_size)
        if bool((self._num_unread(rows) > 0).any()):
            self.read_unread(rows, nothing)
        self.of_target.extend(rows, counts)
        if states.shape[1] <= size:
            at = sent(rows, states.device)
            self._unread[at, : states.shape[1]] = states.to(self._unread.dtype)
        else:
            self._read(rows, states, counts, nothing)

    def crop(self, rows: Tensor, lengths: Tensor) -> None:
        for cache in (self.of_target, self._of_draft):
            cache.crop(rows, lengths)

    def move(self, source: int, target: int) -> None:
        for cache in (self.of_target, self._of_draft):
            cache.move(source, target)
        self._unread[target] = self._unread[source]

    def read_unread(self, rows: Tensor, block: Tensor) -> Tensor:
        """The draft's hidden states [n, K, D] of blocks that are embedded as [n, K, D], after
        reading what it has not read of these rows.
        """
        counts = self._num_unread(rows)
        unread = self._unread[sent(rows, self._unread.device), : int(counts.max())]
        return self._read(rows, unread, counts, block)

    def _num_unread(self, rows: Tensor) -> Tensor:
        rows = rows.to("cpu")
        return self.of_target.lengths[rows] - self._of_draft.lengths[rows]

    def _read(self, rows: Tensor, states: Tensor, counts: Tensor, block: Tensor) -> Tensor:
        """One pass over the first `counts` [n] of `states` [n, C, n_layers D], which stay in the
        draft's cache, and a block [n, K, D] behind them, which does not.
        """
        rows, counts = rows.to("cpu"), counts.to("cpu")
        num_states, num_block, there = states.shape[1], block.shape[1], states.device
        of_state, of_block = torch.arange(num_states), torch.arange(num_block)
        # What is over of a row's states stands behind its block, where nothing sees it.
        is_over = of_state >= counts[:, None]
        offsets = torch.cat(
            [of_state + num_block * is_over, counts[:, None] + of_block.expand(len(rows), -1)],
            dim=1,
        )
        positions, width = self._of_draft.begin_at(rows, offsets)
        end = self._of_draft.lengths[rows] + counts + num_block
        mask = None
        if bool((end < width).any()):
            kv = torch.arange(width, device=there)
            mask = (kv < sent(end, there)[:, None])[:, None, None]
        window, masks = self._draft.window, {FULL: mask, SLIDING: mask}
        if window is not None and int(end.max()) > window:
            kv = torch.arange(width, device=there).expand(len(rows), -1)
            of_block = sent(positions, there)[:, num_states:]
            is_near = in_window(kv, of_block, window)[:, None]
            masks[SLIDING] = is_near if mask is None else is_near & mask
        inputs = {
            "noise_embeds": block,
            "context_hidden_states": states,
            "attention_mask": masks,
            "position_ids": sent(positions, there),
        }

        def forward(given: dict[str, Any]) -> list[Tensor]:
            output: Any = self._draft(**given, **cache_argument(self._draft, self._of_draft))
            return [output.last_hidden_state]

        (hidden,) = self._of_draft.run(forward, inputs)
        self._of_draft.extend(rows, counts)
        return hidden
