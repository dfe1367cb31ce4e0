"""Where a batch can live: every contract test of the worker runs on each."""

from __future__ import annotations

import pytest

from penstock.executor.worker.device import start
from support.by_hand import Kind

HOST = {"device": "cpu", "resident": False}
RESIDENT = {"device": "cpu", "resident": True}
GRAPHS = {"device": "cuda"}
EAGER = {"device": "cuda", "cuda_graphs": False}


FEW_ROWS = "few_rows"
"""No setting: steps of few rows are computed by their own kernels in float32, too."""

ON_DEVICES = [
    pytest.param(RESIDENT, id="resident"),
    pytest.param({**RESIDENT, FEW_ROWS: True}, id="few rows"),
    pytest.param({**GRAPHS, FEW_ROWS: True}, id="few rows, graphs", marks=pytest.mark.gpu),
    pytest.param(GRAPHS, id="graphs", marks=pytest.mark.gpu),
    pytest.param(EAGER, id="eager", marks=pytest.mark.gpu),
]


@pytest.fixture(params=[pytest.param(HOST, id="host"), *ON_DEVICES])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kind:
    """Settings of a ModelSpec."""
    return settings(request, monkeypatch)


@pytest.fixture(params=ON_DEVICES)
def device_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kind:
    """The same, of batches that live on a device, be it a CPU."""
    return settings(request, monkeypatch)


def settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kind:
    """What the fixture was parametrised with, once it is arranged."""
    chosen: Kind = dict(request.param)
    if chosen.pop(FEW_ROWS, False):
        monkeypatch.setattr(start, "computes_few_rows", lambda device, dtype: True)
    return chosen
