"""When a call is over, and when its caller's leaving says so."""

import asyncio

import pytest

from penstock.service.deadline import Deadline


@pytest.mark.parametrize(
    ("remaining_s", "passed_s", "passed", "passed_for_caller"),
    [
        (10.0, 0.0, False, False),
        (10.0, 9.47, False, False),
        (10.0, 9.49, False, True),
        (10.0, 9.71, False, True),  # that of a caller who asked for 9.71 s, behind one who asked for 10
        (10.0, 10.0, True, True),
        (0.03, 0.0, False, False),
        (0.03, 0.02, False, True),
        (0.0, 0.0, True, True),
        (-1.0, 0.0, True, True),
    ],
)
def test_a_deadline(
    monkeypatch: pytest.MonkeyPatch, remaining_s: float, passed_s: float, passed: bool, passed_for_caller: bool
) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "time", lambda: 100.0)
        deadline = Deadline.after(remaining_s)
        assert deadline.at == 100.0 + remaining_s
        monkeypatch.setattr(loop, "time", lambda: 100.0 + passed_s)
        assert (deadline.passed, deadline.passed_for_caller) == (passed, passed_for_caller)
        monkeypatch.undo()

    asyncio.run(scenario())
