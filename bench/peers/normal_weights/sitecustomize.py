"""Let vLLM's dummy weights be normal with a standard deviation of 0.02, norms one, as those of Penstock are.

Its own are uniform in ±0.001: matrix products of such small numbers draw less power, and a GPU that is held by its
power limit then runs faster. Python imports this file when it starts if its folder is on PYTHONPATH, in every process
of a server too; the function is exchanged when, and only if, vLLM's module is imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

MODULE = "vllm.model_executor.model_loader.weight_utils"
STANDARD_DEVIATION = 0.02
_said = False


def fill(tensor: Any, low: float = 0.0, high: float = 0.0, seed: int = 1234) -> None:
    """Fill one parameter; the bounds of a uniform distribution are not used."""
    import torch

    if tensor.device.type == "meta" or not torch.is_floating_point(tensor):
        return
    with torch.no_grad():
        if tensor.dim() < 2:
            tensor.fill_(1.0)
        else:
            generator = torch.Generator(device=tensor.device).manual_seed(seed)
            tensor.normal_(0.0, STANDARD_DEVIATION, generator=generator)
            _say(tensor)


def _say(tensor: Any) -> None:
    """One line a process, for the log: the first matrix is what it should be."""
    global _said
    if not _said:
        _said = True
        print(
            f"WEIGHTS shape={tuple(tensor.shape)} std={tensor[:256].float().std().item():.5f}",
            file=sys.stderr,
            flush=True,
        )


class _Loader(importlib.abc.Loader):
    """Loads the module as it is, then exchanges its function."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        if not hasattr(module, "initialize_single_dummy_weight"):
            raise ImportError(f"{MODULE} has no initialize_single_dummy_weight: it is not the vLLM that this is for")
        module.initialize_single_dummy_weight = fill  # type: ignore[attr-defined]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds that one module."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
