"""The inputs of a quantization job, validated: source, settings and calibration rows; nothing is written yet."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gptq_belle.checkpoint.hub import resolve_model_path
from gptq_belle.checkpoint.lora_adapter import open_source
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.checkpoint.tokenizer_files import load_tokenizer
from gptq_belle.common.devices import resolve_device
from gptq_belle.errors import InputError, UsageError
from gptq_belle.formats.quantize_config import WRONG_CONFIG
from gptq_belle.models.architectures import LM_HEAD
from gptq_belle.prompts.styles import detect_style, set_prompt_style
from gptq_belle.quantization.activations import ActivationPair, Activations
from gptq_belle.quantization.block_stream import BlockStream
from gptq_belle.quantization.calibration import Calibration, calibration_rows, check_enough
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.journal import FULL
from gptq_belle.quantization.overrides import resolve_overrides
from gptq_belle.quantization.stage_hessians import held_out_rows


def check_source(reader: CheckpointReader) -> None:
    """Refuse a model that is quantized already.

    Raises:
        InputError: it is.
    """
    if "quantization_config" in reader.config or reader.packed_linear_names:
        raise InputError(f"{reader.path} is quantized already", "Give the full-precision model.")


def check_complete(stream: BlockStream) -> None:
    """Refuse files that hold fewer or more blocks than config.json speaks of, or lack one of the model's tensors.

    From headers alone, so that no time is lost, and no block is left out in silence.

    Raises:
        InputError: they do; a tensor is named.
    """
    prefix, names = f"{stream.arch.blocks}.", stream.embeddings_and_norms()
    names += [f"{prefix}{index}.{name}" for index in range(stream.count)
              for name, _ in stream.blocks.get_submodule(str(index)).named_parameters()]
    if not stream.model.config.tie_word_embeddings:
        names.append(f"{LM_HEAD}.weight")
    for name in names:
        stream.reader.shape(name)  # which says what it lacks
    for name in stream.reader:
        index = name.removeprefix(prefix).partition(".")[0]
        if name.startswith(prefix) and index.isdecimal() and int(index) >= stream.count:
            raise InputError(f"{stream.reader.path} holds {name}, where config.json speaks of {stream.count} blocks",
                             WRONG_CONFIG)


def check_sizes(stream: BlockStream, config: QuantConfig) -> None:
    """Refuse layers whose sizes the settings or the format cannot hold.

    Raises:
        UsageError: the group size does not divide a layer's inputs.
        InputError: a layer's sizes do not fill whole words.
    """
    shapes = [(f"{stream.arch.blocks}.{index}.{name}", shape) for index in range(stream.count)
              for name, shape in stream.linear_shapes.items()]
    for name, (k, n) in shapes:
        own = config.of(name)
        if own is not None and own.group_size != -1 and k % own.group_size:
            raise UsageError(f"group size {own.group_size} does not divide the {k} inputs of {name}",
                             "Choose a group size of 32, 64 or 128 that does, or -1 for one group per output channel.")
        if own is not None and (k % 32 or n % 32):
            raise InputError(f"{name} has {k} inputs and {n} outputs, and packing needs multiples of 32",
                             "The GPTQ format cannot hold models of such sizes.")


@dataclass(frozen=True, slots=True)
class QuantizationJob:
    """The validated inputs of a job.

    Attributes:
        stream: the source's blocks.
        config: the settings, with resolved overrides.
        tokenizer: the source's.
        tokens: calibration rows (rows, T) int64; None for rtn.
        calibration: their description in the report (`Calibration.describe`).
    """

    stream: BlockStream
    config: QuantConfig
    tokenizer: PreTrainedTokenizerBase
    tokens: Tensor | None = None
    calibration: dict[str, Any] | None = None

    @property
    def held_out(self) -> int:
        """Number of rows, the last ones, that are held out of the Hessians."""
        every = self.config.techniques.held_out_every
        return 0 if self.tokens is None else held_out_rows(*self.tokens.shape, every=every)

    def activations(self, partial: Path, *, spill: bool) -> ActivationPair:
        """The store of the calibration activations, for each model that the techniques need."""
        full = Activations(partial, self.shapes, spill=spill, model=FULL) if self.config.techniques.alpha else None
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
    set_prompt_style(reader.config, prompt_style)
    stream = BlockStream(reader, resolve_device(device))
    config = resolve_overrides(config, stream.arch, stream.count)
    check_complete(stream)
    check_sizes(stream, config)
    tokenizer = load_tokenizer(reader.path)
    if config.method == "rtn":
        return QuantizationJob(stream, config, tokenizer)
    style = detect_style(reader.config, getattr(tokenizer, "chat_template", None))
    tokens, used = calibration_rows(calibration, tokenizer, style, stream.context)
    if not calibration.allow_short:
        widest = max(stream.linear_shapes, key=lambda name: stream.linear_shapes[name].in_features)
        check_enough(tokens, stream.linear_shapes[widest].in_features, widest)
    return QuantizationJob(stream, config, tokenizer, tokens, calibration.describe(tokens, used))
