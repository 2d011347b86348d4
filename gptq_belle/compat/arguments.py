"""AutoGPTQ's arguments: which of them mean nothing here, which must not be given, and what its devices are called."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from gptq_belle.errors import UsageError

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
