"""A step of decoding on a CPU, recorded for a number of rows and made again in one native call."""

from collections.abc import Sequence

from torch import Tensor

from gptq_belle.engine.attention import NativeDecode
from gptq_belle.engine.bloom import Bloom
from gptq_belle.engine.llama import Llama
from gptq_belle.kernels.call_recorder import CallRecorder

MOST_ROWS = 8  # with more, a step takes so long that what Python costs does not show; each needs memory of its own


class Recorded:
    """A step through all blocks. Making one does the step.

    Args:
        decoder: every part of whose blocks is native.
        x: (M, width) float32, what enters the first block.
        attend: of the step.
    Attributes:
        hidden: (M, width), what left the last block; the next step writes over it.
        recorder: the calls.
    """

    def __init__(self, decoder: Bloom | Llama, x: Tensor, attend: NativeDecode) -> None:
        self._x, self._attend, self.recorder = x.clone(), attend, CallRecorder()
        with self.recorder.recording():
            self.hidden = decoder.through(self._x, attend)

    def again(self, x: Tensor, slots: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """The step for other tokens in other slots: `hidden`. Raises ValueError for another number of rows."""
        if x.shape != self._x.shape:
            raise ValueError(f"a step of {len(self._x)} rows was recorded, not of {len(x)}")
        self._x.copy_(x)
        self._attend.move(slots, lengths)
        self.recorder.replay()
        return self.hidden
