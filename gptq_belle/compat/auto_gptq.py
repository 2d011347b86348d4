"""The two classes of AutoGPTQ 0.7: notebooks written for it run after their import is changed.

Quantization runs block by block from the source's files into a directory. The result is kept in a temporary folder
(see TMPDIR) until `save_quantized`.
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from gptq_belle.checkpoint.hub import resolve_model_path
from gptq_belle.checkpoint.reader import CheckpointReader, read_json
from gptq_belle.common.devices import resolve_device
from gptq_belle.compat.auto_gptq_arguments import (
    CONFIG_FILE,
    BaseQuantizeConfig,
    Example,
    calibration_of,
    check_arguments,
    device_name,
)
from gptq_belle.engine.hf_model import hf_model
from gptq_belle.errors import UsageError
from gptq_belle.formats.quantize_config import written_by_gptq_belle
from gptq_belle.quantization.pipeline import quantize_checkpoint
from gptq_belle.quantization.report import LoggedProgress, Report

__all__ = ["AutoGPTQForCausalLM", "BaseGPTQForCausalLM", "BaseQuantizeConfig", "exllama_set_max_input_length"]


class BaseGPTQForCausalLM:
    """A model with AutoGPTQ's methods; other attributes are those of `model`.

    Attributes:
        report: report of `quantize`; None before.
    """

    hf_device_map = None  # the model is on one device and can be moved

    def __init__(self, path: Path, quantize_config: BaseQuantizeConfig, device: str, dtype: torch.dtype | None,
                 quantized: bool) -> None:
        self.path, self.quantize_config, self.quantized = path, quantize_config, quantized
        self.report: Report | None = None
        self._device, self._dtype = device, dtype
        self._folder: TemporaryDirectory[str] | None = None
        self._model: PreTrainedModel | None = None

    @property
    def model(self) -> PreTrainedModel:
        """transformers' model, loaded on first use."""
        if self._model is None:
            self._model = hf_model(self.path, device=self._device, dtype=self._dtype)
        return self._model

    @property
    def config(self) -> PretrainedConfig:
        """transformers' configuration."""
        if self._model is not None:
            return self._model.config
        config: PretrainedConfig = AutoConfig.from_pretrained(self.path, local_files_only=True)
        return config

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return resolve_device(self._device)

    def quantize(self, examples: list[Example], **kwargs: Any) -> None:
        """Quantize with tokenized examples as calibration data.

        Args:
            examples: dictionaries with `input_ids` and, where there is padding, `attention_mask`: lists of ids, or
                tensors (T,) or (B, T). Padding is removed; examples of unequal lengths are packed into rows.
            kwargs: AutoGPTQ's other arguments, which have no effect.
        Raises:
            UsageError: the model is already quantized, or a setting or argument is not supported.
            InputError: as `quantize_checkpoint`.
        """
        check_arguments("quantize", {name: value for name, value in kwargs.items()
                                     if (name, value) != ("batch_size", 1)})
        if self.quantized:
            raise UsageError("this model is already quantized", "Load the full-precision one with from_pretrained.")
        folder = TemporaryDirectory(prefix="gptq_belle-")
        out = Path(folder.name) / "model"
        self.report = quantize_checkpoint(
            self.path, out, self.quantize_config.to_quant_config(), calibration=calibration_of(examples, self.config),
            device=self._device, progress=LoggedProgress())
        self.path, self.quantized, self._model, self._folder = out, True, None, folder

    def save_quantized(self, save_dir: str | Path, use_safetensors: bool = True,
                       safetensors_metadata: dict[str, str] | None = None) -> None:
        """Write the quantized model into a directory: `model.safetensors`, configurations, tokenizer, model card.

        Args:
            save_dir: a directory without weights of other models.
            use_safetensors, safetensors_metadata: have no effect.
        Raises:
            UsageError: the model is not quantized, or `save_dir` holds other weights.
        """
        if not self.quantized:
            raise UsageError("this model is not quantized yet", "Call quantize(examples) first.")
        check_arguments("save_quantized", {"use_safetensors": not use_safetensors,
                                           "safetensors_metadata": safetensors_metadata})
        target = Path(save_dir)
        if target.resolve() == self.path.resolve():
            return
        config = target / CONFIG_FILE
        if _weight_files(target) and not (config.is_file() and written_by_gptq_belle(read_json(config))):
            raise UsageError(f"{target} holds weights that gptq_belle did not write", "Choose another directory.")
        target.mkdir(parents=True, exist_ok=True)
        for file in _weight_files(target):
            file.unlink()
        for file in sorted(self.path.iterdir()):
            shutil.copy2(file, target / file.name)

    save_pretrained = save_quantized

    def to(self, device: str | int | torch.device) -> "BaseGPTQForCausalLM":
        """Move to a device; a model that is loaded on another one is loaded again on next use."""
        name = device_name(device, None)
        if self._model is not None and resolve_device(name) != self._model.device:
            self._model = None
        self._device = name
        return self

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call transformers' generate in inference mode."""
        with torch.inference_mode():
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    forward = __call__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_model", "path"):  # copying asks for these before __init__ has run
            raise AttributeError(name)
        return getattr(self.model, name)


