"""How the ranks of one model find each other: torch.distributed's store at MASTER_ADDR, then gloo, and NCCL for GPUs.

The groups are this model's own: torch.distributed's default group is neither made nor used, so that a script may have
one for itself.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final, cast

import msgspec
import torch
from torch import distributed

from penstock.executor.executor import ExecutorError
from penstock.executor.launcher import read_launch
from penstock.executor.layers.parallel import ALONE, Backend, Group, GroupError
from penstock.executor.models.errors import one_line
from penstock.executor.step import ModelSpec

OWN_SETTINGS: Final = frozenset({"path", "threads"})
"""What a rank may have otherwise than the others: the checkpoint's contents are compared, not where they are."""
LEAST_RANK_SECONDS: Final = 1.0
"""Several beats of rank 0 (:mod:`penstock.executor.worker.lockstep`)."""


def join_ranks(spec: ModelSpec) -> Group:
    """Meet the other ranks of ``spec.tensor_parallel``. Each of them must call this as often as the others.

    Raises ExecutorError if this process was not started as one of so many, if they do not meet in time, or if they have
    different settings.
    """
    if spec.tensor_parallel < 1:
        raise ExecutorError(f"tensor_parallel is {spec.tensor_parallel}, must be at least 1")
    if not spec.rank_seconds >= LEAST_RANK_SECONDS:
        raise ExecutorError(f"rank_seconds is {spec.rank_seconds}, must be at least {LEAST_RANK_SECONDS:.0f}")
    if spec.tensor_parallel == 1:
        return ALONE
    launched = read_launch()
    if launched.size != spec.tensor_parallel:
        raise ExecutorError(f"tensor_parallel is {spec.tensor_parallel}, and {launched.size} ranks were started")
    if not distributed.is_available() or not distributed.is_gloo_available():
        raise ExecutorError("this build of torch has no gloo, through which ranks talk")
    try:
        group = Group(launched.rank, launched.size, _connect(spec))
    except RuntimeError as error:
        raise GroupError(f"the {launched.size} ranks did not meet: {one_line(error)}") from error
    try:
        _require_same_settings(group, spec)
    except ExecutorError:
        group.close()
        raise
    return group


def _connect(spec: ModelSpec) -> dict[str, Backend]:
    """The backends by type of device. Raises RuntimeError."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    deadline = timedelta(seconds=spec.rank_seconds)
    store, rank, size = next(iter(rendezvous("env://", timeout=deadline)))
    # A script may start one model after another: those that are the n-th to come are the n-th group's.
    generation = (store.add("penstock/joined", 1) - 1) // size
    gloo = distributed.ProcessGroupGloo(PrefixStore(f"penstock/{generation}/gloo", store), rank, size, deadline)
    backends = {"cpu": cast(Backend, gloo)}
    if spec.device != "cpu" and torch.cuda.is_available() and distributed.is_nccl_available():
        options = distributed.ProcessGroupNCCL.Options()
        options._timeout = deadline
        place = PrefixStore(f"penstock/{generation}/nccl", store)
        nccl = distributed.ProcessGroupNCCL(place, rank, size, options)
        backends["cuda"] = cast(Backend, nccl)
    return backends


def _require_same_settings(group: Group, spec: ModelSpec) -> None:
    settings = [msgspec.json.decode(data, type=ModelSpec) for data in group.exchange(msgspec.json.encode(spec))]
    for name in ModelSpec.__struct_fields__:
        for rank, other in enumerate(settings):
            mine, first = getattr(other, name), getattr(settings[0], name)
            if name not in OWN_SETTINGS and mine != first:
                raise ExecutorError(f"{name} is {first!r} in rank 0 and {mine!r} in rank {rank}")
