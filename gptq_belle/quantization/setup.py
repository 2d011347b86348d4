"""What a job begins with: the source held against the settings, and the calibration rows; nothing is written yet."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gptq_belle.checkpoint.adapter import open_source
from gptq_belle.checkpoint.directory import load_tokenizer
from gptq_belle.checkpoint.hub import model_directory
from gptq_belle.config import QuantConfig
from gptq_belle.overrides import resolve
from gptq_belle.quantization.activations import Activations, Streams
from gptq_belle.quantization.calibration import Calibration, calibration_rows, check_enough
from gptq_belle.quantization.checks import check_complete, check_sizes, check_source, widest
from gptq_belle.quantization.journal import FULL
from gptq_belle.quantization.moments import held_out_rows
from gptq_belle.quantization.stream import BlockStream
from gptq_belle.runtime.chat import choose_style, detect_style
from gptq_belle.runtime.loader import resolve_device


@dataclass(frozen=True, slots=True)
class Setup:
    """A job that could begin.

    Attributes:
        stream: the source's blocks.
        config: the settings, their overrides resolved.
        tokenizer: the source's.
        tokens: (rows, T) int64 to calibrate on; None for rtn.
        calibration: what the report says of them.
    """

    stream: BlockStream
    config: QuantConfig
    tokenizer: PreTrainedTokenizerBase
    tokens: Tensor | None = None
    calibration: dict[str, Any] | None = None

    @property
    def held_out(self) -> int:
        """How many of the rows, the last ones, no Hessian sees."""
        return 0 if self.tokens is None else held_out_rows(*self.tokens.shape, share=self.config.recipe.held_out)

    def streams(self, partial: Path, *, spill: bool) -> Streams:
        """Where the calibration rows will be kept, in the models that the recipe follows."""
        full = Activations(partial, self.shapes, spill=spill, model=FULL) if self.config.recipe.alpha else None
        seen = 0 if self.tokens is None else len(self.tokens) - self.held_out
        return Streams(Activations(partial, self.shapes, spill=spill), full, seen)

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """Of the activations (batch, T, hidden_size), batch by batch."""
        if self.tokens is None:
            return []
        size = self.stream.model.config.hidden_size
        return [(*batch.shape, size) for batch in self.stream.batches(self.tokens)]


def set_up(source: str | Path, config: QuantConfig, calibration: Calibration, device: str,
           lora: str | Path | None = None, prompt_style: str | None = None) -> Setup:
    """Read and check everything that a job needs, but the weights.

    Raises:
        UsageError, InputError, HardwareError: as `quantize_checkpoint`.
    """
    reader = open_source(model_directory(source), lora)
    check_source(reader)
    choose_style(reader.config, prompt_style)
    stream = BlockStream(reader, resolve_device(device))
    config = resolve(config, stream.arch, stream.count)
    check_complete(stream)
    check_sizes(stream, config)
    tokenizer = load_tokenizer(reader.path)
    if config.method == "rtn":
        return Setup(stream, config, tokenizer)
    style = detect_style(reader.config, getattr(tokenizer, "chat_template", None))
    tokens, used = calibration_rows(calibration, tokenizer, style, stream.context)
    if not calibration.allow_short:
        check_enough(tokens, *widest(stream))
    return Setup(stream, config, tokenizer, tokens, calibration.describe(tokens, used))
