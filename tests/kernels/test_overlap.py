"""Where launches may overlap: where the GPU can and it pays, inside the block, in this thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from penstock.kernels import overlap
from penstock.kernels.dispatch import INTERPRETED
from penstock.kernels.overlap import launch_options, overlap_pays, overlapped, overlaps


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that can."""
    monkeypatch.setattr(overlap, "can_overlap", lambda: True)


@pytest.mark.parametrize(("capability", "can"), [((8, 0), False), ((9, 0), True), ((12, 0), True)])
def test_older_gpus_cannot(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], can: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert overlap.can_overlap.__wrapped__() is (can and not INTERPRETED)


def test_without_a_gpu_nothing_overlaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not overlap.can_overlap.__wrapped__()


@pytest.mark.usefixtures("hopper")
def test_launches_overlap_inside_the_block() -> None:
    assert not overlaps(1)
    assert launch_options(1) == {}
    with overlapped(1024):
        assert overlaps(1)
        assert launch_options(1) == {"launch_pdl": True}
        assert not overlaps(1000)
        assert launch_options(1000) == {}
        assert overlaps(64)
        with overlapped(4096):
            assert not overlaps(64)
        assert overlaps(64)
        with ThreadPoolExecutor(1) as pool:
            assert not pool.submit(overlaps, 1).result()
    assert not overlaps(1)


@pytest.mark.usefixtures("hopper")
def test_an_error_ends_the_block() -> None:
    with pytest.raises(RuntimeError), overlapped(1024):
        raise RuntimeError
    assert not overlaps(1)


def test_nothing_overlaps_where_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "can_overlap", lambda: False)
    with overlapped(1024):
        assert not overlaps(1)


def test_large_steps_do_not_overlap() -> None:
    assert overlap_pays(1, 1024)
    assert overlap_pays(64, 1024)
    assert not overlap_pays(32, 1024)
    assert not overlap_pays(64, 4096)
    assert not overlap_pays(256, 1024)
