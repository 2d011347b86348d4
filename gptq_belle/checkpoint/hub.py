"""Where MODEL is: a directory, a name of the BELLE family, or a repository on the Hugging Face hub."""

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


class _Place(NamedTuple):
    """A repository, the one file of it that is wanted, and what is known of it."""

    repository: str
    file: str | None
    known: BelleModel | None


def resolve_model_path(model: str | Path, kinds: tuple[str, ...] = READABLE) -> Path:
    """The local directory (or file) of a model; one on the hub is downloaded, or found in the hub's cache.

    A connection that breaks is taken up again where it was; a later run keeps the files that were complete, as
    huggingface_hub has it. Progress goes to stderr, where that is a terminal.

    Args:
        model: a path, a name of the family, a hub id, or one of these two with the name of a .pt file behind it:
            ``BELLE-7B-gptq/bloom7b-2m-4bit-128g.pt``.
        kinds: how it may have been published: READABLE, CONVERTIBLE or DECRYPTABLE.
    Raises:
        InputError: neither a path nor a name nor of the form owner/name, or the hub has no such repository or file.
        UsageError: a member of the family that another verb comes first for, or a file of which must be chosen.
        HardwareError: the hub cannot be reached, or the connection broke.
    """
    path = Path(model)
    if path.exists():
        return path
    place = _place(str(model))
    if place is None:
        raise InputError(f"{model} is not a model directory",
                         "Give the folder that holds config.json, a hub id, or a name that `gptq-belle models` lists.")
    if place.known is not None:
        check_release_kind(place.known, kinds)
        if place.known.kind == STATES and place.file is None:
            raise UsageError(f"{place.known.name} holds {len(place.known.files)} models",
                             f"Name one: {', '.join(f'{place.known.name}/{file}' for file in place.known.files)}.")
    folder = _download(place, _patterns(place, kinds))
    if place.file is None or kinds == DECRYPTABLE:
        return folder
    if not (folder / place.file).is_file():
        raise InputError(f"{place.repository} holds no {place.file}", "Check the spelling on its page.")
    return folder / place.file


def is_model_name(model: str | Path) -> bool:
    """True for what could be on the hub, and for files of a family member."""
    return _place(str(model)) is not None


def _place(model: str) -> _Place | None:
    name, _, file = model.partition("/")
    if found := find_belle_model(model) or (find_belle_model(name) if file else None):
        return _Place(found.hub_id, None if find_belle_model(model) else file, found)
    if HUB_ID.fullmatch(model):
        return _Place(model, None, None)
    repository, _, file = model.rpartition("/")
    if HUB_ID.fullmatch(repository) and file.endswith((".pt", ".safetensors")):
        return _Place(repository, file, find_belle_model(repository))
    return None


def _patterns(place: _Place, kinds: tuple[str, ...]) -> list[str]:
    if place.file is not None:
        return [*SMALL, *(ENCRYPTED_SMALL if kinds == DECRYPTABLE else ()), f"{place.file}*"]
    return [*SMALL, *(pattern for kind in kinds for pattern in WEIGHTS.get(kind, ()))]


def _download(place: _Place, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(place.repository, allow_patterns=patterns, tqdm_class=_bars()))
    except GatedRepoError as error:
        raise InputError(f"the hub gives {place.repository} only to those who accepted its terms",
                         "Accept them on its page, then log in with `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"{place.repository} is neither a directory here nor a repository on the hub",
                         "Check the spelling; for a private repository log in with `hf auth login`.") from error
    except LocalEntryNotFoundError as error:
        raise HardwareError(f"{place.repository} is no directory here, and the hub cannot be reached",
                            "Download the model elsewhere and give its folder.") from error
    except Exception as error:  # whatever the HTTP library of the day raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise HardwareError(f"the download of {place.repository} ended early: {reason}",
                            "Run the same command again: files that were complete are kept.") from error


def _bars() -> Any:
    """huggingface_hub's progress bars, silent where stderr is no terminal."""
    from huggingface_hub.utils import tqdm

    class Bars(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs if sys.stderr.isatty() else kwargs | {"disable": True}))

    return Bars
