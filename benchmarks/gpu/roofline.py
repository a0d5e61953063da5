"""Operations and bytes of a pass, counted from shapes: what a machine could reach at best."""

from dataclasses import dataclass

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.models import Shape

# Bytes that a step of AdamW moves for each weight: weight, gradient and two moments in float32 are
# read, and all but the gradient are written.
_STEP_BYTES = 4 * 4 + 3 * 4


def layer_weights(shape: Shape) -> int:
    """Of the matrices of all layers."""
    width, heads = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    attention = 2 * width * heads + 2 * width * keys
    return shape.num_hidden_layers * (attention + 3 * width * shape.intermediate_size)


def head_weights(shape: Shape) -> int:
    return shape.vocab_size * shape.hidden_size


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What a forward pass computes.

    Attributes:
        tokens: that go through the layers.
        pairs: of a query and a key that it sees, of one head and layer.
        head_tokens: that have logits.
    """

    shape: Shape
    tokens: float
    pairs: float
    head_tokens: float

    @property
    def operations(self) -> float:
        """Multiplications and additions; a product of matrices has two for each of its terms."""
        shape = self.shape
        scores = 4.0 * self.pairs * shape.num_attention_heads * shape.head_dim
        return (
            2.0 * layer_weights(shape) * self.tokens
            + shape.num_hidden_layers * scores
            + 2.0 * head_weights(shape) * self.head_tokens
        )


def whole_pairs(length: int) -> float:
    return float(length * length)


def causal_pairs(length: int) -> float:
    return length * (length + 1) / 2


def block_diffusion_pairs(length: int, block_length: int) -> float:
    """Of rows `[x_t ; x_0]`: block b of either half sees b earlier clean blocks and itself."""
    return float(length * (length + block_length))


def training_seconds(forward: Pass, machine: Machine) -> float:
    """Of one step at the machine's peaks: three times the operations of the forward pass, then the
    optimiser.
    """
    operations, bytes_per_second = machine.peaks
    weights = layer_weights(forward.shape) + head_weights(forward.shape)
    return 3.0 * forward.operations / operations + _STEP_BYTES * weights / bytes_per_second


def pass_seconds(forward: Pass, machine: Machine, *, num_bytes: float) -> float:
    """Of one pass of decoding at the machine's peaks, whichever of the two is the limit."""
    operations, bytes_per_second = machine.peaks
    return max(forward.operations / operations, num_bytes / bytes_per_second)


def cache_bytes(shape: Shape, *, num_rows: int, context: float) -> float:
    """Of the keys and values of so many tokens in bf16, read once."""
    per_token = 2 * 2 * shape.num_key_value_heads * shape.head_dim * shape.num_hidden_layers
    return per_token * num_rows * context
