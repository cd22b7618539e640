"""The finished scenarios of a meta-test that did not come to its end: the same command keeps them."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from launch.runtime import files

FILE = ".meta_test.json"


class Unfinished:
    """The sections of meta_test.json that are measured already, in a file that `clear` deletes."""

    def __init__(self, folder: pathlib.Path, about: Mapping[str, Any]):
        """Reads what an earlier meta-test of the same `about` has left: everything that its numbers depend on, as JSON."""
        self._path, self._about = folder / FILE, json.loads(json.dumps(about))
        self.parts: dict[str, Any] = {}
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none, or half of one: everything is measured
            return
        if isinstance(content, dict) and content.get("about") == self._about:
            self.parts = dict(content["parts"])

    def add(self, name: str, part: Mapping[str, Any]) -> None:
        """Keeps a section. `parts` has it as it is read again."""
        self.parts[name] = json.loads(json.dumps(part))
        files.write_json(self._path, {"about": self._about, "parts": self.parts})

    def clear(self) -> None:
        """Deletes the file."""
        self._path.unlink(missing_ok=True)
