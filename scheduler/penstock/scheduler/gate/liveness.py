"""Whether the engine lives and serves: its tick must advance, whatever it does."""

import asyncio
from collections.abc import Callable
from typing import Final

from penstock.scheduler.records.vitals import EngineState, Vitals
from penstock.v1 import SchedulerState

CHECK_SECONDS: Final = 0.25
STALL_SECONDS: Final = 3.0

_STATES: Final = {
    EngineState.STARTING: SchedulerState.STARTING,
    EngineState.SERVING: SchedulerState.SERVING,
    EngineState.RECOVERING: SchedulerState.RECOVERING,
    EngineState.DRAINING: SchedulerState.DRAINING,
}


class Liveness:
    """Watches an engine's vitals. A pause of this process itself is not held against the engine."""

    def __init__(self, vitals: Vitals, on_change: Callable[[SchedulerState], None]) -> None:
        self._vitals = vitals
        self._on_change = on_change
        self.state = SchedulerState.STARTING
        """What the engine did at the last look; UNRESPONSIVE while its tick stands still."""

    def look(self) -> None:
        """Look at the state now; only ``watch`` sees whether the tick advances."""
        self._become(_STATES[self._vitals.state])

    async def watch(self) -> None:
        """Look every 250 ms until cancelled."""
        clock = asyncio.get_running_loop().time
        tick, advanced = self._vitals.tick, clock()
        while True:
            before = clock()
            await asyncio.sleep(CHECK_SECONDS)
            now = clock()
            if self._vitals.tick != tick or now - before > 4 * CHECK_SECONDS:
                tick, advanced = self._vitals.tick, now
            stalled = now - advanced >= STALL_SECONDS
            self._become(SchedulerState.UNRESPONSIVE if stalled else _STATES[self._vitals.state])

    def _become(self, state: SchedulerState) -> None:
        if state != self.state:
            self.state = state
            self._on_change(state)
