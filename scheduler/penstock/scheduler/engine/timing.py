"""How long steps take, and how early the next plan must be made."""

from collections import deque
from typing import Final

_WINDOW: Final = 1000
_REFRESH: Final = 64
_MARGIN_NS: Final = 300_000
_WEIGHT: Final = 0.1
_JUMP: Final = 2.0
_JUMP_WEIGHT: Final = 0.5
_ACCIDENTS: Final = 2


class StepTimes:
    """Moving means of device times by batch shape, and the lead of late submission (all in nanoseconds).

    A time that departs from its mean by more than a factor of two weighs more: a device that has become slower or
    faster is believed within a few steps.
    lead = 99th percentile of the host's time per plan over the last 1,000 steps + 0.3 ms, at most one step. Of fewer
    than 300 that percentile is an extreme, which one interruption of the host would set: the two slowest never count.
    """

    def __init__(self) -> None:
        self._means: dict[tuple[int, int], float] = {}
        self._host: deque[int] = deque(maxlen=_WINDOW)
        self._host_p99 = 0
        self._observed = 0
        self.period_ns = 0.0
        """Moving mean of the time between results while steps follow one another."""

    @staticmethod
    def shape(decode_rows: int, prefill_rows: int) -> tuple[int, int]:
        """Batches of one shape take about as long: the rows' binary orders of magnitude."""
        return decode_rows.bit_length(), prefill_rows.bit_length()

    def predict(self, shape: tuple[int, int]) -> int:
        """The device time of a step of that shape; 0 if none was seen."""
        return int(self._means.get(shape, 0))

    def lead(self, step_ns: int) -> int:
        """How long before a step's predicted end the next plan is made."""
        return min(self._host_p99 + _MARGIN_NS, step_ns)

    def observe(self, shape: tuple[int, int], device_ns: int, host_ns: int) -> None:
        """A step of that shape took that long on the device, and that long to plan and send."""
        mean = self._means.get(shape, device_ns)
        weight = _WEIGHT if mean / _JUMP <= device_ns <= mean * _JUMP else _JUMP_WEIGHT
        self._means[shape] = mean + weight * (device_ns - mean)
        self._host.append(host_ns)
        self._observed += 1
        if self._observed <= 16 or self._observed % _REFRESH == 0:
            self._host_p99 = _slow_plan(sorted(self._host))

    def observe_period(self, period_ns: int) -> None:
        """Results followed one another by that much."""
        self.period_ns += _WEIGHT * (period_ns - self.period_ns) if self.period_ns else period_ns


def _slow_plan(ordered: list[int]) -> int:
    """The 99th percentile of times in rising order, but never one of the two slowest unless there are no others."""
    return ordered[max(0, min(len(ordered) * 99 // 100, len(ordered) - 1 - _ACCIDENTS))]
