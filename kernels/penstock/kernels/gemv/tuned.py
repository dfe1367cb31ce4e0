"""The cuts that were measured to be the fastest, by GPU and model: data, shipped and added to.

``measured/NAME.json`` beside this file holds those of one kind of GPU; a file of the same form in the folder that
``PENSTOCK_TUNED`` names, by default ``~/.cache/penstock/tuned``, goes before it. ``penstock tune`` writes there.
An entry tells what it was measured to be: milliseconds of a whole step, those of the default cut in the same run, and
its relative error against a float32 reference.
"""

from __future__ import annotations

import functools
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from penstock.kernels.gemv.shapes import (
    PRODUCTS,
    GemvShape,
    LayerSizes,
    SplitShape,
    StepShape,
    default_shape,
)

SHIPPED: Final = Path(__file__).parent / "measured"


@dataclass(frozen=True, slots=True)
class Entry:
    """One measured cut."""

    sizes: LayerSizes
    rows: int
    context: int
    """Index of :data:`penstock.kernels.gemv.shapes.CONTEXTS`."""
    shape: StepShape
    step_ms: float
    """Of a whole step of this model, captured, at ``tokens`` tokens of context."""
    default_ms: float
    """The same of the default cut."""
    tokens: int
    error: float
    """Of the step's logits, relative to a float32 reference on the same weights and pages."""
    default_error: float
    measured: str
    """With what: versions and commit."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Entry:
        """Raises KeyError, TypeError or ValueError for what is no entry."""
        cuts = raw["shape"]
        products = {name: GemvShape(**cuts[name]) for name in PRODUCTS}
        shape = StepShape(attention=SplitShape(**cuts["attention"]), **products)
        entry = cls(**{**raw, "sizes": LayerSizes(**raw["sizes"]), "shape": shape})
        if not entry.sizes.fits(shape):
            raise ValueError(f"the cut does not fit {entry.sizes}")
        return entry


def step_shape(sizes: LayerSizes, rows: int, context: int, device: torch.device) -> StepShape | None:
    """The best cut known for this model on this device; None: the kernels do not take it."""
    default = default_shape(sizes, rows, context)
    if default is None or device.type != "cuda":
        return default
    found = entries_of(torch.cuda.get_device_name(device)).get((sizes, rows, context))
    return default if found is None else found.shape


@functools.cache
def entries_of(gpu: str) -> dict[tuple[LayerSizes, int, int], Entry]:
    """All entries for one kind of GPU. Raises ValueError naming a file that is not what it should be."""
    found: dict[tuple[LayerSizes, int, int], Entry] = {}
    for folder in (SHIPPED, user_folder()):
        path = folder / file_of(gpu)
        if path.is_file():
            found |= {(entry.sizes, entry.rows, entry.context): entry for entry in read_entries(path)}
    return found


def read_entries(path: Path) -> list[Entry]:
    """The entries of a file. Raises ValueError naming it if it is not what it should be."""
    try:
        return [Entry.from_json(raw) for raw in json.loads(path.read_text())]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no tuned shapes: {error!r:.200}") from error


def write_entries(path: Path, entries: list[Entry]) -> None:
    """Put ``entries`` into a file, in place of those for the same model, rows and context."""
    old = {(entry.sizes, entry.rows, entry.context): entry for entry in read_entries(path)} if path.is_file() else {}
    merged = old | {(entry.sizes, entry.rows, entry.context): entry for entry in entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps([entry.to_json() for entry in merged.values()], indent=1) + "\n")
    fresh.replace(path)


def file_of(gpu: str) -> str:
    """``NVIDIA H200`` → ``nvidia_h200.json``."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json"


def user_folder() -> Path:
    """Where entries of this user are."""
    named = os.environ.get("PENSTOCK_TUNED")
    return Path(named) if named else Path.home() / ".cache" / "penstock" / "tuned"
