"""How much of a GPU's memory the pages get: what is left once all else has its share, with the arithmetic to tell."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.executor.executor import ExecutorError
from penstock.executor.step import ModelSpec
from penstock.executor.worker.kv_cache import PageShape

GRAPH_BYTES = 24 * 2**20
"""Set aside for each size of decode step that is captured; what they took is measured afterwards and reported."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes of a GPU, before the pages are allocated."""

    total: int
    """The GPU's memory."""
    used: int
    """What is taken now: weights, state, and what other processes have."""
    step: int
    """The most that one step takes for a while."""
    graphs: int
    """Set aside for CUDA graphs."""
    utilization: float

    @property
    def room(self) -> int:
        """What the pages may take; may be negative."""
        return int(self.total * self.utilization) - self.used - self.step - self.graphs

    def __str__(self) -> str:
        """The arithmetic."""
        share = f"{self.utilization:.2f} × {_gib(self.total)}"
        return f"{share} − {_gib(self.used)} in use − {_gib(self.step)} a step − {_gib(self.graphs)} for graphs"


def count_device_blocks(spec: ModelSpec, shape: PageShape, longest: int, budget: Budget) -> int:
    """Blocks of the pool: as many as asked for, else what the memory holds, at most what all slots can use.

    ``longest``: most tokens of a sequence. Raises ExecutorError with the arithmetic if not one sequence of that length
    fits, unless fewer blocks were asked for by number.
    """
    per_sequence = -(-longest // spec.block_tokens)
    room = budget.room if spec.kv_cache_bytes is None else spec.kv_cache_bytes
    fitting = max(0, room // shape.block_bytes - 1)  # one more is the scratch block
    if spec.num_blocks is not None:
        if spec.num_blocks > max(0, budget.room // shape.block_bytes - 1):
            fault = f"{spec.num_blocks} blocks of {_gib(shape.block_bytes)} do not fit: {budget}"
            raise ExecutorError(f"{spec.path}: {fault}")
        return spec.num_blocks
    if fitting < per_sequence:
        needed = (per_sequence + 1) * shape.block_bytes
        raise ExecutorError(
            f"{spec.path}: one sequence of {longest} tokens needs {_gib(needed)} of key/value pages, there are "
            f"{_gib(max(0, room))} ({budget}); lower max_model_tokens or raise gpu_memory_utilization"
        )
    return min(fitting, spec.max_sequences * per_sequence)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
