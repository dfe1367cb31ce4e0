"""A scheduler that speaks the link by hand: its answers are what the test says, its faults too."""

import asyncio
import json
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from penstock.rpc.errors import RpcError, not_found, to_failure
from penstock.rpc.handlers import Context
from penstock.rpc.server import Server
from penstock.service.text.files import TokenizerFiles
from penstock.service.text.pieces import byte_level_alphabet
from penstock.v1 import (
    Accepted,
    Ack,
    Cancel,
    CancelReason,
    ConnectRequest,
    ConnectResponse,
    Draining,
    ErrorReason,
    FinishReason,
    GetTokenizerRequest,
    GetTokenizerResponse,
    Hello,
    Limits,
    Load,
    Outputs,
    ProtocolVersion,
    Rejected,
    SampleFinished,
    SchedulerState,
    Submit,
    SubmitPart,
    Welcome,
)

EOS = 256
VOCAB_SIZE = 300
MAX_MODEL_TOKENS = 4096
CHAT_TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ '>' if add_generation_prompt }}"

Answer = Callable[[Submit], list[int]]


def tokenizer_files() -> TokenizerFiles:
    """One token a byte, its id the byte; 256 is the end."""
    tokenizer = Tokenizer(models.BPE(vocab=byte_level_alphabet(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    config = {"eos_token": "<end>", "chat_template": CHAT_TEMPLATE}
    return TokenizerFiles(
        {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}
    )


def u32(*values: int) -> bytes:
    return array("I", values).tobytes()


def ids_of(data: bytes) -> list[int]:
    return array("I", data).tolist()


def says(text: str, end: bool = True) -> Answer:
    """Answer with `text`, then the end token."""
    return lambda submit: [*text.encode(), *([EOS] if end else [])]


@dataclass
class Sequence:
    """An attempt that was accepted."""

    submit: Submit
    ids: list[int]
    made: int = 0
    cancelled: bool = False
    muted: bool = False
    forgotten: bool = False


@dataclass
class FakeScheduler:
    """Serves any number of sessions, whose state outlives their streams, as long as the object lives."""

    answer: Answer = field(default_factory=lambda: says("hello"))
    period_s: float = 0.0
    """Between two tokens; 0: all at once in one message."""
    address: str = "127.0.0.1:0"
    model: str = "tiny"
    replica: str = "replica-1"
    reject: RpcError | None = None
    held: bool = False
    """Accept, and say nothing more of it."""
    muted: bool = False
    """Say nothing at all; the connection stays."""
    gap: bool = False
    """Leave a token out, once."""
    tell_ends: bool = True
    """Say how attempts ended that a stop text has cancelled; of other cancelled ones nothing is said."""
    load: Load = field(default_factory=lambda: Load(state=SchedulerState.SERVING, max_running=8))
    tokenizer: TokenizerFiles = field(default_factory=tokenizer_files)
    tokenizer_answer: TokenizerFiles | None = None
    credentials: grpc.ServerCredentials | None = None
    max_waiting: int = 64
    epoch: int = 1

    def __post_init__(self) -> None:
        self.submits: list[Submit] = []
        self.cancels: list[Cancel] = []
        self.hellos: list[Hello] = []
        self.acked_finished: list[int] = []
        self.parts: dict[bytes, list[SubmitPart]] = {}
        self.sequences: dict[int, Sequence] = {}
        self.sessions: set[bytes] = set()
        self._by_attempt: dict[bytes, int] = {}
        self._server: Server | None = None
        self._streams: set[asyncio.Task[object]] = set()

    async def start(self) -> str:
        server = Server(self.address, credentials=self.credentials, on_error=_unexpected)
        server.add("penstock.v1.SchedulerService", self)
        self.address = await server.start()
        self._server = server
        return self.address

    async def __aenter__(self) -> "FakeScheduler":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Cut every connection and refuse new ones."""
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    def forget(self) -> None:
        """As a process that starts anew."""
        self.sequences.clear()
        self.sessions.clear()
        self._by_attempt.clear()
        self.epoch += 1

    def cut(self) -> None:
        """End every stream without a word."""
        for task in self._streams:
            task.cancel()

    # The rpcs.

    async def get_tokenizer(
        self, request: GetTokenizerRequest, context: Context
    ) -> AsyncIterator[GetTokenizerResponse]:
        if request.digest != self.tokenizer.digest:
            raise not_found(ErrorReason.TOKENIZER_NOT_FOUND, "no such tokenizer")
        for name, content in (self.tokenizer_answer or self.tokenizer).contents.items():
            for start in range(0, len(content), 4096):
                yield GetTokenizerResponse(name=name, data=content[start : start + 4096])

    async def connect(
        self, requests: AsyncIterator[ConnectRequest], context: Context
    ) -> AsyncIterator[ConnectResponse]:
        hello = (await anext(requests)).hello
        assert hello is not None
        self.hellos.append(hello)
        queue: asyncio.Queue[ConnectResponse] = asyncio.Queue()
        sent = dict(zip(ids_of(hello.handles), ids_of(hello.offsets), strict=True))
        queue.put_nowait(ConnectResponse(welcome=self._welcome(hello)))
        self.sessions.add(hello.session)
        tasks = [
            asyncio.create_task(self._listen(requests, queue, sent)),
            asyncio.create_task(self._beat(queue)),
            asyncio.create_task(self._generate(queue, sent)),
        ]
        me = asyncio.current_task()
        assert me is not None
        self._streams.add(me)
        try:
            while True:
                message = await queue.get()
                while self.muted:
                    await asyncio.sleep(0.01)
                yield message
        finally:
            self._streams.discard(me)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _welcome(self, hello: Hello) -> Welcome:
        lost = [handle for handle in ids_of(hello.handles) if handle not in self.sequences]
        return Welcome(
            protocol=ProtocolVersion(major=1, minor=0),
            epoch=self.epoch,
            resumed=hello.session in self.sessions,
            lost_handles=u32(*lost),
            replica=self.replica,
            model=self.model,
            model_digest="weights",
            tokenizer_digest=self.tokenizer.digest,
            vocab_size=VOCAB_SIZE,
            eos_ids=[EOS],
            block_tokens=16,
            limits=Limits(
                max_model_tokens=MAX_MODEL_TOKENS, max_samples=1, max_stop_ids=64, max_waiting=self.max_waiting
            ),
            load=self.load,
        )

    async def _listen(
        self, requests: AsyncIterator[ConnectRequest], queue: asyncio.Queue[ConnectResponse], sent: dict[int, int]
    ) -> None:
        async for request in requests:
            if request.submit is not None:
                queue.put_nowait(self._submitted(request.submit, sent))
            elif request.submit_part is not None:
                self.parts.setdefault(request.submit_part.attempt_id, []).append(request.submit_part)
            elif request.cancel is not None:
                self._cancelled(request.cancel)
            elif request.ack is not None:
                self._acked(request.ack)

    def _submitted(self, submit: Submit, sent: dict[int, int]) -> ConnectResponse:
        self.submits.append(submit)
        if self.reject is not None:
            return ConnectResponse(rejected=Rejected(attempt_id=submit.attempt_id, failure=to_failure(self.reject)))
        handle = self._by_attempt.setdefault(submit.attempt_id, 100 + len(self._by_attempt))
        assert submit.sampling is not None
        ids = self.answer(submit)[: submit.sampling.max_tokens]
        self.sequences.setdefault(handle, Sequence(submit, ids))
        sent.setdefault(handle, 0)
        return ConnectResponse(accepted=Accepted(attempt_id=submit.attempt_id, first_handle=handle))

    def _cancelled(self, cancel: Cancel) -> None:
        self.cancels.append(cancel)
        handle = self._by_attempt.get(cancel.attempt_id)
        if handle is not None:
            self.sequences[handle].cancelled = True
            self.sequences[handle].muted = cancel.reason != CancelReason.STOP_SEQUENCE or not self.tell_ends

    def _acked(self, ack: Ack) -> None:
        for handle in ids_of(ack.finished):
            self.acked_finished.append(handle)
            if handle in self.sequences:
                self.sequences[handle].forgotten = True

    async def _beat(self, queue: asyncio.Queue[ConnectResponse]) -> None:
        while True:
            await asyncio.sleep(0.05)
            if not self.muted:
                queue.put_nowait(ConnectResponse(load=self.load))

    async def _generate(self, queue: asyncio.Queue[ConnectResponse], sent: dict[int, int]) -> None:
        """Say what this stream has not said yet of its sequences."""
        done: set[int] = set()
        while True:
            await asyncio.sleep(self.period_s or 0.002)
            outputs = self._step(sent, done)
            if outputs is not None and not self.muted:
                queue.put_nowait(ConnectResponse(outputs=outputs))

    def _step(self, sent: dict[int, int], done: set[int]) -> Outputs | None:
        handles, offsets, counts, ids = array("I"), array("I"), array("I"), array("I")
        finished = []
        for handle, offset in list(sent.items()):
            sequence = self.sequences.get(handle)
            if sequence is None or self.held or handle in done:
                continue
            if not sequence.cancelled:
                run = sequence.ids[offset : offset + 1] if self.period_s else sequence.ids[offset:]
                if self.gap and offset == 2:
                    self.gap, offset, run = False, 3, sequence.ids[3:4]
                if run:
                    handles.append(handle)
                    offsets.append(offset)
                    counts.append(len(run))
                    ids.extend(run)
                sent[handle] = offset + len(run)
            if sequence.cancelled or sent[handle] >= len(sequence.ids):
                done.add(handle)
                if not sequence.muted:
                    finished.append(self._finish(handle, sequence, sent[handle]))
        if not handles and not finished:
            return None
        return Outputs(handles.tobytes(), offsets.tobytes(), counts.tobytes(), ids.tobytes(), finished=finished)

    def _finish(self, handle: int, sequence: Sequence, tokens: int) -> SampleFinished:
        reason = FinishReason.STOP if sequence.ids[-1:] == [EOS] else FinishReason.LENGTH
        return SampleFinished(
            handle=handle,
            reason=FinishReason.CANCELLED if sequence.cancelled else reason,
            tokens=tokens,
            queue_us=1000,
            prefill_us=2000,
            decode_us=3000,
        )

    def drain(self) -> Draining:
        self.load = Load(state=SchedulerState.DRAINING)
        return Draining(grace_ms=1000)


def _unexpected(method: str, error: BaseException) -> None:
    raise AssertionError(f"{method} failed") from error
