"""What the engine sends, into the samples that it is about."""

from collections.abc import Callable
from typing import Final

import grpc

from penstock.executor.step import unpack_u32
from penstock.rpc.errors import RpcError, deadline_exceeded, to_failure
from penstock.scheduler.gate.admission import Admission
from penstock.scheduler.gate.attempts import Attempt, AttemptTable, Sample
from penstock.scheduler.gate.outbox import Outbox
from penstock.scheduler.gate.spans import Spans
from penstock.scheduler.records import events
from penstock.scheduler.records.events import Finish
from penstock.telemetry.logging import get_logger
from penstock.v1 import ErrorReason, FinishReason, SampleFailed, SampleFinished

_REASONS: Final = {
    Finish.STOP: FinishReason.STOP,
    Finish.LENGTH: FinishReason.LENGTH,
    Finish.TIME_LIMIT: FinishReason.TIME_LIMIT,
    Finish.CANCELLED: FinishReason.CANCELLED,
}

log = get_logger(__name__)


class EngineOutputs:
    """Takes each Step record: columns first, then spans, then ends; then wakes the streams that have something."""

    def __init__(self, table: AttemptTable, admission: Admission, spans: Spans) -> None:
        self._table = table
        self._admission = admission
        self._spans = spans
        self._touched: set[Outbox] = set()

    def take(self, step: events.Step) -> None:
        """Apply one record."""
        self._take_tokens(step)
        if step.spans or step.steps:
            self._spans.take(step)
        for finished in step.finished:
            self._finish(finished)
        self._wake()

    def _wake(self) -> None:
        for outbox in self._touched:
            outbox.on_output()
        self._touched.clear()

    def _take_tokens(self, step: events.Step) -> None:
        """Append each run to its sample. Steady decoding comes here with one id a run, hundreds a record."""
        handles, ids = unpack_u32(step.handles), unpack_u32(step.ids)
        find, mark = self._table.samples.get, self._mark
        if len(ids) == len(handles):
            for handle, token in zip(handles, ids, strict=True):
                sample = find(handle)
                if sample is not None:
                    sample.ids.append(token)
                    if not sample.pending:
                        mark(sample)
            return
        start = 0
        for handle, count in zip(handles, step.counts, strict=True):
            end = start + count
            sample = find(handle)
            if sample is not None:
                sample.ids.extend(ids[start:end])
                if not sample.pending:
                    mark(sample)
            start = end

    def _mark(self, sample: Sample) -> None:
        """The sample has something to say."""
        outbox = sample.outbox
        outbox.add(sample)
        self._touched.add(outbox)
        if not sample.started:
            sample.started = outbox.urgent = True
            self._note_start(sample.attempt)

    def _note_start(self, attempt: Attempt) -> None:
        if not attempt.started:
            attempt.started = True
            self._admission.started(attempt.prompt_tokens)

    # ---- ends ----

    def _finish(self, finished: events.Finished) -> None:
        sample = self._table.samples.get(finished.handle)
        if sample is None or sample.end is not None:
            return
        if finished.tokens != sample.total:
            log.error("engine.lost_tokens", handle=sample.handle, told=finished.tokens, seen=sample.total)
            self.end(sample, _failed(sample, _internal("tokens were lost inside the scheduler")))
        else:
            self.end(sample, _end_of(sample, finished))

    def end(self, sample: Sample, end: SampleFinished | SampleFailed) -> None:
        """The engine knows the sample no more; its service is told at once, if it wants to know."""
        sample.end = end
        attempt = sample.attempt
        attempt.session.unacknowledged += 1
        attempt.live -= 1
        if not attempt.live:
            self._admission.leave(attempt.prompt_tokens, attempt.started)
            if attempt.trace is not None:
                self._spans.end(attempt.trace, sample)
        if sample.muted:
            attempt.session.forget(sample)
            return
        if not sample.pending:
            sample.outbox.add(sample)
        if not attempt.in_doubt:
            sample.outbox.urgent = True
            self._touched.add(sample.outbox)

    def fail_all(self, error: Callable[[], RpcError]) -> None:
        """Every attempt ends here."""
        for sample in self._table.live():
            self.end(sample, _failed(sample, error()))
        self._wake()


def _end_of(sample: Sample, finished: events.Finished) -> SampleFinished | SampleFailed:
    reason = Finish(finished.reason)
    if reason is Finish.DEADLINE:
        return _failed(sample, deadline_exceeded())
    if reason is Finish.FAILED:
        return _failed(sample, _internal(finished.detail or "the sequence failed", ErrorReason.SEQUENCE_FAILED))
    started = finished.started_ns or finished.finished_ns
    first = finished.first_token_ns or finished.finished_ns
    return SampleFinished(
        handle=sample.handle,
        reason=_REASONS[reason],
        tokens=finished.tokens,
        cached_tokens=finished.cached_tokens,
        queue_us=_microseconds(finished.arrival_ns, started),
        prefill_us=_microseconds(started, first),
        decode_us=_microseconds(first, finished.finished_ns),
        preemptions=finished.preemptions,
    )


def _microseconds(start_ns: int, end_ns: int) -> int:
    return max(end_ns - start_ns, 0) // 1000


def _failed(sample: Sample, error: RpcError) -> SampleFailed:
    return SampleFailed(handle=sample.handle, failure=to_failure(error))


def _internal(message: str, reason: ErrorReason = ErrorReason.INTERNAL) -> RpcError:
    return RpcError(grpc.StatusCode.INTERNAL, reason, message)
