"""The fingerprint of a job: everything that determines its result, up to the last bits of floating-point sums."""

import json
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch
import transformers

from gptq_belle import __version__
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.checkpoint.tokenizer_files import COPIED_FILES, TOKENIZER_CONFIG
from gptq_belle.common.files import file_checksum
from gptq_belle.kernels.native_library import load_library
from gptq_belle.quantization.config import QuantConfig


def fingerprint(reader: CheckpointReader, config: QuantConfig,
                calibration: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The properties that a resumed job must share with the interrupted one, by topic.

    Every weight file is read once for its checksum, which also brings it into the page cache.

    Args:
        calibration: `Calibration.describe` of the tokens; None for rtn.
    """
    small = [reader.path / name for name in ("config.json", TOKENIZER_CONFIG, *COPIED_FILES)]
    files = [*reader.files, *(file for file in small if file.is_file())]
    with ThreadPoolExecutor(max_workers=4) as pool:
        checksums = list(pool.map(file_checksum, files))
    return {
        "source": {file.name: checksum.sha256 for file, checksum in zip(files, checksums, strict=True)},
        "calibration": {key: value for key, value in (calibration or {}).items() if key != "seen"},  # covered by sha256
        "settings": json.loads(json.dumps(asdict(config))) | {  # as JSON returns it: tuples become lists
            "overrides": config.to_dict().get("dynamic", {})},
        "techniques": asdict(config.techniques),
        "program": {"gptq_belle": __version__},
    }


def environment(device: torch.device) -> dict[str, Any]:
    """The properties of the machine that change the result in its last bits only.

    MKL's products and Cholesky factors differ in their last bits between numbers of threads and between kinds of
    processors, and CUDA's differ from both. A resumed job therefore keeps the number of threads, and other differences
    are noted in the report. The number of CUDA devices has no influence, because one is used.
    """
    return {"device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
            "threads": torch.get_num_threads(), "processor": torch.backends.cpu.get_cpu_capability(),
            "solver": "torch" if isinstance(load_library(), str) else "native",
            "torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine()}


def environment_differences(then: dict[str, Any], now: dict[str, Any]) -> str:
    """The differences between two environments, without the number of threads; "" where there are none."""
    return ", ".join(f"{name} {then.get(name)} then, {value} now" for name, value in now.items()
                     if name != "threads" and then.get(name) != value)
