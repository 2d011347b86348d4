"""AutoGPTQ's settings, arguments and tokenized examples, in terms of this program."""

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
from gptq_belle.quantization.calibration import Calibration
from gptq_belle.quantization.config import QuantConfig

KERNELS = ("use_triton", "use_tritonv2", "use_cuda_fp16", "warmup_triton", "autotune_warmup_after_quantized",
           "inject_fused_attention", "inject_fused_mlp", "disable_exllama", "disable_exllamav2", "use_marlin",
           "use_qigen")
LOADING = ("max_memory", "low_cpu_mem_usage", "use_safetensors", "trainable", "cache_examples_on_gpu", "batch_size",
           "offload_folder", "offload_buffers", "use_cache", "strict", "safetensors_metadata")
HUB = ("cache_dir", "force_download", "proxies", "resume_download", "local_files_only", "use_auth_token", "token",
       "_raise_exceptions_for_missing_entries", "_commit_hash")
REASONS = {  # of every argument that means nothing here
    **dict.fromkeys(KERNELS, "the kernel is chosen for the machine, see gptq-belle doctor"),
    **dict.fromkeys(LOADING, "memory, batches and file types are seen to without it"),
    **dict.fromkeys(HUB, "the hub's own environment variables say that"),
    "trust_remote_code": "no code that comes with a model is ever run",
}
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")


def check_rest(call: str, given: Mapping[str, Any]) -> None:
    """Take note of arguments that mean nothing here, in one warning; ones that are left at None or False are no news.

    Raises:
        UsageError: an argument that is not known, or means something that is not supported.
    """
    known = {name: REASONS[name] for name, value in given.items() if name in REASONS and value not in (None, False)}
    for name, value in given.items():
        if name not in REASONS and value is not None:
            raise UsageError(f"{call}: the argument {name}={value!r} is not supported",
                             "Leave it out; gptq_belle's own interface is described in its README.")
    if known:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in known.items())
        warnings.warn(f"{call} ignores arguments ({reasons})", stacklevel=3)


def device_name(device: str | int | torch.device | None, device_map: str | Mapping[str, Any] | None) -> str:
    """The one device that AutoGPTQ's two arguments come to, as `resolve_device` takes it.

    Raises:
        UsageError: a map that spreads the model over several devices.
    """
    if device is None and isinstance(device_map, Mapping):
        places = {device_name(place, None) for place in device_map.values()}
        if len(places) > 1:
            raise UsageError(f"device_map spreads the model over {', '.join(sorted(places))}",
                             "A packed model runs on one device: give device=\"cuda:0\", \"cpu\", or leave it out.")
        device = next(iter(places), None)
    elif device is None and isinstance(device_map, str):
        device = None if device_map in SPREAD else device_map
    if device is None:
        return "auto"
    return f"cuda:{device}" if isinstance(device, int) else str(device)


CONFIG = "quantize_config.json"


@dataclass
class BaseQuantizeConfig:
    """AutoGPTQ's settings, with its defaults (act-order, and one group a row). `QuantConfig` checks them."""

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

    def settings(self) -> QuantConfig:
        """The same in this program's words.

        Raises:
            UsageError: a value that is not supported; it is named.
        """
        unsupported = {"static_groups": self.static_groups and self.desc_act, "is_marlin_format": self.is_marlin_format,
                       "awq_gemm_checkpoint": self.awq_gemm_checkpoint, "true_sequential": not self.true_sequential}
        for name, asked in unsupported.items():
            if asked:
                raise UsageError(f"{name}={getattr(self, name)!r} of the settings is not supported", "Leave it out.")
        return QuantConfig(bits=self.bits, group_size=self.group_size, sym=self.sym, act_order=self.desc_act,
                           damp=self.damp_percent)

    def to_dict(self) -> dict[str, Any]:
        """As AutoGPTQ writes it."""
        return {key: value for key, value in asdict(self).items() if key != "awq_gemm_checkpoint"} | {
            "quant_method": "gptq"}

    def save_pretrained(self, save_dir: str | Path, **_: Any) -> None:
        """Write quantize_config.json."""
        (Path(save_dir) / CONFIG).write_text(json.dumps(self.to_dict(), indent=2), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, save_dir: str | Path, **kwargs: Any) -> "BaseQuantizeConfig":
        """What a directory or a repository on the hub states.

        Raises:
            InputError: nothing, or another method.
        """
        check_rest("BaseQuantizeConfig.from_pretrained", kwargs)
        reader = CheckpointReader(resolve_model_path(save_dir))
        stated = raw_quantization_config(reader)
        if stated is None or read_quantization(reader) is None:
            raise InputError(f"{save_dir} states no quantization", f"Give a folder with {CONFIG}.")
        names = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in stated.items() if key in names})


Example = Mapping[str, Sequence[int] | Tensor]


def calibration(examples: Sequence[Example], config: Any) -> Calibration:
    """Rows of the examples' tokens; little text is accepted, as AutoGPTQ does.

    Args:
        examples: see `BaseGPTQForCausalLM.quantize`.
        config: transformers' configuration of the model, for its end-of-sequence token.
    Raises:
        InputError: there are none, or one is not token ids.
    """
    eos = config.eos_token_id
    rows = token_rows(examples, eos[0] if isinstance(eos, list) else eos)
    return Calibration(rows, rows.shape[0], rows.shape[1], allow_short=True)


def token_rows(examples: Sequence[Example], eos: int | None) -> Tensor:
    """(rows, T) int64: the examples themselves where all are of one length; else packed, eos between them, T the
    longest one's length, and what fills no row left out."""
    documents = [document for number, example in enumerate(examples) for document in _documents(number, example)]
    if not documents:
        raise InputError("there are no examples with tokens to calibrate on", "Give quantize() a list of examples.")
    length = max(len(document) for document in documents)
    if all(len(document) == length for document in documents):
        return torch.stack(documents)
    stream = torch.cat([_ended(document, eos) for document in documents])
    count = len(stream) // length
    return stream[: count * length].view(count, length)


def _documents(number: int, example: Example) -> list[Tensor]:
    """The rows of one example, their padding left out."""
    try:
        ids = torch.atleast_2d(torch.as_tensor(example["input_ids"]))
        mask = torch.atleast_2d(torch.as_tensor(example.get("attention_mask", torch.ones_like(ids)))).bool()
        if ids.is_floating_point() or ids.dim() != 2 or ids.shape != mask.shape:
            raise ValueError(f"input_ids {ids.dtype} {tuple(ids.shape)}, attention_mask {tuple(mask.shape)}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"example {number} is not tokenized text: {error}",
                         "An example is what a tokenizer returns: input_ids and attention_mask.") from error
    kept = [row[where].long().cpu() for row, where in zip(ids, mask, strict=True)]
    return [row for row in kept if len(row)]


def _ended(document: Tensor, eos: int | None) -> Tensor:
    return document if eos is None or int(document[-1]) == eos else torch.cat((document, torch.tensor([eos])))
