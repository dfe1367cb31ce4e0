"""What a launcher such as torchrun tells each process that it starts, through the environment (torch-free).

The variables are those of ``torch.distributed``'s "env://" rendezvous: RANK, WORLD_SIZE, LOCAL_RANK, and MASTER_ADDR
and MASTER_PORT, where the ranks meet.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from penstock.executor.executor import ExecutorError

TORCHRUN: Final = "TORCHELASTIC_RUN_ID"
"""torchrun sets it for every process that it starts, and nobody else does."""
_MEETING: Final = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Launched:
    """This process among those that were started together."""

    rank: int
    size: int
    local_rank: int
    """Among those of this machine: the number of its GPU."""


def torchrun_ranks(environment: Mapping[str, str] = os.environ) -> int:
    """How many ranks torchrun has started; 1 if this process is none of them. Raises ExecutorError."""
    return read_launch(environment).size if TORCHRUN in environment else 1


def read_launch(environment: Mapping[str, str] = os.environ) -> Launched:
    """What the launcher said. Raises ExecutorError, naming the variable, if there was none or it makes no sense."""
    for name in _MEETING:
        if not environment.get(name):
            raise ExecutorError(f"{name} is not set: the ranks must be started by torchrun")
    size = _natural(environment, "WORLD_SIZE")
    rank, local_rank = _natural(environment, "RANK"), _natural(environment, "LOCAL_RANK")
    if rank >= size:
        raise ExecutorError(f"RANK is {rank}, must be below WORLD_SIZE {size}")
    return Launched(rank, size, local_rank)


def _natural(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None:
        raise ExecutorError(f"{name} is not set: the ranks must be started by torchrun")
    if not text.isdecimal():
        raise ExecutorError(f"{name} is {text!r:.40}, must be a whole number")
    return int(text)
