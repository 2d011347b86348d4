"""Results of evaluations in a file, valid until models, data or settings change."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptq_belle.common.files import write_json_atomically

FILE = "evaluations.json"
FORMAT = 1  # of the file; a file of another format is ignored


@dataclass(slots=True)
class ResultCache:
    """Results in FILE of a folder.

    Attributes:
        entries: by evaluation and model, the result ("found") and what it depends on ("follows_from").
    """

    folder: Path
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            found = json.loads((self.folder / FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if isinstance(found, dict) and found.get("format") == FORMAT and isinstance(found.get("entries"), dict):
            self.entries = found["entries"]

    def get(self, kind: str, path: Path, follows_from: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result of an evaluation of a model, if it is still valid."""
        entry = self.entries.get(f"{kind} {path.resolve()}", {})
        return entry.get("found") if entry.get("follows_from") == follows_from else None

    def put(self, kind: str, path: Path, follows_from: Mapping[str, Any], found: dict[str, Any]) -> dict[str, Any]:
        """Store a result on disk, and return it."""
        self.entries[f"{kind} {path.resolve()}"] = {"follows_from": follows_from, "found": found}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json_atomically(self.folder / FILE, {"format": FORMAT, "entries": self.entries})
        return found
