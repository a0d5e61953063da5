"""A transformers model in the two parts that objectives and samplers call: encoder, then head."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokendiff.diffusion.attention_masks import positions_in_document, whole_documents
from tokendiff.diffusion.devices import sent
from tokendiff.errors import InputError
from tokendiff.models import tiled_attention
from tokendiff.models.cuda_graphs import Recorder, Replays
from tokendiff.models.families import CAUSAL_TYPES, DECODER_TYPES
from tokendiff.models.layers import cache_argument, compile_layers
from tokendiff.models.masked_attention import (
    IMPLEMENTATIONS,
    AttentionKernel,
    best_kernel,
    under_rule,
)

if TYPE_CHECKING:
    from tokendiff.models.ragged_cache import RaggedCache

_FEW, _LARGE = 12, 2**20  # rows, weights
_PROBE_TOKENS = 8  # of a row that a model is tried out with
_LEFT = "_attention_left"  # attribute of a model: its own attention, and what was set in its place

# Where each architecture keeps what stands between its last hidden state and its logits. A masked
# LM that is not listed works as well, but computes logits at every position.
_HEADS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "albert": lambda model, hidden: model.predictions(hidden),
    "bert": lambda model, hidden: model.cls(hidden),
    "camembert": lambda model, hidden: model.lm_head(hidden),
    "electra": lambda model, hidden: model.generator_lm_head(model.generator_predictions(hidden)),
    "modernbert": lambda model, hidden: model.decoder(model.head(hidden)),
    "roberta": lambda model, hidden: model.lm_head(hidden),
    "tokendiff_dit": lambda model, hidden: model.lm_head(hidden),
    "xlm-roberta": lambda model, hidden: model.lm_head(hidden),
    **dict.fromkeys(DECODER_TYPES, lambda model, hidden: model.get_output_embeddings()(hidden)),
}


SPLIT_TYPES = frozenset(_HEADS)
# Of those, the ones that count the positions of tokens from behind the id of padding.
_POSITIONS_BEHIND_PADDING = ("camembert", "roberta", "xlm-roberta")


def check_isolation(config: Any, *, origin: str) -> None:
    """Raise InputError where a model of this config cannot hide the documents of a row from each
    other.

    Args:
        origin: what the error begins with.
    """
    if config.model_type not in _HEADS:
        raise InputError(
            f"{origin} is of type {config.model_type!r}, which is not known to take positions and "
            "masks by document; preprocess with isolate_documents false, or give a model of type "
            f"{', '.join(sorted(_HEADS))}"
        )


def check_windows(config: Any, *, origin: str) -> None:
    """Raise InputError where a model of this config cannot read some positions of a row beside what
    it has kept of the others.

    Args:
        origin: what the error begins with.
    """
    if config.model_type not in DECODER_TYPES:
        raise InputError(
            f"{origin} is of type {config.model_type!r}, which keeps no keys and values; set cache "
            f"to none, or give a model of type {', '.join(CAUSAL_TYPES)}"
        )


@torch.no_grad()
def check_padding(denoiser: "TransformersDenoiser", *, origin: str) -> None:
    """Raise InputError where what a model says of a row depends on the padding behind it: a
    convolution, for one, heeds no attention mask. No config says so; it is found out with two rows.

    Args:
        origin: what the error begins with.
    """
    is_valid = torch.arange(_PROBE_TOKENS) < _PROBE_TOKENS // 2
    tokens = torch.arange(_PROBE_TOKENS) % denoiser.vocab_size
    tokens = torch.stack([tokens, tokens.where(is_valid, tokens.flip(0))])
    was_training = denoiser.training
    denoiser.eval()
    hidden = denoiser.encode(tokens, is_valid.expand(2, -1), torch.zeros(2, dtype=torch.float64))
    denoiser.train(was_training)
    one, other = denoiser.head(hidden[:, is_valid]).float()
    if float((one - other).abs().max()) > 1e-3 * float(one.std()):
        raise InputError(
            f"{origin} is of type {denoiser.model.config.model_type!r}, which sees the padding "
            "behind a row, so a row's loss and samples would depend on the rows beside it; give a "
            f"model of type {', '.join(sorted(_HEADS))}, or another that heeds its attention mask"
        )


def attend_both_ways(config: Any) -> None:
    """Make every layer of a causal model built from `config` attend to the whole row.

    `config` (of one of CAUSAL_TYPES) is changed, and saved with the model: transformers opens the
    result as bidirectional too.
    """
    config.is_causal = False
    config.use_cache = False
    attend_without_window(config)


def attend_without_window(config: Any) -> None:
    """Make every layer of a model built from `config` see as far back as its mask lets it.

    `config` is changed, and saved with the model.
    """
    if getattr(config, "sliding_window", None) is not None:
        config.sliding_window = None
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = ["full_attention"] * config.num_hidden_layers


class _FewRows(TorchFunctionMode):
    """Within it, few rows h W' are computed as (W h')': on a CPU, where the BLAS copies a matrix in
    front of a transposed one anew each time, a large W then takes a third of the time.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and not kwargs and len(args) == 3:
            x, weight, bias = args
            is_worth_it = weight.numel() >= _LARGE and x.dim() == 2 and len(x) <= _FEW
            if is_worth_it and weight.dtype == torch.float32 and weight.device.type == "cpu":
                product = (weight @ x.to(weight.dtype).T).T.contiguous()
                return product if bias is None else product.add_(bias)
        return func(*args, **(kwargs or {}))


