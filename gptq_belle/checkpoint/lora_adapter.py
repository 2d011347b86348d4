"""Merge LoRA adapters of peft into the weights of a full-precision model while these are read.

The merged weight is ``W + scale * B A`` in float32 (LoRA, section 4.1), where scale is alpha / r, or alpha / sqrt(r)
for rank-stabilized adapters. Adapters that change more than this are rejected. peft itself is not needed.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_belle.checkpoint.pickle_file import PickleFile
from gptq_belle.checkpoint.reader import CheckpointReader, read_json
from gptq_belle.checkpoint.safetensors_file import DAMAGED, TensorFile
from gptq_belle.errors import InputError
from gptq_belle.formats.quantize_config import has_channel_scales
from gptq_belle.kernels.huge_pages import Allocator, empty_bytes

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
ROOT = "base_model.model."  # prefix of every tensor name
FACTORS = (".lora_A.weight", ".lora_B.weight")
PLAIN_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the base model, too
UNSUPPORTED_KEYS = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "layer_replication",
                    "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config",
                    "velora_config", "monteclora_config", "kasa_config")
NEEDS_FOLDER = "Give the folder that peft saved."
MERGE_FIRST = "Merge the adapter with peft (merge_and_unload), save the model, and quantize that."


class Adapter:
    """The directory of one adapter.

    Attributes:
        files: its configuration and weight file.
        targets: names of the adapted linears in the base model.

    Raises:
        InputError: a file is missing or damaged, or the adapter is of an unsupported kind.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / CONFIG).exists():
            raise InputError(f"{self.path / CONFIG} is missing", NEEDS_FOLDER)
        self.config = read_json(self.path / CONFIG)
        _check_kind(self.path, self.config)
        self._alpha, self._patterns = _alphas(self.path / CONFIG, self.config)
        found = [self.path / name for name in WEIGHTS if (self.path / name).is_file()]
        if not found:
            raise InputError(f"{self.path} contains no {' or '.join(WEIGHTS)}", NEEDS_FOLDER)
        self.files = [self.path / CONFIG, found[0]]
        self._file = TensorFile(found[0]) if found[0].suffix == ".safetensors" else PickleFile(found[0])
        names = self._file.names()
        if unknown := [name for name in names if not (name.startswith(ROOT) and name.endswith(FACTORS))]:
            raise InputError(f"{found[0]} contains {unknown[0]}, which is not a LoRA factor of a linear",
                             MERGE_FIRST)
        self.targets = sorted({name.removeprefix(ROOT).rsplit(".lora_", 1)[0] for name in names})
        if not self.targets:
            raise InputError(f"{found[0]} contains no tensors", "Give the folder that peft saved after training.")

    def shape(self, target: str) -> tuple[int, int]:
        """Shape (N, K) of the linear that the two factors of `target` belong to.

        Raises:
            InputError: a factor is missing, or their shapes do not match.
        """
        (a_name, b_name), names = self._factors(target), self._file.names()
        if a_name not in names or b_name not in names:
            raise InputError(f"{self.files[1]} contains only one of the two factors of {target}", DAMAGED)
        a, b = self._file.shape(a_name), self._file.shape(b_name)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise InputError(f"{self.files[1]}: the factors of {target}, {b} and {a}, cannot be multiplied",
                             DAMAGED)
        return b[0], a[1]

    @property
    def base(self) -> CheckpointReader | None:
        """The quantized model that it was trained on, if that has channel scales and is still at its place."""
        path = Path(str(self.config.get("base_model_name_or_path")))
        if not (path / "config.json").is_file():
            return None
        reader = CheckpointReader(path)
        return reader if has_channel_scales(reader.config.get("quantization_config") or {}) else None

    def merged(self, target: str, weight: Tensor, scales: Tensor) -> Tensor:
        """Merge the adapter into a weight (N, K) of any floating-point dtype: float32.

        Args:
            scales: (K,) or (), what the linear's inputs were divided by in training; A is divided by it.
        """
        a, b = (self._file.tensor(name).float() for name in self._factors(target))
        a /= scales
        return torch.addmm(weight.float(), b, a, alpha=self._scale(target, a.shape[0]))

    def _factors(self, target: str) -> tuple[str, str]:
        first, second = (f"{ROOT}{target}{factor}" for factor in FACTORS)
        return first, second

    def _scale(self, target: str, rank: int) -> float:
        alpha = next((other for pattern, other in self._patterns if pattern.fullmatch(target)), self._alpha)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


