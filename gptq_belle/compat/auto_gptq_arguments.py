"""AutoGPTQ's settings, arguments and tokenized examples, converted to those of gptq_belle."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_belle.checkpoint.hub import resolve_model_path
from gptq_belle.checkpoint.packed_reader import raw_quantization_config, read_quantization
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.errors import InputError, UsageError
from gptq_belle.quantization.calibration.rows import Calibration
from gptq_belle.quantization.config import QuantConfig

Example = Mapping[str, Sequence[int] | Tensor]  # input_ids and, where there is padding, attention_mask
CONFIG_FILE = "quantize_config.json"
IGNORED = frozenset((  # kernels, loading, the hub
    "use_triton", "use_tritonv2", "use_cuda_fp16", "warmup_triton", "autotune_warmup_after_quantized",
    "inject_fused_attention", "inject_fused_mlp", "disable_exllama", "disable_exllamav2", "use_marlin", "use_qigen",
    "max_memory", "low_cpu_mem_usage", "use_safetensors", "trainable", "cache_examples_on_gpu", "batch_size",
    "offload_folder", "offload_buffers", "use_cache", "strict", "safetensors_metadata", "trust_remote_code",
    "cache_dir", "force_download", "proxies", "resume_download", "local_files_only", "use_auth_token", "token",
    "_raise_exceptions_for_missing_entries", "_commit_hash"))
SPREADING_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_arguments(call: str, given: Mapping[str, Any]) -> None:
    """Warn once about arguments without effect, except for those that are None or False.

    Raises:
        UsageError: an argument that is unknown or not supported.
    """
    for name, value in given.items():
        if name not in IGNORED and value is not None:
            raise UsageError(f"{call}: the argument {name}={value!r} is not supported",
                             "Omit it; gptq_belle's own interface is described in its README.")
    ignored = [name for name, value in given.items() if name in IGNORED and value not in (None, False)]
    if ignored:
        warnings.warn(f"{call} ignores {', '.join(ignored)}: kernels, memory and batches are chosen automatically, the "
                      "hub is configured by environment variables, and code of a model is never run", stacklevel=3)


def device_name(device: str | int | torch.device | None, device_map: str | Mapping[str, Any] | None) -> str:
    """The device of AutoGPTQ's two arguments, in the form of `resolve_device`.

    Raises:
        UsageError: device_map distributes the model over several devices.
    """
    if device is None and isinstance(device_map, Mapping):
        devices = {device_name(place, None) for place in device_map.values()}
        if len(devices) > 1:
            raise UsageError(f"device_map distributes the model over {', '.join(sorted(devices))}",
                             "A packed model runs on one device: give device=\"cuda:0\" or \"cpu\", or omit it.")
        device = next(iter(devices), None)
    elif device is None and isinstance(device_map, str) and device_map not in SPREADING_MAPS:
        device = device_map
    if device is None:
        return "auto"
    return f"cuda:{device}" if isinstance(device, int) else str(device)


@dataclass
class BaseQuantizeConfig:
    """AutoGPTQ's settings with its defaults (act-order, one group per output channel); validated by `QuantConfig`."""

    bits: int = 4
    group_size: int = -1
    damp_percent: float = 0.01
    desc_act: bool = True
    static_groups: bool = False
    sym: bool = True
    true_sequential: bool = True
    is_marlin_format: bool = False
    model_name_or_path: str | None = None
    model_file_base_name: str | None = None
    awq_gemm_checkpoint: bool | None = False

    def to_quant_config(self) -> QuantConfig:
        """The same settings for `quantize_checkpoint`.

        Raises:
            UsageError: a value is not supported.
        """
        unsupported = {"static_groups": self.static_groups and self.desc_act, "is_marlin_format": self.is_marlin_format,
                       "awq_gemm_checkpoint": self.awq_gemm_checkpoint, "true_sequential": not self.true_sequential}
        for name in (name for name, refused in unsupported.items() if refused):
            raise UsageError(f"the setting {name}={getattr(self, name)!r} is not supported", "Omit it.")
        return QuantConfig(self.bits, self.group_size, self.sym, self.desc_act, self.damp_percent)

    def to_dict(self) -> dict[str, Any]:
        """The settings as AutoGPTQ writes them."""
        return {key: value for key, value in asdict(self).items() if key != "awq_gemm_checkpoint"} | {
            "quant_method": "gptq"}

    def save_pretrained(self, save_dir: str | Path, **_: Any) -> None:
        """Write quantize_config.json."""
        (Path(save_dir) / CONFIG_FILE).write_text(json.dumps(self.to_dict(), indent=2), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, save_dir: str | Path, **kwargs: Any) -> "BaseQuantizeConfig":
        """Read the settings of a quantized model: a directory or a hub id.

        Raises:
            InputError: the model is not quantized, or not by GPTQ.
        """
        check_arguments("BaseQuantizeConfig.from_pretrained", kwargs)
        reader = CheckpointReader(resolve_model_path(save_dir))
        settings = raw_quantization_config(reader)
        if settings is None or read_quantization(reader) is None:
            raise InputError(f"{save_dir} has no quantization settings", f"Give a directory with {CONFIG_FILE}.")
        names = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in settings.items() if key in names})


def calibration_of(examples: Sequence[Example], config: Any) -> Calibration:
    """Calibration rows from examples; short text is allowed, as by AutoGPTQ.

    Args:
        examples: see `BaseGPTQForCausalLM.quantize`.
        config: transformers' configuration of the model, for its end-of-sequence token.
    Raises:
        InputError: there are no examples, or one is not tokenized.
    """
    eos = config.eos_token_id
    rows = token_rows(examples, eos[0] if isinstance(eos, list) else eos)
    return Calibration(rows, rows.shape[0], rows.shape[1], allow_short=True)


def token_rows(examples: Sequence[Example], eos: int | None) -> Tensor:
    """Pack examples into rows (rows, T) int64.

    Examples of equal length become the rows unchanged. Otherwise they are concatenated with eos between them and split
    into rows of the longest example's length; an incomplete last row is dropped.
    """
    documents = [document for number, example in enumerate(examples) for document in _documents(number, example)]
    if not documents:
        raise InputError("there are no examples with tokens to calibrate on", "Give quantize() a list of examples.")
    length = max(map(len, documents))
    if all(len(document) == length for document in documents):
        return torch.stack(documents)
    end = [] if eos is None else [eos]
    stream = torch.cat([document if document[-1:].tolist() == end else torch.cat([document, torch.tensor(end).long()])
                        for document in documents])
    return stream[: len(stream) // length * length].view(-1, length)


def _documents(number: int, example: Example) -> list[Tensor]:
    """The rows of one example without padding."""
    try:
        ids = torch.atleast_2d(torch.as_tensor(example["input_ids"]))
        mask = torch.atleast_2d(torch.as_tensor(example.get("attention_mask", torch.ones_like(ids)))).bool()
        if ids.is_floating_point() or ids.dim() != 2 or ids.shape != mask.shape:
            raise ValueError(f"input_ids {ids.dtype} {tuple(ids.shape)}, attention_mask {tuple(mask.shape)}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"example {number} is not tokenized text: {error}",
                         "An example is the output of a tokenizer: input_ids and attention_mask.") from error
    rows = [row[kept].long().cpu() for row, kept in zip(ids, mask, strict=True)]
    return [row for row in rows if len(row)]
