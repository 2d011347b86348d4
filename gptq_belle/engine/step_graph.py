"""Record a decode step on a CPU for a fixed number of rows, and replay it in one native call."""

from collections.abc import Sequence

from torch import Tensor

from gptq_belle.engine.attention import NativeDecodeAttention
from gptq_belle.engine.bloom import Bloom
from gptq_belle.engine.llama import Llama
from gptq_belle.kernels.call_recorder import CallRecorder

MAX_GRAPH_ROWS = 8  # with more rows the overhead of Python is not measurable, and each graph needs its own memory


class StepGraph:
    """The recorded calls of one decode step through all blocks. Creating it runs the step once.

    Args:
        decoder: decoder whose linears are all native.
        x: (M, width) float32, inputs of the first block.
        attention: attention of the step.
    Attributes:
        hidden: (M, width) float32, outputs of the last block; the next step overwrites them.
        recorder: the recorded calls.
    """

    def __init__(self, decoder: Bloom | Llama, x: Tensor, attention: NativeDecodeAttention) -> None:
        self._x, self._attention, self.recorder = x.clone(), attention, CallRecorder()
        with self.recorder.recording():
            self.hidden = decoder.run_blocks(self._x, attention)

    def replay(self, x: Tensor, slots: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Run the step for other tokens and slots, and return `hidden`.

        Raises:
            ValueError: the number of rows differs.
        """
        if x.shape != self._x.shape:
            raise ValueError(f"the recorded step has {len(self._x)} rows, not {len(x)}")
        self._x.copy_(x)
        self._attention.update(slots, lengths)
        self.recorder.replay()
        return self.hidden
