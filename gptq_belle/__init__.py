"""gptq_belle: quantize BELLE models to 2, 3, 4 or 8 bits with GPTQ, and run them on a CPU or one GPU.

The public names load on first use, so that ``import gptq_belle`` imports neither torch, triton nor transformers. It
sets GOMP_SPINCOUNT, which must happen before torch is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gptq_belle.common.openmp import limit_spinning

if TYPE_CHECKING:
    from gptq_belle.compat.transformers_quantizer import patch_transformers
    from gptq_belle.engine.hf_model import hf_model
    from gptq_belle.engine.model import Model, load
    from gptq_belle.engine.sampling_params import SamplingParams
    from gptq_belle.errors import GateError, GptqBelleError, HardwareError, InputError, UsageError
    from gptq_belle.quantization.calibration.rows import Calibration
    from gptq_belle.quantization.config import QuantConfig
    from gptq_belle.quantization.pipeline import quantize_checkpoint

__version__ = "0.1.0"

limit_spinning()

_MODULES = {
    "Calibration": "gptq_belle.quantization.calibration.rows",
    "Model": "gptq_belle.engine.model",
    "QuantConfig": "gptq_belle.quantization.config",
    "SamplingParams": "gptq_belle.engine.sampling_params",
    "hf_model": "gptq_belle.engine.hf_model",
    "load": "gptq_belle.engine.model",
    "patch_transformers": "gptq_belle.compat.transformers_quantizer",
    "quantize_checkpoint": "gptq_belle.quantization.pipeline",
    **dict.fromkeys(("GateError", "GptqBelleError", "HardwareError", "InputError", "UsageError"), "gptq_belle.errors"),
}
__all__ = ["Calibration", "GateError", "GptqBelleError", "HardwareError", "InputError", "Model", "QuantConfig",
           "SamplingParams", "UsageError", "__version__", "hf_model", "load", "patch_transformers",
           "quantize_checkpoint"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'gptq_belle' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
