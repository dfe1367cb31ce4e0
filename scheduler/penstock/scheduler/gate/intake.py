"""From a Submit to a queued attempt: known already, checked, admitted, complete, handed to the engine."""

import time
from collections.abc import Callable
from functools import partial
from typing import Final

from penstock.rpc.errors import RpcError, deadline_exceeded
from penstock.scheduler.gate.admission import Admission, not_serving
from penstock.scheduler.gate.attempts import AttemptTable
from penstock.scheduler.gate.checks import ModelLimits, check_submit
from penstock.scheduler.gate.engine_process import EngineProcess
from penstock.scheduler.gate.parts import PARTS_SECONDS, Assembly, too_slow
from penstock.scheduler.gate.sessions import Session
from penstock.scheduler.gate.spans import AttemptTrace, Spans
from penstock.v1 import SchedulerState, Submit, SubmitPart

MAX_REMAINING_MS: Final = 10 * 366 * 24 * 3600 * 1000
"""Deadlines beyond ten years are none."""

MAX_UNACKNOWLEDGED: Final = 4096
"""Ended samples that a service may leave unacknowledged before it gets no new ones."""

_TAKING: Final = frozenset({SchedulerState.SERVING, SchedulerState.RECOVERING})


class Intake:
    """Of one engine that has started."""

    def __init__(
        self,
        limits: ModelLimits,
        table: AttemptTable,
        admission: Admission,
        engine: EngineProcess,
        spans: Spans,
        state: Callable[[], SchedulerState],
    ) -> None:
        self._limits = limits
        self._table = table
        self._admission = admission
        self._engine = engine
        self._spans = spans
        self._state = state

    def submit(self, session: Session, submit: Submit) -> None:
        """Answered by Accepted or Rejected, once the whole prompt is there."""
        attempt = session.attempts.get(submit.attempt_id)
        if attempt is not None:
            session.accept_again(attempt)
        elif submit.attempt_id not in session.assemblies:
            try:
                self._begin(session, submit)
            except RpcError as error:
                session.reject(submit.attempt_id, error)

    def part(self, session: Session, part: SubmitPart) -> None:
        """More of a prompt; of an attempt that was rejected or cancelled it is ignored."""
        assembly = session.assemblies.get(part.attempt_id)
        if assembly is None:
            return
        try:
            assembly.add(part, self._limits)
        except RpcError as error:
            self._refuse(session, part.attempt_id, error)
            return
        if assembly.complete:
            self._complete(session, part.attempt_id)

    def _begin(self, session: Session, submit: Submit) -> None:
        arrival_ns = time.monotonic_ns()
        checked = check_submit(submit, self._limits)
        deadline_ns = _deadline(arrival_ns, submit.remaining_ms)
        self._check_room(session)
        self._admission.enter(checked.prompt_tokens)
        give_back = partial(self._admission.leave, checked.prompt_tokens, False)
        assembly = Assembly(checked, arrival_ns, deadline_ns, give_back)
        session.assemblies[submit.attempt_id] = assembly
        if assembly.complete:
            self._complete(session, submit.attempt_id)
        else:
            assembly.expect_within(PARTS_SECONDS, lambda: self._refuse(session, submit.attempt_id, too_slow()))

    def _check_room(self, session: Session) -> None:
        """Raise UNAVAILABLE or RESOURCE_EXHAUSTED if nothing can be taken now."""
        self._admission.refuse_if_draining()
        if self._state() not in _TAKING:
            raise not_serving()
        if self._engine.congested or session.unacknowledged >= MAX_UNACKNOWLEDGED:
            raise self._admission.queue_full()

    def _refuse(self, session: Session, attempt_id: bytes, error: RpcError) -> None:
        assembly = session.assemblies.pop(attempt_id, None)
        if assembly is not None:
            assembly.drop()
            session.reject(attempt_id, error)

    def _complete(self, session: Session, attempt_id: bytes) -> None:
        """The attempt begins. Its parts may have taken longer than its deadline: the engine sees to that."""
        assembly = session.assemblies.pop(attempt_id)
        checked = assembly.checked
        samples = ((index, len(delivered) // 4) for index, _, delivered in checked.samples)
        attempt = self._table.create(session, attempt_id, checked.prompt_tokens, samples)
        session.attempts[attempt_id] = attempt
        attempt.trace = self._begin_trace(assembly, attempt_id)
        self._engine.send(
            checked.to_command(
                assembly.finish(),
                attempt.first_handle,
                arrival_ns=assembly.arrival_ns,
                deadline_ns=assembly.deadline_ns,
                traced=attempt.trace is not None,
            )
        )
        session.accept(attempt)

    def _begin_trace(self, assembly: Assembly, attempt_id: bytes) -> AttemptTrace | None:
        checked = assembly.checked
        return self._spans.begin(
            checked.traceparent,
            assembly.arrival_ns,
            {
                "penstock.attempt": attempt_id.hex(),
                "penstock.request_id": checked.request_id,
                "penstock.tenant": checked.tenant,
                "penstock.prompt_tokens": checked.prompt_tokens,
            },
        )


def _deadline(arrival_ns: int, remaining_ms: int | None) -> int:
    """CLOCK_MONOTONIC nanoseconds; 0: none. Raises DEADLINE_EXCEEDED if it has passed."""
    if remaining_ms == 0:
        raise deadline_exceeded()
    if remaining_ms is None or remaining_ms > MAX_REMAINING_MS:
        return 0
    return arrival_ns + remaining_ms * 1_000_000
