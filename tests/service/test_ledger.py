"""What is known of a link's attempts, what is said of them, and to whom new ones go."""

import asyncio
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from penstock.rpc.errors import RpcError
from penstock.service.attempts import Attempt
from penstock.service.catalogue import ModelFacts
from penstock.service.columns import BadColumn, pack_u32, unpack_u32
from penstock.service.errors import scheduler_lost
from penstock.service.ledger import Ledger, ProtocolFault
from penstock.service.outbox import PART_BYTES, Outbox
from penstock.service.router import LeastLoaded
from penstock.v1 import (
    Accepted,
    Ack,
    CancelReason,
    ErrorReason,
    Failure,
    FinishReason,
    Hello,
    Load,
    Outputs,
    Rejected,
    SampleFailed,
    SampleFinished,
    Submit,
    Welcome,
)
from service.fake_scheduler import ids_of, u32


def new(ledger: Ledger, name: bytes, handle: int | None = None) -> Attempt:
    attempt = Attempt(Submit(attempt_id=name))
    ledger.add(attempt)
    if handle is not None:
        ledger.accepted(Accepted(attempt_id=name, first_handle=handle))
    return attempt


def outputs(*runs: tuple[int, int, list[int]], finished: Sequence[SampleFinished] = ()) -> Outputs:
    return Outputs(
        handles=u32(*(handle for handle, _, _ in runs)),
        offsets=u32(*(offset for _, offset, _ in runs)),
        counts=u32(*(len(ids) for _, _, ids in runs)),
        ids=u32(*(token for _, _, ids in runs for token in ids)),
        finished=list(finished),
    )


def columns(ack: Ack) -> tuple[list[int], list[int], list[int]]:
    return ids_of(ack.handles), ids_of(ack.offsets), ids_of(ack.finished)


def test_columns() -> None:
    assert unpack_u32(pack_u32([1, 2**32 - 1])) == array("I", [1, 2**32 - 1])
    assert pack_u32([1]) == b"\x01\x00\x00\x00"
    with pytest.raises(BadColumn):
        unpack_u32(b"abc")


def test_outputs_reach_their_attempts_and_are_acknowledged_once() -> None:
    ledger = Ledger()
    one, two = new(ledger, b"1", 7), new(ledger, b"2", 9)
    ledger.outputs(outputs((9, 0, [5, 6]), (7, 0, [1]), (8, 0, [3])))
    assert (one.received, two.received) == (1, 2)
    assert columns(ledger.ack()) == ([7, 9], [1, 2], [])
    assert columns(ledger.ack()) == ([], [], [])
    ledger.outputs(outputs((7, 1, [2]), finished=[SampleFinished(handle=7, tokens=2), SampleFinished(handle=8)]))
    assert one.complete
    assert one not in ledger
    assert columns(ledger.ack()) == ([], [], [7, 8])


def test_an_end_that_overtakes_its_tokens_is_not_acknowledged_before_them() -> None:
    ledger = Ledger()
    one = new(ledger, b"1", 7)
    ledger.outputs(outputs(finished=[SampleFinished(handle=7, tokens=1)]))
    assert one in ledger
    assert columns(ledger.ack()) == ([], [], [])
    ledger.outputs(outputs((7, 0, [1])))
    ledger.remove(one)
    assert columns(ledger.ack()) == ([], [], [7])


def test_failures_and_rejections_are_typed() -> None:
    async def scenario() -> None:
        ledger = Ledger()
        failure = Failure(code=13, reason=ErrorReason.SEQUENCE_FAILED, message="NaN")
        one, two = new(ledger, b"1", 7), new(ledger, b"2")
        ledger.outputs(Outputs(failed=[SampleFailed(handle=7, failure=failure)]))
        ledger.rejected(Rejected(attempt_id=b"2", failure=failure))
        for attempt in (one, two):
            with pytest.raises(RpcError) as caught:
                await attempt.take()
            assert caught.value.reason == ErrorReason.SEQUENCE_FAILED
        assert len(ledger) == 0
        assert columns(ledger.ack()) == ([], [], [7])

    asyncio.run(scenario())


def test_a_lost_attempt_does_not_touch_the_next_owner_of_its_handle() -> None:
    """A scheduler that starts anew numbers from the beginning; an owner whose reader is slow lets go late."""
    ledger = Ledger()
    old = new(ledger, b"1", 7)
    ended = new(ledger, b"2", 8)
    ledger.outputs(outputs(finished=[SampleFinished(handle=8)]))
    assert ended.complete
    ledger.resumed(Welcome(epoch=2, resumed=False))
    assert columns(ledger.ack()) == ([], [], []), "handles of the earlier life mean nothing to this one"
    young = new(ledger, b"3", 7)
    assert old not in ledger
    ledger.remove(old)
    assert young in ledger
    ledger.outputs(outputs((7, 0, [1])))
    assert young.received == 1


@pytest.mark.parametrize(
    "message",
    [
        outputs((7, 1, [1])),
        Outputs(handles=u32(7), offsets=u32(0), counts=u32(2), ids=u32(1)),
        Outputs(handles=u32(7), offsets=u32(), counts=u32(1), ids=u32(1)),
        Outputs(handles=b"abc"),
    ],
)
def test_gaps_and_torn_columns_are_faults(message: Outputs) -> None:
    ledger = Ledger()
    new(ledger, b"1", 7)
    with pytest.raises(ProtocolFault):
        ledger.outputs(message)


