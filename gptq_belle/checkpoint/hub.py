"""Where MODEL is: a directory, or the name of a repository on the Hugging Face hub."""

import re
from pathlib import Path

from gptq_belle.errors import HardwareError, InputError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
WANTED = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"]


def model_directory(model: str | Path) -> Path:
    """The local directory of a model; a hub id is downloaded, or found in the hub's cache.

    Raises:
        InputError: neither a directory nor of the form owner/name, or the hub has no such repository.
        HardwareError: the hub cannot be reached.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if not HUB_ID.fullmatch(str(model)):
        raise InputError(f"{model} is not a model directory", "Give the folder that holds config.json, or a hub id.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(str(model), allow_patterns=WANTED))
    except RepositoryNotFoundError as error:
        raise InputError(f"{model} is neither a directory here nor a repository on the hub",
                         "Check the spelling; for a private repository log in with `hf auth login`.") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise HardwareError(f"{model} is no directory here, and the hub cannot be reached",
                            "Download the model elsewhere and give its folder.") from error
