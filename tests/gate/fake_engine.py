"""An engine that speaks the rings and computes nothing: what it does with an attempt is said by the prompt's first id.

Token n of a sample is ``(sum of the prompt + n) mod VOCAB``. Its load report doubles as a window: ``steps`` counts
submits, ``preemptions`` cancelled handles, ``preemptions_in_flight`` whether it was told to drain.
"""

import sys
import time
from array import array
from dataclasses import dataclass, field

from penstock.executor.ring import RingHandle, RingReader, RingWriter
from penstock.executor.step import ModelInfo, unpack_u32
from penstock.scheduler.records import commands, events
from penstock.scheduler.records.startup import EngineArguments
from penstock.scheduler.records.vitals import EngineState, Vitals

VOCAB = 1000
EOS = 2
MAX_MODEL_TOKENS = 100_000
SLOTS = 4

HOLD, STEADY, FAIL, BURST, EXIT, GARBAGE, LOSE_TOKENS = 10, 11, 12, 13, 14, 15, 16
STEP_S = 0.001

INFO = ModelInfo(
    model_digest="weights",
    vocab_size=VOCAB,
    eos_ids=(EOS,),
    max_model_tokens=MAX_MODEL_TOKENS,
    max_sequences=SLOTS,
    max_step_tokens=512,
    block_tokens=16,
    num_blocks=1000,
    plans_in_flight=1,
    tokens_ahead=0,
)


def token(prompt_sum: int, number: int) -> int:
    """Token ``number`` of a sample."""
    return (prompt_sum + number) % VOCAB


def tokens(prompt: list[int], count: int) -> list[int]:
    """All tokens of a sample."""
    return [token(sum(prompt), number) for number in range(count)]


@dataclass
class Sequence:
    """One sample that lives."""

    submit: commands.Submit
    what: int
    prompt_sum: int
    made: int
    begun_ns: int = field(default_factory=time.monotonic_ns)


class FakeEngine:
    """The loop."""

    def __init__(self, arguments: EngineArguments) -> None:
        self.commands = RingReader(RingHandle.decode(arguments.commands))
        self.events = RingWriter(RingHandle.decode(arguments.events))
        self.vitals = Vitals(arguments.vitals_fd)
        self.live: dict[int, Sequence] = {}
        self.submits = self.cancels = 0
        self.draining = False
        self.ends: list[events.Finished] = []
        self.spans: list[events.SpanEvent] = []
        self.steps: list[events.StepSpan] = []

    def run(self) -> None:
        """Until Shutdown."""
        self.events.put(events.encode(events.Started(INFO)))
        self.vitals.set_state(EngineState.SERVING)
        next_load = 0.0
        while True:
            self.vitals.beat()
            while (data := self.commands.get()) is not None:
                command = commands.decode(data)
                if isinstance(command, commands.Shutdown):
                    return
                self.obey(command)
            self.step()
            if time.monotonic() >= next_load:
                next_load = time.monotonic() + 0.02
                self.events.put(events.encode(events.LoadReport(self.load())))
            time.sleep(STEP_S)

    def load(self) -> events.Load:
        return events.Load(
            0, 0, 0, len(self.live), SLOTS, 1000, 1000, 0, self.submits, self.cancels, int(self.draining)
        )

    def obey(self, command: commands.Command) -> None:
        match command:
            case commands.Submit():
                prompt = unpack_u32(command.prompt_ids)
                for sample in command.samples:
                    self.submits += 1
                    delivered = len(sample.delivered_ids) // 4
                    self.live[sample.handle] = Sequence(command, prompt[0], sum(prompt), delivered)
            case commands.Cancel(handles):
                for handle in unpack_u32(handles):
                    self.cancels += 1
                    self.end(handle, events.Finish.CANCELLED)
            case commands.Drain():
                self.draining = True
                self.vitals.set_state(EngineState.DRAINING)

    def step(self) -> None:
        """A token for all that are steady, and whatever the others do."""
        handles, offsets, ids = array("I"), array("I"), array("I")
        counts = bytearray()
        now = time.monotonic_ns()
        for handle, one in list(self.live.items()):
            if one.submit.deadline_ns and now >= one.submit.deadline_ns:
                self.end(handle, events.Finish.DEADLINE)
                continue
            count = self.count(one)
            if count:
                handles.append(handle)
                offsets.append(one.made)
                counts.append(count)
                ids.extend(token(one.prompt_sum, one.made + i) for i in range(count))
                one.made += count
                self.trace(handle, one, now)
            self.end_if_due(handle, one)
        if handles or self.ends:
            ends, self.ends = tuple(self.ends), []
            spans, self.spans = tuple(self.spans), []
            steps, self.steps = tuple(self.steps), []
            record = events.Step(handles.tobytes(), offsets.tobytes(), bytes(counts), ids.tobytes(), ends, spans, steps)
            while not self.events.put(events.encode(record)):
                time.sleep(STEP_S)

    def count(self, one: Sequence) -> int:
        left = one.submit.max_tokens - one.made
        match one.what:
            case 11 | 16:
                return min(left, 1)
            case 13:
                return min(left, 100)
            case 14:
                sys.exit(7)
            case 15:
                self.events.put(b"\xc1 no record")
        return 0

    def end_if_due(self, handle: int, one: Sequence) -> None:
        if one.what == FAIL:
            self.end(handle, events.Finish.FAILED, "not a number")
        elif one.made >= one.submit.max_tokens:
            if one.what == LOSE_TOKENS:
                one.made += 1
            self.end(handle, events.Finish.LENGTH)

    def end(self, handle: int, reason: events.Finish, detail: str = "") -> None:
        one = self.live.pop(handle, None)
        if one is None:
            return
        now = time.monotonic_ns()
        if one.submit.traced:
            self.spans.append(events.SpanEvent(events.Span.DECODE, handle, one.begun_ns, now, one.made))
            self.spans.append(events.SpanEvent(events.Span.PREEMPTED, handle, now, now, 5, cause="blocks"))
            self.spans.append(events.SpanEvent(events.Span.QUEUED, handle, now, now))
        arrival = one.submit.arrival_ns
        self.ends.append(
            events.Finished(
                handle, reason, one.made, arrival, arrival + 1000, arrival + 3000, arrival + 6000, 0, 1, detail
            )
        )

    def trace(self, handle: int, one: Sequence, now: int) -> None:
        if one.submit.traced and one.made == 1:
            submit = one.submit
            self.spans += [
                events.SpanEvent(events.Span.QUEUED, handle, submit.arrival_ns, one.begun_ns, step=16),
                events.SpanEvent(events.Span.PREFILL, handle, one.begun_ns, now, len(submit.prompt_ids) // 4, 16),
                events.SpanEvent(events.Span.FIRST_TOKEN, handle, now, now, step=16),
            ]
            told = array("I", [handle]).tobytes()
            self.steps.append(events.StepSpan(16, one.begun_ns, now, 1000, 2000, 0, 3, 1, 0, told, 4000, 2))


if __name__ == "__main__":
    FakeEngine(EngineArguments.parse(sys.argv[1])).run()