class ModelInTwoParts(nn.Module):
    """A `transformers` language model, its logits apart from the rest.

    Args:
        vocab_size: ids that the tokenizer has. A model's embedding is often padded to a round size;
            the logits of the ids beyond are dropped, since they cannot occur in text.
    """

    def __init__(self, model: Any, *, vocab_size: int) -> None:
        super().__init__()
        self.model = model
        self.vocab_size = vocab_size
        self._head = _HEADS.get(model.config.model_type)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def is_split(self) -> bool:
        """Whether logits can be computed at chosen positions alone."""
        return self._head is not None

    def head(self, hidden: Tensor) -> Tensor:
        if self._head is None:
            return hidden[..., : self.vocab_size]
        with nullcontext() if torch.is_grad_enabled() else _FewRows():
            return self._head(self.model, hidden)[..., : self.vocab_size]

    def recompute_activations(self) -> None:
        """Keep no activations between layers; the backward pass computes them again.

        Raises:
            InputError: the architecture (ALBERT, for one) cannot.
        """
        if not self.model.supports_gradient_checkpointing:
            raise InputError(
                f"gradient_checkpointing: transformers has none for models of type "
                f"{self.model.config.model_type!r}; turn it off"
            )
        # transformers 5.23 renamed the method and warns at the old name.
        name = "activation_checkpointing_enable"
        enable = getattr(self.model, name, self.model.gradient_checkpointing_enable)
        enable()

    def compile_encoder(self) -> None:
        """torch.compile the encoder in place; the head sees a new number of rows at every step and
        stays eager.
        """
        compile_layers(self.model if self._head is None else self.model.base_model)


