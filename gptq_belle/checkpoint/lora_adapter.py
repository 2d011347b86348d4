"""LoRA adapters as peft writes them, merged into a source's weights one by one as these are read.

``W + scale * B A`` in float32 (LoRA, section 4.1; scale is alpha / r, with rank-stabilised scaling alpha / sqrt(r)).
Everything that means more than this sum is refused by its name; peft itself is not needed.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_belle.checkpoint.pickle_file import PickleFile
from gptq_belle.checkpoint.reader import CheckpointReader, read_json
from gptq_belle.checkpoint.safetensors_file import DAMAGED, TensorFile
from gptq_belle.errors import InputError
from gptq_belle.kernels.huge_pages import Allocator, empty_bytes

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
ROOT = "base_model.model."  # in front of every name
FACTORS = (".lora_A.weight", ".lora_B.weight")
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the base model too
BEYOND = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "layer_replication",
          "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "velora_config",
          "monteclora_config", "kasa_config")
SAVED = "Give the folder that peft saved."
MERGE_BEFORE = "Merge the adapter with peft (merge_and_unload), save the model, and quantize that."


class Adapter:
    """One adapter's directory: its factors by the name of the linear that they belong to.

    Attributes:
        path: the directory.
        files: configuration and weights.
        targets: names of the linears, in the base model.

    Raises:
        InputError: a missing or damaged file; a kind of adapter that is not a plain sum, which is named.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / CONFIG).exists():
            raise InputError(f"{self.path / CONFIG} is missing", SAVED)
        self.config = read_json(self.path / CONFIG)
        _check_kind(self.path, self.config)
        self._alpha, self._patterns = _alphas(self.path / CONFIG, self.config)
        found = [self.path / name for name in WEIGHTS if (self.path / name).is_file()]
        if not found:
            raise InputError(f"{self.path} holds no {' or '.join(WEIGHTS)}", SAVED)
        self.files = [self.path / CONFIG, found[0]]
        self._file = TensorFile(found[0]) if found[0].suffix == ".safetensors" else PickleFile(found[0])
        names = self._file.names()
        if strange := [name for name in names if not (name.startswith(ROOT) and name.endswith(FACTORS))]:
            raise InputError(f"{found[0]} holds {strange[0]}, which is no factor of a linear layer", MERGE_BEFORE)
        self.targets = sorted({name.removeprefix(ROOT).rsplit(".lora_", 1)[0] for name in names})
        if not self.targets:
            raise InputError(f"{found[0]} holds no tensors", "Give the folder that peft saved after training.")

    def shape(self, target: str) -> tuple[int, int]:
        """(N, K) of the linear that a pair of factors fits.

        Raises:
            InputError: one is missing, or they do not fit one another.
        """
        (a_name, b_name), names = self._factors(target), self._file.names()
        if a_name not in names or b_name not in names:
            raise InputError(f"{self.files[1]} holds only one of the two factors of {target}", DAMAGED)
        a, b = self._file.shape(a_name), self._file.shape(b_name)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise InputError(f"{self.files[1]}: the factors of {target}, {b} and {a}, cannot be multiplied",
                             DAMAGED)
        return b[0], a[1]

    def merged(self, target: str, weight: Tensor) -> Tensor:
        """weight (N, K) of any floating dtype with the adapter's change: float32."""
        a, b = (self._file.tensor(name).float() for name in self._factors(target))
        return torch.addmm(weight.float(), b, a, alpha=self._scale(target, a.shape[0]))

    def _factors(self, target: str) -> tuple[str, str]:
        first, second = (f"{ROOT}{target}{factor}" for factor in FACTORS)
        return first, second

    def _scale(self, target: str, rank: int) -> float:
        alpha = next((other for pattern, other in self._patterns if pattern.fullmatch(target)), self._alpha)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


class AdaptedReader(CheckpointReader):
    """A model directory whose weights come with an adapter merged into them.

    Raises:
        InputError: as `CheckpointReader` and `Adapter`; an adapter of another model, or of other layers than the
            blocks' linears.
    """

    def __init__(self, path: str | Path, adapter: Adapter) -> None:
        super().__init__(path)
        self.adapter = adapter
        self._changed = {f"{target}.weight": target for target in adapter.targets}
        for name, target in self._changed.items():
            if not target.startswith(f"{self.arch.blocks}.") or not target.endswith(self.arch.linears):
                raise InputError(f"{adapter.path} changes {target}, which is no linear of the blocks", MERGE_BEFORE)
            if adapter.shape(target) != self.shape(name):
                raise InputError(f"{adapter.path} changes {target} as one of {adapter.shape(target)}, the model's is "
                                 f"{self.shape(name)}", "The adapter belongs to another model.")

    def tensor(self, name: str, memory: Allocator = empty_bytes) -> Tensor:
        """One tensor on the CPU: in the dtype of the file, or merged, in float32."""
        weight = super().tensor(name, memory)
        return self.adapter.merged(self._changed[name], weight) if name in self._changed else weight

    @property
    def files(self) -> list[Path]:
        """The weight files, in order, and the adapter's."""
        return [*super().files, *self.adapter.files]


def open_source(path: str | Path, lora: str | Path | None) -> CheckpointReader:
    """A model directory, with an adapter merged into it where one is given."""
    return CheckpointReader(path) if lora is None else AdaptedReader(path, Adapter(lora))


def _check_kind(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse what is more than W + scale * B A."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{path} is an adapter of the kind {kind!r}, not LORA", MERGE_BEFORE)
    if beyond := [key for key in BEYOND if config.get(key)]:
        raise InputError(f"{path} uses {beyond[0]}, which is more than two factors a layer", MERGE_BEFORE)
    if config.get("bias", "none") != "none":
        raise InputError(f"{path} holds biases (bias: {config['bias']!r}) besides its factors", MERGE_BEFORE)
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise InputError(f"{path} was begun with init_lora_weights {start!r}, which changes the base model too",
                         MERGE_BEFORE)


def _alphas(path: Path, config: Mapping[str, Any]) -> tuple[float, list[tuple[re.Pattern[str], float]]]:
    """lora_alpha, and where alpha_pattern has others; a pattern is the end of a name, from a dot on."""
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    values = [alpha, *(patterns.values() if isinstance(patterns, dict) else [None])]
    if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise InputError(f"{path}: lora_alpha or alpha_pattern holds other things than numbers", DAMAGED)
    try:
        return float(values[0]), [(re.compile(rf"(?:.*\.)?(?:{key})"), float(value)) for key, value in patterns.items()]
    except re.error as error:
        raise InputError(f"{path}: alpha_pattern holds no regular expression: {error}", DAMAGED) from error
