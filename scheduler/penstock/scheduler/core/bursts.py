"""Bursts: plans that the device repeats by itself."""

from penstock.scheduler.core.blocks import BlockPool
from penstock.scheduler.core.plan_builder import PlanBuilder


def reserve_burst(builder: PlanBuilder, pool: BlockPool, repeat: int) -> bool:
    """Whether the plan can be a burst of so many steps; its sequences have the blocks for it then.

    It can if it holds nothing but decodes and the free blocks suffice: nobody gives way for a burst.
    """
    if repeat == 1 or not builder.only_decodes:
        return False
    lacking = []
    for sequence in builder.decodes:
        # What would be computed behind a sequence's last token does not count, and needs no block.
        end = min(sequence.scheduled + repeat, sequence.limit - 1)
        lacking.append(max(0, pool.needed(end) - len(sequence.blocks)))
    if sum(lacking) > pool.free:
        return False
    for sequence, blocks in zip(builder.decodes, lacking, strict=True):
        for _ in range(blocks):
            builder.add_block(sequence, pool)
    return True
