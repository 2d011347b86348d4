"""AutoGPTQ's settings, as its notebooks state them and its files hold them."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gptq_belle.checkpoint.hub import model_directory
from gptq_belle.checkpoint.quantization import read_quantization, stated_quantization
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.compat.arguments import check_rest
from gptq_belle.config import QuantConfig
from gptq_belle.errors import InputError, UsageError

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
        reader = CheckpointReader(model_directory(save_dir))
        stated = stated_quantization(reader)
        if stated is None or read_quantization(reader) is None:
            raise InputError(f"{save_dir} states no quantization", f"Give a folder with {CONFIG}.")
        names = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in stated.items() if key in names})