class AdaptedReader(CheckpointReader):
    """A `CheckpointReader` that merges an adapter into the weights.

    Raises:
        InputError: see `CheckpointReader`; the adapter belongs to another model, or changes other modules than the
            linears of the blocks.
    """

    def __init__(self, path: str | Path, adapter: Adapter) -> None:
        super().__init__(path)
        self.adapter = adapter
        self._base = adapter.base
        self._changed = {f"{target}.weight": target for target in adapter.targets}
        for name, target in self._changed.items():
            if not target.startswith(f"{self.arch.blocks}.") or not target.endswith(self.arch.linears):
                raise InputError(f"{adapter.path} changes {target}, which is not a linear of the blocks", MERGE_FIRST)
            if adapter.shape(target) != self.shape(name):
                raise InputError(f"{adapter.path} expects {target} of shape {adapter.shape(target)}, the model has "
                                 f"{self.shape(name)}", "The adapter belongs to another model.")

    def tensor(self, name: str, allocator: Allocator = empty_bytes) -> Tensor:
        """Read one tensor on the CPU, in the dtype of the file, or in float32 if it is merged."""
        weight = super().tensor(name, allocator)
        if (target := self._changed.get(name)) is None:
            return weight
        return self.adapter.merged(target, weight, self._channel_scales(target))

    def _channel_scales(self, target: str) -> Tensor:
        """The ratio (K,) of the norm's weights here and in the model that the adapter was trained on; 1 without."""
        for stage, norm in zip(self.arch.stages, self.arch.norms, strict=True):
            for linear in stage:
                if self._base is not None and norm and target.endswith(f".{linear}"):
                    name = f"{target.removesuffix(linear)}{norm}.weight"
                    scales = super().tensor(name).half().float() / self._base.tensor(name).float()
                    return scales.nan_to_num_(1.0)  # 0 / 0
        return torch.ones(())

    def chunks(self, name: str) -> Iterator[Tensor]:
        """Read one tensor in chunks of rows; a merged one whole."""
        if name in self._changed:
            yield self.tensor(name)
        else:
            yield from super().chunks(name)

    @property
    def files(self) -> list[Path]:
        """Weight files of the model and files of the adapter."""
        return [*super().files, *self.adapter.files]


def open_source(path: str | Path, lora: str | Path | None) -> CheckpointReader:
    """Open a model directory, with an adapter merged into its weights if one is given.

    Raises:
        InputError: see `Adapter` and `AdaptedReader`.
    """
    return CheckpointReader(path) if lora is None else AdaptedReader(path, Adapter(lora))


def _check_kind(path: Path, config: Mapping[str, Any]) -> None:
    """Raise InputError for adapters that change more than W + scale * B A."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{path} is an adapter of type {kind!r}, not LORA", MERGE_FIRST)
    if unsupported := [key for key in UNSUPPORTED_KEYS if config.get(key)]:
        raise InputError(f"{path} uses {unsupported[0]}, which is not supported", MERGE_FIRST)
    if config.get("bias", "none") != "none":
        raise InputError(f"{path} changes biases (bias: {config['bias']!r}), which is not supported", MERGE_FIRST)
    initialization = config.get("init_lora_weights", True)
    if initialization not in PLAIN_INITIALIZATIONS:
        raise InputError(f"{path} uses init_lora_weights {initialization!r}, which changes the base model, too",
                         MERGE_FIRST)


def _alphas(path: Path, config: Mapping[str, Any]) -> tuple[float, list[tuple[re.Pattern[str], float]]]:
    """Read lora_alpha and alpha_pattern; a pattern matches the end of a name after a dot, or the whole name."""
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    values = [alpha, *(patterns.values() if isinstance(patterns, dict) else [None])]
    if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise InputError(f"{path}: lora_alpha or alpha_pattern contains values that are not numbers", DAMAGED)
    try:
        return float(values[0]), [(re.compile(rf"(?:.*\.)?(?:{key})"), float(value)) for key, value in patterns.items()]
    except re.error as error:
        raise InputError(f"{path}: alpha_pattern contains an invalid regular expression: {error}", DAMAGED) from error