class AutoGPTQForCausalLM:
    """AutoGPTQ's two functions that return a model."""

    def __init__(self) -> NoReturn:
        raise UsageError("AutoGPTQForCausalLM cannot be constructed", "Call its from_pretrained or from_quantized.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, quantize_config: BaseQuantizeConfig,
                        max_memory: Any = None, trust_remote_code: bool = False,
                        torch_dtype: torch.dtype | str | None = None, device_map: Any = None,
                        **kwargs: Any) -> BaseGPTQForCausalLM:
        """A full-precision model to quantize: a directory or a hub id. Its weights are read when they are needed."""
        check_arguments("from_pretrained", kwargs | {"max_memory": max_memory, "trust_remote_code": trust_remote_code})
        quantize_config.to_quant_config()  # validates the settings
        return BaseGPTQForCausalLM(resolve_model_path(pretrained_model_name_or_path), quantize_config,
                                   device_name(None, device_map), None, quantized=False)

    @classmethod
    def from_quantized(cls, model_name_or_path: str | Path, device_map: Any = None, max_memory: Any = None,
                       device: str | int | torch.device | None = None,
                       quantize_config: BaseQuantizeConfig | None = None,
                       model_basename: str | None = None, torch_dtype: torch.dtype | str | None = None,
                       use_safetensors: bool = True, **kwargs: Any) -> BaseGPTQForCausalLM:
        """Load a GPTQ model of any producer: a directory or a hub id, with the settings stored there.

        Raises:
            InputError: the model is not quantized, or as `hf_model`.
            UsageError: settings or a file name that differ from the directory's; an argument that is not supported.
        """
        check_arguments("from_quantized", kwargs | {"max_memory": max_memory})
        path = resolve_model_path(model_name_or_path)
        stored = BaseQuantizeConfig.from_pretrained(path)
        if quantize_config is not None and (quantize_config.bits, quantize_config.group_size) != (
                stored.bits, stored.group_size):
            raise UsageError(f"quantize_config has {quantize_config.bits} bits and groups of "
                             f"{quantize_config.group_size}, {path} has {stored.bits} and {stored.group_size}",
                             "Omit it: the directory's settings are used.")
        file = path / f"{model_basename}.safetensors"
        used = [file.name for file in CheckpointReader(path).files]
        if model_basename is not None and file.exists() and file.name not in used:
            raise UsageError(f"{path} holds other weights besides {file.name}",
                             "Move one of them into a separate folder with its configuration.")
        dtype = torch_dtype if isinstance(torch_dtype, torch.dtype) else None
        model = BaseGPTQForCausalLM(path, stored, device_name(device, device_map), dtype, quantized=True)
        model.model  # noqa: B018  (loads the weights, so that errors in the files are raised here)
        return model


def exllama_set_max_input_length(model: BaseGPTQForCausalLM, max_input_length: int) -> BaseGPTQForCausalLM:
    """Return the model unchanged: the kernels accept inputs of any length."""
    return model


def _weight_files(folder: Path) -> list[Path]:
    return [*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.index.json")]