def test_resuming_names_what_is_waited_for() -> None:
    ledger = Ledger()
    one, two, three = new(ledger, b"1", 7), new(ledger, b"2", 9), new(ledger, b"3")
    ledger.outputs(outputs((9, 0, [5, 6])))
    hello = Hello()
    ledger.resume(hello)
    assert (ids_of(hello.handles), ids_of(hello.offsets)) == ([7, 9], [0, 2])
    ledger.resumed(Welcome(resumed=True, lost_handles=u32(7)))
    assert [attempt.complete for attempt in (one, two, three)] == [True, False, False]
    assert list(ledger.unaccepted()) == [three]
    ledger.resumed(Welcome(resumed=False))
    assert [attempt.complete for attempt in (one, two, three)] == [True, True, False]
    ledger.fail_all(scheduler_lost())
    assert [attempt.complete for attempt in (one, two, three)] == [True, True, True]
    assert len(ledger) == 0


def test_a_removed_attempt_is_dropped_when_it_is_heard_of() -> None:
    ledger = Ledger()
    one = new(ledger, b"1")
    ledger.remove(one)
    ledger.accepted(Accepted(attempt_id=b"1", first_handle=7))
    ledger.outputs(outputs((7, 0, [1]), finished=[SampleFinished(handle=7, reason=FinishReason.CANCELLED)]))
    assert one.received == 0
    assert columns(ledger.ack()) == ([], [], [7])


def _acknowledging(outbox: Outbox) -> bool:
    return outbox.acknowledging


def test_cancels_overtake_prompts_whose_parts_take_turns() -> None:
    async def scenario() -> None:
        outbox = Outbox()
        long = b"\x01" * (2 * PART_BYTES + 4)
        outbox.submit(Submit(attempt_id=b"long", prompt_ids=long))
        outbox.submit(Submit(attempt_id=b"gone", prompt_ids=long))
        first = (await outbox.next()).submit
        assert first is not None
        assert len(first.prompt_ids) == PART_BYTES
        outbox.submit(Submit(attempt_id=b"short", prompt_ids=b"\x01" * 4))
        outbox.cancel(b"gone", CancelReason.CLIENT)
        outbox.acknowledge(Ack())
        assert _acknowledging(outbox)
        said = [await outbox.next() for _ in range(5)]
        assert said[0].cancel is not None
        assert said[1].ack is not None
        parts = [message.submit_part for message in said if message.submit_part is not None]
        assert [(part.attempt_id, part.index, len(part.prompt_ids)) for part in parts] == [
            (b"long", 1, PART_BYTES),
            (b"long", 2, 4),
        ]
        submits = [message.submit for message in said if message.submit is not None]
        assert [submit.attempt_id for submit in submits] == [b"short"]
        assert not _acknowledging(outbox)
        waiting = asyncio.ensure_future(outbox.next())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        outbox.cancel(b"short", CancelReason.CLIENT)
        assert (await waiting).cancel is not None

    asyncio.run(scenario())


FACTS = ModelFacts(
    name="m",
    digest="d",
    tokenizer_digest="t",
    vocab_size=10,
    eos_ids=(1,),
    max_model_tokens=100,
    max_stop_ids=64,
    max_waiting=4,
    adapters=(),
)
OTHER = ModelFacts(
    name="m",
    digest="d",
    tokenizer_digest="other",
    vocab_size=10,
    eos_ids=(1,),
    max_model_tokens=100,
    max_stop_ids=64,
    max_waiting=4,
    adapters=(),
)


@dataclass
class Scheduler:
    facts: ModelFacts | None = FACTS
    usable: bool = True
    load: Load = field(default_factory=lambda: Load(max_running=8))
    unreported: int = 0


def test_the_router_prefers_room() -> None:
    busy = Scheduler(load=Load(running=4, max_running=8))
    large = Scheduler(load=Load(running=10, max_running=100))
    asked = Scheduler(load=Load(max_running=8), unreported=7)
    assert LeastLoaded().choose(FACTS, 1, [busy, large, asked]) is large
    assert LeastLoaded().choose(FACTS, 1, [asked, busy]) is busy


def test_the_router_never_takes_what_cannot_serve() -> None:
    full = Scheduler(load=Load(waiting=4, max_running=8))
    unfit = [Scheduler(usable=False), Scheduler(facts=None), Scheduler(facts=OTHER)]
    good = Scheduler(load=Load(running=80, max_running=8))
    assert LeastLoaded().choose(FACTS, 1, [full, *unfit, good]) is good
    with pytest.raises(RpcError) as caught:
        LeastLoaded().choose(FACTS, 1, [full, *unfit])
    assert caught.value.reason == ErrorReason.QUEUE_FULL
    with pytest.raises(RpcError) as caught:
        LeastLoaded().choose(FACTS, 1, unfit)
    assert caught.value.reason == ErrorReason.NO_SCHEDULER
