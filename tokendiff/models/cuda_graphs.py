"""Forward passes that are recorded once and then replayed: CUDA graphs.

A pass of decoding reads a few tokens and launches hundreds of kernels, and to launch them takes
Python longer than it takes the card to run them. Passes with the same shapes come again and again.
One that has come a few times is recorded, and from then on all its kernels are launched at once.

A recording holds addresses: what a pass reads that is new each time is copied to where the recorded
pass reads it, and everything else, weights and caches, must stay where it is. So models are only
recorded where they do nothing but decode.
"""

import logging
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tokendiff.errors import is_out_of_memory, reason_of

logger = logging.getLogger(__name__)

Pass = Callable[[Any], list[Tensor]]
Replay = Callable[[], list[Tensor]]

# A pass is recorded when its shapes come up for this time. To record one took as long as three or
# four passes of a 0.6B model on an H200.
RECORDED_AT = 5
_MOST_TOKENS = 2048  # of a pass; with more of them the card is busy all the time anyway
_MOST_RECORDINGS = 32  # of one cache, or of one denoiser
_MOST_BYTES = 2**26  # of the inputs and results of one recording
_MOST_WITHOUT_ROOM = 3  # recordings that run out of memory, before a model gives up
# Of the spread of a result: transformers may take another kernel in a recording.
_TOLERANCE = 0.05


