"""The inputs of a quantization job, validated: source, settings and calibration rows; nothing is written yet."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gptq_belle.checkpoint.hub import resolve_model_path
from gptq_belle.checkpoint.lora_adapter import open_source
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.checkpoint.tokenizer_files import copied_files, load_tokenizer, needs_sentencepiece
from gptq_belle.checkpoint.validation import check_model, size_problems
from gptq_belle.common.devices import resolve_device
from gptq_belle.errors import InputError, UsageError
from gptq_belle.models.dimensions import dimensions
from gptq_belle.prompts.conversation import chat_format
from gptq_belle.prompts.styles import set_prompt_style
from gptq_belle.quantization.activations import ActivationPair, Activations
from gptq_belle.quantization.block_stream import BlockStream
from gptq_belle.quantization.calibration.rows import Calibration, calibration_rows, check_distinct, check_enough
from gptq_belle.quantization.config import AUTO, QuantConfig
from gptq_belle.quantization.group_sizes import fitting_group_sizes, group_size_error
from gptq_belle.quantization.journal import FULL
from gptq_belle.quantization.overrides import resolve_overrides
from gptq_belle.quantization.reader_settings import settings_for_reader
from gptq_belle.quantization.report import LOGGER
from gptq_belle.quantization.stage_hessians import held_out_rows

EXACT_NOTE = ("pieces of tokenizer.model share a score, which no tokenizer.json can express: gptq_belle cuts text as "
              "SentencePiece does, programs that read tokenizer.json get other token ids for some texts")


def check_source(reader: CheckpointReader) -> None:
    """Raise InputError for a model that is already quantized."""
    if reader.config.get("quantization_config") is not None or reader.packed_linear_names:
        raise InputError(f"{reader.path} is already quantized", "Give the full-precision model.")


def check_sizes(stream: BlockStream, config: QuantConfig) -> None:
    """Refuse layers whose sizes the settings or the format cannot hold.

    Raises:
        UsageError: the group size does not divide a layer's inputs.
        InputError: a layer's sizes do not fill whole words.
    """
    for index, (linear, shape) in product(range(stream.count), stream.linear_shapes.items()):
        name = f"{stream.arch.blocks}.{index}.{linear}"
        own = config.for_linear(name)
        if own is None:
            continue
        if own.group_size != -1 and shape.in_features % own.group_size:
            fitting = fitting_group_sizes(_widths(stream, config))
            raise group_size_error(own.group_size, shape.in_features, name, fitting)
        for problem in size_problems({linear: shape}):
            raise problem


def with_group_size(config: QuantConfig, stream: BlockStream) -> QuantConfig:
    """The settings with group size "auto" replaced by the largest one that fits all linears."""
    if config.group_size != AUTO:
        return config
    return replace(config, group_size=fitting_group_sizes(_widths(stream, config))[0])


def _widths(stream: BlockStream, config: QuantConfig) -> Iterator[int]:
    """Inputs of the linears whose group size no override sets."""
    for index, (linear, shape) in product(range(stream.count), stream.linear_shapes.items()):
        own = config.for_linear(f"{stream.arch.blocks}.{index}.{linear}")
        if own is not None and own.group_size == config.group_size:
            yield shape.in_features


@dataclass(frozen=True, slots=True)
class QuantizationJob:
    """The validated inputs of a job."""

    stream: BlockStream
    config: QuantConfig  # the settings, with resolved overrides
    tokenizer: PreTrainedTokenizerBase
    tokens: Tensor | None = None  # calibration rows (rows, T) int64; None for rtn
    calibration: dict[str, Any] | None = None  # their description in the report (`Calibration.describe`)
    ignored: Sequence[str] = ()  # names of the source's tensors that the model does not need; they are not written
    notes: Sequence[str] = ()  # remarks on the calibration data, for the report

    @property
    def held_out(self) -> int:
        """Number of rows, the last ones, that are held out of the Hessians."""
        every = self.config.techniques.held_out_every
        return 0 if self.tokens is None else held_out_rows(*self.tokens.shape, every=every)

    def activations(self, partial: Path, *, spill: bool) -> ActivationPair:
        """The store of the calibration activations, for each model that the techniques need."""
        needed = self.config.techniques.full_precision
        full = Activations(partial, self.shapes, spill=spill, model=FULL) if needed else None
        hessian_rows = 0 if self.tokens is None else len(self.tokens) - self.held_out
        return ActivationPair(Activations(partial, self.shapes, spill=spill), full, hessian_rows)

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """Shape (batch, T, hidden_size) of each batch of activations."""
        if self.tokens is None:
            return []
        size = self.stream.model.config.hidden_size
        return [(*batch.shape, size) for batch in self.stream.batches(self.tokens)]


def prepare_job(source: str | Path, config: QuantConfig, calibration: Calibration, device: str,
                lora: str | Path | None = None, prompt_style: str | None = None) -> QuantizationJob:
    """Read and validate everything that a job needs except the weights.

    Raises:
        UsageError, InputError, HardwareError: as `quantize_checkpoint`.
    """
    reader = open_source(resolve_model_path(source), lora)
    check_source(reader)
    ignored = check_model(reader, None)
    set_prompt_style(reader.config, prompt_style)
    stream = BlockStream(reader, resolve_device(device))
    if config.head_bits != 16 and not stream.arch.family.native:
        raise UsageError(f"{reader.config['model_type']} runs with transformers, which reads no packed lm_head",
                         "Leave --packed-head-only out.")
    config, costs = settings_for_reader(config, dimensions(reader.config))
    config = with_group_size(resolve_overrides(config, stream.arch, stream.count), stream)
    check_sizes(stream, config)
    tokenizer = load_tokenizer(reader.path)
    style = chat_format(reader.config, tokenizer).name
    copied_files(reader.path)  # refuses what could not be written at the end
    remarks = [*costs, EXACT_NOTE] if needs_sentencepiece(tokenizer) else costs
    for note in remarks:
        LOGGER.warning(note)
    if config.method == "rtn":
        return QuantizationJob(stream, config, tokenizer, ignored=ignored, notes=remarks)
    tokens, used, notes = calibration_rows(calibration, tokenizer, style, stream.context)
    check_distinct(tokens)
    if not calibration.allow_short:
        widest = max(stream.linear_shapes, key=lambda name: stream.linear_shapes[name].in_features)
        check_enough(tokens, stream.linear_shapes[widest].in_features, widest)
    for note in notes:
        LOGGER.warning(note)
    return QuantizationJob(stream, config, tokenizer, tokens, calibration.describe(tokens, used), ignored,
                           [*remarks, *notes])
