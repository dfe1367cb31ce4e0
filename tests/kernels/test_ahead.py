"""Compiling side by side, for a GPU that is not there: the compilers are real, the device is not."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from penstock.kernels import ahead, dispatch

if dispatch.INTERPRETED:
    pytest.skip("an interpreted kernel is not compiled", allow_module_level=True)
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

PARTIES_SECONDS = 60
CPU = torch.device("cpu")


@dataclass(slots=True)
class Device:
    """What Triton asks of a driver: a Hopper GPU that loads whatever it is given."""

    built: list[str] = field(default_factory=list)
    """Threads that built a launcher."""
    launched: list[int] = field(default_factory=list)
    """Grids."""
    utils: Any = None

    def __post_init__(self) -> None:
        self.utils = self

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        self.built.append(threading.current_thread().name)
        return lambda grid, *_: self.launched.append(grid)

    @staticmethod
    def get_current_target() -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    @staticmethod
    def get_current_device() -> int:
        return 0

    @staticmethod
    def get_current_stream(device: int) -> int:
        return 0

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    @staticmethod
    def load_binary(*_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()
    monkeypatch.setattr(triton.runtime.driver, "_active", found)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    return found


def kernel_of(body: Callable[..., None]) -> Any:
    """A kernel that nobody has compiled."""
    return triton.jit(body)


def copy_kernel(source, target, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    at = tl.arange(0, SIZE)
    tl.store(target + at, tl.load(source + at))


def wrong_kernel(source, target, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    tl.store(target, tl.load(source) + tl.arange(0, SIZE + 1))


def test_kernels_are_compiled_at_the_same_time_and_not_launched(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting, compile_kernel = threading.Barrier(2), triton.compiler.compile

    def met(*arguments: Any, **options: Any) -> Any:
        meeting.wait(PARTIES_SECONDS)
        return compile_kernel(*arguments, **options)

    monkeypatch.setattr(triton.compiler, "compile", met)
    kernel, source, target = kernel_of(copy_kernel), torch.zeros(64), torch.zeros(64)
    with ahead.compiled_ahead(CPU):
        for size in (32, 64, 32):
            ahead.launch(kernel, (size,))(source, target, size)
    assert sorted(name.rpartition("_")[0] for name in device.built) == ["penstock-compile"] * 2
    assert device.launched == []
    for size in (64, 32):
        ahead.launch(kernel, (size,))(source, target, size)
    assert device.launched == [64, 32]
    assert len(device.built) == 2, "nothing was compiled by the launches"


def test_a_kernel_that_cannot_be_compiled_says_so_when_it_is_launched(device: Device) -> None:
    wrong, right, tensor = kernel_of(wrong_kernel), kernel_of(copy_kernel), torch.zeros(64)
    with ahead.compiled_ahead(CPU):
        ahead.launch(wrong, (1,))(tensor, tensor, 32)
        ahead.launch(right, (1,))(tensor, tensor, 32)
    assert len(device.built) == 1
    with pytest.raises(triton.CompilationError):
        ahead.launch(wrong, (1,))(tensor, tensor, 32)
    assert device.launched == []


def test_an_error_inside_ends_it(device: Device) -> None:
    kernel, tensor = kernel_of(copy_kernel), torch.zeros(64)
    with pytest.raises(LookupError), ahead.compiled_ahead(CPU):
        raise LookupError
    ahead.launch(kernel, (5,))(tensor, tensor, 32)
    assert device.launched == [5]
