"""The JSON files by which one stage tells the next what it did."""

import json
from pathlib import Path
from typing import Any


def write_record(file: Path, facts: object) -> None:
    """Writes indented JSON with a last line break."""
    file.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises FileNotFoundError when its stage has not run."""
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record
