"""What crosses between gate and engine.

``commands``: gate → engine. ``events``: engine → gate. ``vitals``: a page of shared memory that says
whether the engine lives. Both rings carry one msgpack record a message, sums tagged by their first element.

**Who waits when a ring is full.** Nobody blocks. The gate keeps what the command ring does not take in a bounded
backlog: a submit that finds the backlog full is refused with QUEUE_FULL, a cancel is always kept (there are at most as
many as attempts). The engine keeps the records that the event ring does not take, in order; while it has any it makes
no further plan, so that its memory is bounded by the steps in flight, and it goes on ticking.
"""
