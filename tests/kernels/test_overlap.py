"""Where launches may overlap: where it pays, inside the block, in this thread, and never interpreted."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from penstock.kernels.dispatch import INTERPRETED
from penstock.kernels.overlap import launch_options, overlap_pays, overlapped, overlaps


def test_launches_overlap_inside_the_block() -> None:
    assert not overlaps()
    assert launch_options() == {}
    with overlapped():
        assert overlaps() is not INTERPRETED
        assert launch_options() == ({} if INTERPRETED else {"launch_pdl": True})
        with overlapped(False):
            assert not overlaps()
        with ThreadPoolExecutor(1) as pool:
            assert not pool.submit(overlaps).result()
    assert not overlaps()


def test_an_error_ends_the_block() -> None:
    with pytest.raises(RuntimeError), overlapped():
        raise RuntimeError
    assert not overlaps()


def test_large_steps_do_not_overlap() -> None:
    assert overlap_pays(1, 1024)
    assert overlap_pays(64, 1024)
    assert not overlap_pays(32, 1024)
    assert not overlap_pays(64, 4096)
    assert not overlap_pays(256, 1024)
