"""Something that blocks, on a thread of its own, while this one goes on."""

import threading
from collections.abc import Callable
from typing import Final, TypeVar

_TURN_S: Final = 0.05
T = TypeVar("T")


def run_beside(work: Callable[[], T], meanwhile: Callable[[], None]) -> T:
    """What ``work`` returns; ``meanwhile`` is called twenty times a second until then. Raises what ``work`` raises."""
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # noqa: BLE001  # handed to the caller
            failure.append(error)

    thread = threading.Thread(target=run, name="start", daemon=True)
    thread.start()
    while thread.is_alive():
        meanwhile()
        thread.join(_TURN_S)
    if failure:
        raise failure[0]
    return outcome[0]