class TransformersDenoiser(ModelInTwoParts):
    """A `transformers` language model as a denoiser (`tokendiff.diffusion.interfaces.Denoiser`).

    The hidden states at position i are those that tell the token at position i, also of what was a
    causal model. Rows are padded at the right.

    Args:
        model: from AutoModelForMaskedLM; or from AutoModelForCausalLM with a config that
            `attend_both_ways` has changed.
        attention_kernel: what computes attention between isolated documents, with the same numbers
            to rounding; see `TransformersCausalDenoiser`. Rows that are one document each are left
            to the model's own attention.
        predicts_next: the model's state before a token tells it, as in an autoregressive model;
            `encode` moves each state to the token that it tells. The first token of a row, or of an
            isolated document, has none before it and keeps its own, which is trained for the token
            behind it; so losses, bounds and `DenoiserSource.begun` take the first token as given.

    Raises:
        ValueError: the model is still causal.
    """

    def __init__(
        self,
        model: Any,
        *,
        vocab_size: int,
        attention_kernel: AttentionKernel | None = None,
        predicts_next: bool = False,
    ) -> None:
        super().__init__(model, vocab_size=vocab_size)
        self.predicts_next = predicts_next
        model_type = model.config.model_type
        if model_type in CAUSAL_TYPES and getattr(model.config, "is_causal", True):
            raise ValueError(f"the {model_type} model is causal; build it with attend_both_ways")
        tiled_attention.register()
        self._kernel = attention_kernel
        self._own_attention = _own_attention(model)
        self.recorder: Recorder | None = None
        self._replays: Replays | None = None

    def replay_by(self, recorder: Recorder | None) -> None:
        """Replay passes without gradient from now on; for weights that stay where they are."""
        self.recorder = recorder
        self._replays = None if recorder is None else Replays(recorder)

    @property
    def is_time_conditioned(self) -> bool:
        return getattr(self.model.config, "is_time_conditioned", False)

    def encode(
        self, tokens: Tensor, is_valid: Tensor, time: Tensor, document: Tensor | None = None
    ) -> Tensor:
        if document is not None and bool((document != document[:, :1]).any()):
            inputs = self._isolating(document)
        else:
            inputs = self._hiding_padding(is_valid)
        condition = {"time": sent(time, self.device)} if self.is_time_conditioned else {}
        inputs = {"input_ids": sent(tokens, self.device), **inputs, **condition}
        if self._replays is None:
            (hidden,) = self._forward(inputs)
        else:
            (hidden,) = self._replays(self._forward, inputs, num_tokens=tokens.numel())
        return self._at_what_they_tell(hidden, document) if self.predicts_next else hidden

    def _forward(self, inputs: dict[str, Any]) -> list[Tensor]:
        encoder = self.model if self._head is None else self.model.base_model
        output = encoder(**inputs)
        return [output.logits if self._head is None else output.last_hidden_state]

    def new_memory(self, num_rows: int) -> "RaggedCache":
        """See `tokendiff.diffusion.interfaces.WindowedDenoiser`."""
        from tokendiff.models.ragged_cache import RaggedCache

        check_windows(self.model.config, origin="the model")
        layers = self.model.config.num_hidden_layers
        return RaggedCache(
            num_rows, num_layers=layers, device=self.model.device, recorder=self.recorder
        )

    def encode_window(
        self, tokens: Tensor, positions: Tensor, is_valid: Tensor, memory: Any, rows: Tensor
    ) -> Tensor:
        """See `tokendiff.diffusion.interfaces.WindowedDenoiser`."""
        if self.predicts_next:  # what tells the first of them is the state before it
            positions = torch.cat([(positions[:, :1] - 1).clamp(min=0), positions], dim=1)
        self._attend_by(self._own_attention)
        width = tokens.shape[1]
        memory.begin_within(rows, positions, width)
        is_seen = sent(is_valid, self.device)[:, None, None]
        is_seen = is_seen.expand(-1, 1, positions.shape[1], width)
        if self.model.config._attn_implementation == "eager":
            lowest = torch.finfo(self.model.dtype).min
            is_seen = torch.zeros_like(is_seen, dtype=self.model.dtype).masked_fill(
                ~is_seen, lowest
            )
        inputs = {
            "input_ids": sent(tokens.gather(1, positions), self.device),
            "attention_mask": is_seen,
            "position_ids": sent(positions, self.device),
        }

        def forward(given: dict[str, Any]) -> list[Tensor]:
            encoder = self.model.base_model
            output = encoder(**given, **cache_argument(encoder, memory), use_cache=True)
            return [output.last_hidden_state]

        (hidden,) = memory.run(forward, inputs)
        return hidden[:, :-1] if self.predicts_next else hidden

    def _at_what_they_tell(self, hidden: Tensor, document: Tensor | None) -> Tensor:
        """Hidden states [B, L, D], each moved one position to the right."""
        moved = torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
        if document is None:
            return moved
        document = sent(document, hidden.device)
        is_first = document != torch.cat([document[:, :1], document[:, :-1]], dim=1)
        return torch.where(is_first[..., None], hidden, moved)

    def _hiding_padding(self, is_valid: Tensor) -> dict[str, Any]:
        """What the model is given where rows are one document each."""
        self._attend_by(self._own_attention)
        # Packed rows are rarely padded, and attention without a mask is the faster kernel.
        if bool(is_valid.all()):
            return {"attention_mask": None}
        is_valid = sent(is_valid, self.device)
        if self._head is None or self._own_attention != "sdpa" or self.device.type == "cpu":
            return {"attention_mask": is_valid.to(torch.int64)}
        # Of a mask of rows transformers asks the device what is in it, in every pass; of a whole
        # one it does not. Padding sees itself: a query with nothing to see has no softmax.
        return under_rule(
            lambda b, q, kv: is_valid[b, kv] | (q == kv),
            "dense",
            batch_size=len(is_valid),
            length=is_valid.shape[1],
            device=self.device,
            window=self._window,
        )

    @property
    def _window(self) -> int | None:
        """How far layers see that do not see whole rows; None where all do."""
        config = self.model.config
        has_window = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        return config.sliding_window if has_window else None

    def _isolating(self, document: Tensor) -> dict[str, Any]:
        """What the model is given where rows hold several documents [B, L]."""
        config, document = self.model.config, sent(document, self.device)
        check_isolation(config, origin="the model")
        kernel = self._kernel or best_kernel(self.model, document.device)
        self._attend_by(IMPLEMENTATIONS[kernel])
        inputs = under_rule(
            whole_documents(document),
            kernel,
            batch_size=len(document),
            length=document.shape[1],
            device=document.device,
            window=self._window,
        )
        is_behind = config.model_type in _POSITIONS_BEHIND_PADDING
        first = config.pad_token_id + 1 if is_behind else 0
        return {"position_ids": positions_in_document(document) + first, **inputs}

    def _attend_by(self, implementation: str) -> None:
        """Set one of transformers' attention functions."""
        if implementation != self.model.config._attn_implementation:
            self.model.set_attn_implementation(implementation)
            setattr(self.model, _LEFT, (self._own_attention, implementation))

    def freeze_unused(self) -> list[str]:
        """Exclude from training what no logit depends on, such as a pooler; returns the names.

        DistributedDataParallel fails on a parameter that gets no gradient.
        """
        tokens = torch.arange(_PROBE_TOKENS)[None] % self.vocab_size
        with torch.enable_grad():  # also where a caller who only samples has turned it off
            logits = self.head(self.encode(tokens, torch.ones_like(tokens).bool(), torch.zeros(1)))
        nodes, used, seen = [logits.grad_fn], set(), set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            used.add(id(getattr(node, "variable", None)))  # of the nodes that accumulate gradients
            nodes += [following for following, _ in node.next_functions]
        unused = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and id(parameter) not in used
        }
        for parameter in unused.values():
            parameter.requires_grad_(False)
        return list(unused)


def _own_attention(model: Any) -> str:
    """The attention of a transformers model, also where another denoiser around the same model has
    left it with the one that isolates documents.
    """
    here: str = model.config._attn_implementation
    own, left = getattr(model, _LEFT, (here, here))
    return own if here == left else here