class Recorder:
    """Records the passes of one model, and of the draft beside it, on a CUDA device.

    A model whose passes cannot be recorded (one that asks the device for a number, say) decodes
    without CUDA graphs. One warning says so, and recording is not tried again. A recording that
    runs out of memory is tried again, a few times.

    Attributes:
        is_working: False once recording is not tried again.
        num_recorded: passes so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_working, self.num_recorded = True, 0
        self._num_without_room = 0
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._alive: weakref.WeakSet[Replay] = weakref.WeakSet()

    @classmethod
    def on(cls, device: torch.device) -> "Recorder | None":
        """None where passes are launched fast enough: on a CPU."""
        return cls(device) if device.type == "cuda" else None

    def record(self, run: Replay) -> Replay:
        """Record the kernels that `run` launches. The returned function launches them again, and
        returns the results of `run` in the same memory each time.
        """
        with torch.cuda.device(self.device):
            stream = self._stream = self._stream or torch.cuda.Stream()
            # Recordings never run at once, so their memory is shared. torch does not take up a pool
            # again whose recordings have all gone while one of its tensors is left
            # (https://github.com/vllm-project/vllm/issues/28426): the next recordings have another.
            alive = list(self._alive)  # and none of them goes before the new one is among them
            if not alive:
                self._pool = torch.cuda.graph_pool_handle()
            current = torch.cuda.current_stream()
            stream.wait_stream(current)
            try:
                # What libraries set up in their first call on a stream is not recorded. And what
                # waits for the device raises here: in the midst of a recording it would leave torch
                # unable to free memory (https://github.com/pytorch/pytorch/pull/180395).
                with torch.cuda.stream(stream), _waits_raise():
                    run()
            finally:
                current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # cuBLAS keeps memory for each stream, and torch frees that when any recording of the
            # stream goes (https://github.com/pytorch/pytorch/issues/193402). So a recording has it
            # in its own pool.
            torch._C._cuda_clearCublasWorkspaces()
            try:
                # A recording that fails leaves its stream the current one, so the outer block is
                # there to restore it. Other threads may use the device meanwhile.
                with (
                    torch.cuda.stream(stream),
                    torch.cuda.graph(
                        graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
                    ),
                ):
                    results = run()
            except BaseException:
                # A recording that fails leaves the generator waiting for its end.
                generator = torch.cuda.default_generators[torch.cuda.current_device()]
                generator.graphsafe_set_state(generator.clone_state())
                raise
            finally:
                torch._C._cuda_clearCublasWorkspaces()

        def replay() -> list[Tensor]:
            graph.replay()
            return results

        self._alive.add(replay)
        return replay

    def note_no_room(self, reason: str) -> None:
        """A recording ran out of memory. There may be more of it by the next time."""
        self._num_without_room += 1
        if self._num_without_room >= _MOST_WITHOUT_ROOM:
            self.give_up(reason)

    def give_up(self, reason: str) -> None:
        self.is_working = False
        logger.warning(
            "passes of this model are not replayed as CUDA graphs (%s); it decodes slower", reason
        )


@contextmanager
def _waits_raise() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@dataclass(frozen=True)
class _Recording:
    """
    Attributes:
        inputs: the tensors that the recorded pass reads.
    """

    inputs: list[Tensor]
    replay: Replay

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        for held, new in zip(self.inputs, inputs, strict=True):
            held.copy_(new)
        # The next replay writes where this one did.
        return [result.clone() for result in self.replay()]


class Replays:
    """The passes of one model over one cache, by their shapes."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._times: Counter[Hashable] = Counter()
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()

    def forget(self) -> None:
        """To be called when a tensor has moved that passes use and do not take as an input."""
        self._times.clear()
        self._recordings.clear()

    def __call__(
        self, run: Pass, inputs: Any, *, num_tokens: int, facts: tuple[Hashable, ...] = ()
    ) -> list[Tensor]:
        """`run(inputs)`, replayed where a pass of these shapes was recorded.

        Args:
            run: may write to tensors of its own, and writes the same when it is called again.
            inputs: tensors on the device, and numbers and None, in dicts, lists and tuples.
            num_tokens: of the pass.
            facts: what else decides what `run` does.
        """
        if not self._recorder.is_working:
            self.forget()  # and so give back what they hold
            return run(inputs)
        leaves, structure = pytree.tree_flatten(inputs)
        if not _can_be_recorded(leaves, num_tokens):
            return run(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        device = self._recorder.device.type
        key = (
            facts,
            structure,
            tuple(
                (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf), leaf)
                for leaf in leaves
            ),
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        )
        is_recorded = key in self._recordings
        try:
            results = self._replayed(key, tensors) if is_recorded else run(inputs)
        except RuntimeError as error:
            if not self._recordings or not is_out_of_memory(error):
                raise
            results = None
        if results is None:
            self.forget()  # so that the pass has the memory of the recordings
            return run(inputs)
        if is_recorded:
            return results
        self._times[key] += 1
        is_due = self._times[key] >= RECORDED_AT
        is_small = sum(tensor.nbytes for tensor in [*tensors, *results]) <= _MOST_BYTES
        if is_due and is_small and not self._record(key, run, leaves, structure, results):
            del results
            self.forget()
            # A rejected recording may have written wrong keys. This overwrites them.
            return run(inputs)
        return results

    def _replayed(self, key: Hashable, tensors: list[Tensor]) -> list[Tensor]:
        self._recordings.move_to_end(key)
        return self._recordings[key](tensors)

    def _record(
        self,
        key: Hashable,
        run: Pass,
        leaves: list[Any],
        structure: Any,
        results: list[Tensor],
    ) -> bool:
        """Record a pass that gave `results`, and see that it gives them again."""

        def run_once() -> list[Tensor]:
            # A weight that autocast has cast and kept would be gone when the pass is replayed.
            was_kept = torch.is_autocast_cache_enabled()
            torch.set_autocast_cache_enabled(False)
            try:
                return run(inputs)
            finally:
                torch.set_autocast_cache_enabled(was_kept)

        try:
            held = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            inputs = pytree.tree_unflatten(held, structure)
            replay = self._recorder.record(run_once)
            is_same = all(map(_are_close, replay(), results))
        except RuntimeError as error:  # of CUDA, which takes memory of its own for a recording
            is_full = is_out_of_memory(error)
            (self._recorder.note_no_room if is_full else self._recorder.give_up)(reason_of(error))
            return False
        if not is_same:
            self._recorder.give_up("a replayed pass gave other numbers")
            return False
        self._recorder.num_recorded += 1
        if len(self._recordings) == _MOST_RECORDINGS:
            oldest, _ = self._recordings.popitem(last=False)
            del self._times[oldest]
        tensors = [leaf for leaf in held if isinstance(leaf, Tensor)]
        self._recordings[key] = _Recording(inputs=tensors, replay=replay)
        return True


def _can_be_recorded(leaves: list[Any], num_tokens: int) -> bool:
    others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    return (
        num_tokens <= _MOST_TOKENS
        and not torch.is_grad_enabled()
        and all(leaf is None or isinstance(leaf, bool | int | float) for leaf in others)
    )


def _are_close(found: Tensor, expected: Tensor) -> bool:
    """Whether the vectors at all places are the same, to rounding."""
    found, expected = found.float().nan_to_num(), expected.float().nan_to_num()
    error = (found - expected).square().mean(-1).sqrt().max()
    return bool(error <= _TOLERANCE * expected.std(correction=0) + 1e-6)
