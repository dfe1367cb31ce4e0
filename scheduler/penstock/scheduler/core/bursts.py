"""Bursts: plans that the device repeats by itself."""

from typing import Final

from penstock.scheduler.core.blocks import BlockPool
from penstock.scheduler.core.plan_builder import PlanBuilder

DEADLINE_NS: Final = 4_000_000
"""So shortly before a deadline there are no bursts: their tokens, up to 2 ms of work behind another plan, would come
too late all at once."""


def reserve_burst(builder: PlanBuilder, pool: BlockPool, most: int) -> int:
    """For how many steps, at most ``most``, the plan can be a burst; its sequences have the blocks for them then.

    1: it holds something else than decodes, or the free blocks do not suffice, since nobody gives way for a burst. No
    more steps than some sequence can use: what comes behind a sequence's last possible token is wasted.
    """
    if not builder.only_decodes:
        return 1
    repeat = min(most, max(sequence.limit - 1 - sequence.scheduled for sequence in builder.decodes))
    lacking = []
    for sequence in builder.decodes:
        # What would be computed behind a sequence's last token does not count, and needs no block.
        end = min(sequence.scheduled + repeat, sequence.limit - 1)
        lacking.append(max(0, pool.needed(end) - len(sequence.blocks)))
    if sum(lacking) > pool.free:
        return 1
    for sequence, blocks in zip(builder.decodes, lacking, strict=True):
        for _ in range(blocks):
            builder.add_block(sequence, pool)
    return repeat
