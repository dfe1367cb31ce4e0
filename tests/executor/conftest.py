"""Where a batch can live: every contract test of the worker runs on each."""

from __future__ import annotations

import pytest

from support.by_hand import Kind

HOST = {"device": "cpu", "resident": False}
RESIDENT = {"device": "cpu", "resident": True}
GRAPHS = {"device": "cuda"}
EAGER = {"device": "cuda", "cuda_graphs": False}


ON_DEVICES = [
    pytest.param(RESIDENT, id="resident"),
    pytest.param(GRAPHS, id="graphs", marks=pytest.mark.gpu),
    pytest.param(EAGER, id="eager", marks=pytest.mark.gpu),
]


@pytest.fixture(params=[pytest.param(HOST, id="host"), *ON_DEVICES])
def kind(request: pytest.FixtureRequest) -> Kind:
    """Settings of a ModelSpec."""
    chosen: Kind = request.param
    return chosen


@pytest.fixture(params=ON_DEVICES)
def device_kind(request: pytest.FixtureRequest) -> Kind:
    """The same, of batches that live on a device, be it a CPU."""
    chosen: Kind = request.param
    return chosen
