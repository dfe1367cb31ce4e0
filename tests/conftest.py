"""What holds for every test."""

from __future__ import annotations

import functools

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked ``gpu`` are skipped where there is none."""
    if item.get_closest_marker("gpu") and not _has_gpu():
        pytest.skip("needs an NVIDIA GPU")


@functools.cache
def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
