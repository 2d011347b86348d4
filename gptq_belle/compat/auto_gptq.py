"""AutoGPTQ 0.7's two classes on this program: notebooks written for it run when their one import is changed.

Quantizing goes block by block from the source's files into a directory; what AutoGPTQ holds in memory between
`quantize` and `save_quantized` lies in a temporary folder here (TMPDIR says where).
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
from gptq_belle.compat.auto_gptq_config import CONFIG, BaseQuantizeConfig, Example, calibration, check_rest, device_name
from gptq_belle.engine.hf_model import hf_model
from gptq_belle.errors import UsageError
from gptq_belle.formats.quantize_config import written_by_gptq_belle
from gptq_belle.quantization.pipeline import quantize_checkpoint
from gptq_belle.quantization.report import LoggedProgress, Report

__all__ = ["AutoGPTQForCausalLM", "BaseGPTQForCausalLM", "BaseQuantizeConfig", "exllama_set_max_input_length"]


class BaseGPTQForCausalLM:
    """A model with AutoGPTQ's calls; whatever else is asked of it, its `model` (of transformers) is asked.

    Attributes:
        quantize_config: the settings.
        quantized: whether `quantize` is done, or the model was loaded so.
        path: the directory that the model is, or will be, loaded from.
        report: of `quantize`; else None.
    """

    def __init__(self, path: Path, quantize_config: BaseQuantizeConfig, device: str, dtype: torch.dtype | None,
                 quantized: bool) -> None:
        self.path, self.quantize_config, self.quantized = path, quantize_config, quantized
        self.report: Report | None = None
        self._device, self._dtype = device, dtype
        self._folder: TemporaryDirectory[str] | None = None
        self._model: PreTrainedModel | None = None

    @property
    def model(self) -> PreTrainedModel:
        """transformers' model, loaded when it is first asked for."""
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
        """Where the model is, or will be."""
        return resolve_device(self._device)

    @property
    def hf_device_map(self) -> None:
        """None: the model is on one device, and may be moved."""
        return

    def quantize(self, examples: list[Example], **kwargs: Any) -> None:
        """Quantize on tokenized examples.

        Args:
            examples: dictionaries with `input_ids` and, where there is padding, `attention_mask`: lists of ids, or
                tensors (T,) or (B, T). Padding is left out; examples of unequal lengths are packed into rows.
            kwargs: AutoGPTQ's others, which mean nothing here.
        Raises:
            UsageError: it is quantized already; a setting or an argument that is not supported.
            InputError: as `quantize_checkpoint`.
        """
        check_rest("quantize", {name: value for name, value in kwargs.items() if (name, value) != ("batch_size", 1)})
        if self.quantized:
            raise UsageError("this model is quantized already", "Load the full-precision one with from_pretrained.")
        settings = self.quantize_config.settings()
        folder = TemporaryDirectory(prefix="gptq_belle-")
        out = Path(folder.name) / "model"
        self.report = quantize_checkpoint(self.path, out, settings, calibration=calibration(examples, self.config),
                                          device=self._device, progress=LoggedProgress())
        self.path, self.quantized, self._model, self._folder = out, True, None, folder

    def save_quantized(self, save_dir: str | Path, use_safetensors: bool = True,
                       safetensors_metadata: dict[str, str] | None = None) -> None:
        """Write the quantized model into a directory: `model.safetensors`, configurations, tokenizer, model card.

        Args:
            save_dir: may exist, as long as no other model's weights lie in it.
            use_safetensors, safetensors_metadata: mean nothing here.
        Raises:
            UsageError: it is not quantized; other weights in `save_dir`.
        """
        if not self.quantized:
            raise UsageError("this model is not quantized yet", "Call quantize(examples) before.")
        check_rest("save_quantized", {"use_safetensors": not use_safetensors,
                                      "safetensors_metadata": safetensors_metadata})
        target = Path(save_dir)
        if target.resolve() == self.path.resolve():
            return
        stated = target / CONFIG
        if _weights(target) and not (stated.is_file() and written_by_gptq_belle(read_json(stated))):
            raise UsageError(f"{target} holds weights that gptq_belle has not written", "Choose another directory.")
        target.mkdir(parents=True, exist_ok=True)
        for file in _weights(target):
            file.unlink()
        for file in sorted(self.path.iterdir()):
            shutil.copy2(file, target / file.name)

    save_pretrained = save_quantized

    def to(self, device: str | int | torch.device) -> "BaseGPTQForCausalLM":
        """Move to a device; a model that is laid out for another one is read again."""
        wanted = device_name(device, None)
        if self._model is not None and resolve_device(wanted) != self._model.device:
            self._model = None
        self._device = wanted
        return self

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate, without gradients."""
        with torch.inference_mode():
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    forward = __call__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_model", "path"):  # while copying, before anything is set
            raise AttributeError(name)
        return getattr(self.model, name)


class AutoGPTQForCausalLM:
    """The two ways to a model."""

    def __init__(self) -> NoReturn:
        raise UsageError("AutoGPTQForCausalLM is not made directly", "Call its from_pretrained or from_quantized.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, quantize_config: BaseQuantizeConfig,
                        max_memory: Any = None, trust_remote_code: bool = False,
                        torch_dtype: torch.dtype | str | None = None, device_map: Any = None,
                        **kwargs: Any) -> BaseGPTQForCausalLM:
        """A full-precision model that is to be quantized: a directory or a hub id. Its weights are read when needed."""
        check_rest("from_pretrained", kwargs | {"max_memory": max_memory, "trust_remote_code": trust_remote_code})
        quantize_config.settings()
        return BaseGPTQForCausalLM(resolve_model_path(pretrained_model_name_or_path), quantize_config,
                                   device_name(None, device_map), None, quantized=False)

    @classmethod
    def from_quantized(cls, model_name_or_path: str | Path, device_map: Any = None, max_memory: Any = None,
                       device: str | int | torch.device | None = None,
                       quantize_config: BaseQuantizeConfig | None = None,
                       model_basename: str | None = None, torch_dtype: torch.dtype | str | None = None,
                       use_safetensors: bool = True, **kwargs: Any) -> BaseGPTQForCausalLM:
        """A quantized model, of any producer: a directory or a hub id. The directory's own settings are used.

        Raises:
            InputError: it is not quantized, or what `hf_model` raises.
            UsageError: settings or a file name that are not the directory's; an argument that is not supported.
        """
        check_rest("from_quantized", kwargs | {"max_memory": max_memory})
        path = resolve_model_path(model_name_or_path)
        found = BaseQuantizeConfig.from_pretrained(path)
        if quantize_config is not None and (quantize_config.bits, quantize_config.group_size) != (
                found.bits, found.group_size):
            raise UsageError(f"quantize_config says {quantize_config.bits} bits and groups of "
                             f"{quantize_config.group_size}, {path} says {found.bits} and {found.group_size}",
                             "Leave it out: the directory's own is used.")
        files = CheckpointReader(path).files
        if model_basename is not None and (path / f"{model_basename}.safetensors") in _weights(path) and (
                model_basename not in [file.stem for file in files]):
            raise UsageError(f"{path} holds other weights besides {model_basename}.safetensors",
                             "Move one of them into a folder of its own, with its configuration.")
        dtype = torch_dtype if isinstance(torch_dtype, torch.dtype) else None
        model = BaseGPTQForCausalLM(path, found, device_name(device, device_map), dtype, quantized=True)
        model.model  # noqa: B018  (loads it: what is wrong with the files is said here)
        return model


def exllama_set_max_input_length(model: BaseGPTQForCausalLM, max_input_length: int) -> BaseGPTQForCausalLM:
    """The model as it is: its kernels take inputs of any length."""
    return model


def _weights(folder: Path) -> list[Path]:
    return [*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.index.json")]
