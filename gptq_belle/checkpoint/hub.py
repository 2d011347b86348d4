"""Resolve a model: a local path, a name of the BELLE catalogue, or a repository on the Hugging Face hub."""

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from gptq_belle.errors import HardwareError, InputError, UsageError
from gptq_belle.models.belle_catalogue import (
    ENCRYPTED,
    ENCRYPTED_STATES,
    FULL,
    STATES,
    BelleModel,
    check_release_kind,
    find_belle_model,
)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SMALL = ("*.json", "*.model", "*.txt", "*.jinja")
WEIGHTS = {FULL: ("*.safetensors", "*.bin"), STATES: ("*.pt",), ENCRYPTED: ("*.enc",)}
ENCRYPTED_SMALL = ("*.json.*.enc", "*.model.*.enc", "*.txt.*.enc")
READABLE, CONVERTIBLE, DECRYPTABLE = (FULL,), (FULL, STATES), (ENCRYPTED, ENCRYPTED_STATES)


class _HubModel(NamedTuple):
    """A model on the hub."""

    repository: str  # hub id
    file: str | None  # name of a single weight file, or None for all
    known: BelleModel | None  # its entry in the BELLE catalogue, if any


def resolve_model_path(model: str | Path, kinds: tuple[str, ...] = READABLE) -> Path:
    """Return the local directory or file of a model; download it from the hub unless it is in the hub's cache.

    huggingface_hub resumes interrupted downloads, and a later run keeps complete files. A progress bar is shown if
    stderr is a terminal.

    Args:
        model: a path, a name of the BELLE catalogue, a hub id, or one of the latter two followed by a .pt file:
            ``BELLE-7B-gptq/bloom7b-2m-4bit-128g.pt``.
        kinds: accepted kinds of publication: READABLE, CONVERTIBLE or DECRYPTABLE.
    Raises:
        InputError: no such path, name, hub repository or file.
        UsageError: the model has to be converted or decrypted first, or one of its files must be chosen.
        HardwareError: the hub cannot be reached, or the connection broke.
    """
    path = Path(model)
    if path.exists():
        return path
    hub_model = _parse_name(str(model))
    if hub_model is None:
        raise InputError(f"{model} is not a model directory",
                         "Give a folder with config.json, a hub id, or a name that `gptq-belle models` lists.")
    if (known := hub_model.known) is not None:
        check_release_kind(known, kinds)
        if known.kind == STATES and hub_model.file is None:
            raise UsageError(f"{known.name} contains {len(known.files)} models",
                             f"Choose one: {', '.join(f'{known.name}/{file}' for file in known.files)}.")
    folder = _download(hub_model, _patterns(hub_model, kinds))
    if hub_model.file is None or kinds == DECRYPTABLE:
        return folder
    if not (folder / hub_model.file).is_file():
        raise InputError(f"{hub_model.repository} does not contain {hub_model.file}", "Check the spelling on its page.")
    return folder / hub_model.file


def is_model_name(model: str | Path) -> bool:
    """Whether a model is a name of the BELLE catalogue or could be on the hub."""
    return _parse_name(str(model)) is not None


def _parse_name(model: str) -> _HubModel | None:
    name, _, file = model.partition("/")
    if found := find_belle_model(model) or (find_belle_model(name) if file else None):
        return _HubModel(found.hub_id, None if find_belle_model(model) else file, found)
    if HUB_ID.fullmatch(model):
        return _HubModel(model, None, None)
    repository, _, file = model.rpartition("/")
    if HUB_ID.fullmatch(repository) and file.endswith((".pt", ".safetensors")):
        return _HubModel(repository, file, find_belle_model(repository))
    return None


def _patterns(hub_model: _HubModel, kinds: tuple[str, ...]) -> list[str]:
    if hub_model.file is not None:
        return [*SMALL, *(ENCRYPTED_SMALL if kinds == DECRYPTABLE else ()), f"{hub_model.file}*"]
    return [*SMALL, *(pattern for kind in kinds for pattern in WEIGHTS.get(kind, ()))]


def _download(hub_model: _HubModel, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_model.repository, allow_patterns=patterns, tqdm_class=_progress_bar_class()))
    except GatedRepoError as error:
        raise InputError(f"the hub requires accepting the terms of {hub_model.repository}",
                         "Accept them on its page, then log in with `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"{hub_model.repository} is neither a local directory nor a repository on the hub",
                         "Check the spelling; for a private repository log in with `hf auth login`.") from error
    except LocalEntryNotFoundError as error:
        raise HardwareError(f"{hub_model.repository} is not a local directory, and the hub cannot be reached",
                            "Download the model elsewhere and give its folder.") from error
    except Exception as error:  # depends on the HTTP library that huggingface_hub uses
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise HardwareError(f"the download of {hub_model.repository} failed: {reason}",
                            "Run the same command again: complete files are kept.") from error


def _progress_bar_class() -> Any:
    """huggingface_hub's progress bar class, disabled unless stderr is a terminal."""
    from huggingface_hub.utils import tqdm

    class ProgressBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs if sys.stderr.isatty() else kwargs | {"disable": True}))

    return ProgressBar
