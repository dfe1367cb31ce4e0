"""The engine, step by step, in the caller's process: the scheduler's core and an executor, nothing between them.

Unlike the engine of a scheduler it plans as early as it can: nobody arrives unless the caller adds a request.
"""

import random
import select
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

from penstock.config.gpu import has_gpu
from penstock.executor.executor import Executor, ExecutorError, Progress, WorkerLost
from penstock.executor.launcher import read_launch, torchrun_ranks
from penstock.executor.models.progress import ProgressBar
from penstock.executor.step import ModelInfo, ModelSpec, unpack_u32
from penstock.local.offline.outputs import CompletionOutput, FinishReason, RequestOutput
from penstock.local.offline.params import SamplingParams
from penstock.local.offline.ranks import Ranks
from penstock.scheduler.core.planner import Core
from penstock.scheduler.core.policies.fcfs import FirstComeFirstServed
from penstock.scheduler.records.commands import Submit, SubmitSample
from penstock.scheduler.records.events import Finish, Finished, Step
from penstock.service.text.encode import Tokenizer
from penstock.service.text.errors import TextError
from penstock.service.text.files import TokenizerFiles
from penstock.service.text.stop import StopStrings
from penstock.service.text.stream import Delta, OutputText

MOST_RESTARTS: Final = 5
_LOOK_S: Final = 1.0
_STEP_S: Final = 600.0
"""For one step, kernels that are compiled for it included."""
_BURST_NS: Final = 2_000_000
"""Device time of a burst."""
_REASONS: Final[dict[int, FinishReason]] = {
    Finish.STOP: "stop",
    Finish.LENGTH: "length",
    Finish.FAILED: "error",
}


class _Sample:
    """One sequence: the output so far, and its text."""

    __slots__ = ("ids", "output", "request", "stops", "text", "unread")

    def __init__(self, request: RequestOutput, output: CompletionOutput, text: OutputText | None, stops: bool) -> None:
        self.request, self.output, self.text, self.stops = request, output, text, stops
        self.ids = array("I")
        self.unread = 0
        """Ids whose text is not read yet, counted from the first of them."""

    def read(self) -> bool:
        """Bring text and token ids up to date; whether a stop text was found."""
        output, fresh = self.output, self.ids[self.unread :]
        self.unread = len(self.ids)
        if self.text is None:
            output.token_ids += fresh
            return False
        delta = self.text.feed(fresh)
        self._take(delta)
        return delta.stopped

    def _take(self, delta: Delta) -> None:
        output = self.output
        output.text += delta.text
        known = len(output.token_ids)
        output.token_ids += self.ids[known : known + delta.token_count]

    def end(self, finished: Finished) -> None:
        """The core is done with it."""
        self.read()
        if self.text is not None:
            self._take(self.text.finish())
        stop = self.text.stop if self.text is not None else None
        self.output.stop_reason = stop
        self.output.finish_reason = "stop" if stop is not None else _REASONS.get(finished.reason, "abort")
        self.output.error = finished.detail or None


class LLMEngine:
    """Requests in, steps, outputs out. Close it, or use it in a ``with``.

    One thread drives it; ``encode`` and ``interrupt`` may be called from any.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        executor: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
        load_format: str = "safetensors",
        max_sequences: int | None = None,
        max_step_tokens: int | None = None,
        max_model_tokens: int | None = None,
        block_tokens: int = 64,
        num_blocks: int | None = None,
        kv_cache_bytes: int | None = None,
        gpu_memory_utilization: float = 0.9,
        attention_backend: str = "auto",
        cuda_graphs: bool = True,
        threads: int | None = None,
        tensor_parallel: int | None = None,
        rank_seconds: float = 300.0,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        """Load the model of a local folder.

        ``executor``: "uniproc" (the model in this process), "multiprocess" (in one of its own), "simulated", or "auto":
        multiprocess if there is a GPU. ``attention_backend``: what attends prompts on a GPU, "triton", "flash_attn" or
        "auto". None: 64 sequences and steps of 512 tokens on a CPU, 256 and 16,384 on a GPU.
        ``tensor_parallel``: ranks that share the model, started by torchrun, None: as many as it has started;
        ``rank_seconds``: how long one waits for another. Several ranks are "uniproc", and each makes the same calls.
        ``seed``: of the seeds that requests do not bring. Raises ExecutorError with one line if it cannot be loaded.
        """
        ranks = torchrun_ranks() if tensor_parallel is None else tensor_parallel
        gpu = device != "cpu" and executor != "simulated" and has_gpu()
        spec = ModelSpec(
            path=str(model),
            load_format=load_format,
            device=device,
            dtype=dtype,
            max_sequences=(256 if gpu else 64) if max_sequences is None else max_sequences,
            max_step_tokens=(16_384 if gpu else 512) if max_step_tokens is None else max_step_tokens,
            max_model_tokens=max_model_tokens,
            block_tokens=block_tokens,
            num_blocks=num_blocks,
            kv_cache_bytes=kv_cache_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            attention_backend=attention_backend,
            cuda_graphs=cuda_graphs,
            plans_in_flight=2,
            threads=threads,
            tensor_parallel=ranks,
            rank_seconds=rank_seconds,
        )
        self.tokenizer = _read_tokenizer(Path(model))
        """None: the folder has none, and prompts must be token ids."""
        bar = ProgressBar() if progress and _is_first(ranks) else None
        self._progress: Progress = bar or (lambda stage, done, total: None)
        begun = time.monotonic()
        self._seeds = random.Random(seed)
        chosen = executor if executor != "auto" else "multiprocess" if gpu and ranks == 1 else "uniproc"
        self.executor: Executor = create_executor(chosen)
        """What computes."""
        try:
            self.info: ModelInfo = self.executor.start(spec, self._progress)
            if bar is not None:
                bar.started(time.monotonic() - begun, self.info.startup_ms)
            self._core = Core(self.info, FirstComeFirstServed(), traced_step_every=1 << 30)
        except BaseException:
            self.executor.shutdown()
            raise
        self._follows = Ranks(self.executor).rank > 0
        self._samples: dict[int, _Sample] = {}
        self._requests: dict[str, list[int]] = {}
        """The handles of each request that has not ended."""
        self._handles = 0
        self._restarts = 0
        self._interrupted = False
        self._step_ns = 0
        """Device time of the last step."""

    # ---- requests ----

    def add_request(
        self, request_id: str, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> RequestOutput:
        """Queue a request; its output fills up with the steps.

        Raises ValueError for an id that is taken, for text where there is no tokenizer, and for a prompt that does not
        fit.
        """
        text = prompt if isinstance(prompt, str) else None
        return self.add_encoded(request_id, text, self.encode(prompt), params or SamplingParams())

    def add_encoded(
        self, request_id: str, prompt: str | None, ids: "array[int]", params: SamplingParams
    ) -> RequestOutput:
        """As add_request, with what ``encode`` made of the prompt; ``prompt``: its text, if it was one."""
        if self._follows:
            raise ExecutorError("this rank follows rank 0, which alone takes requests: call LLM.generate in all ranks")
        if request_id in self._requests:
            raise ValueError(f"request {request_id!r} is there already")
        texts = [self._text(ids, params) for _ in range(params.n)]
        outputs = [CompletionOutput(index) for index in range(params.n)]
        request = RequestOutput(request_id, prompt, ids.tolist(), outputs)
        first = self._handles + 1
        handles = list(range(first, first + params.n))
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed
        self._core.submit(
            Submit(
                tuple(SubmitSample(handle, index, seed) for index, handle in enumerate(handles)),
                ids.tobytes(),
                params.sampling(),
                self._max_tokens(len(ids), params),
                time.monotonic_ns(),
                params.min_tokens,
                params.stop_ids(),
                params.ignore_eos,
            )
        )
        self._handles += params.n
        self._requests[request_id] = handles
        for handle, output, text in zip(handles, request.outputs, texts, strict=True):
            self._samples[handle] = _Sample(request, output, text, bool(params.stop))
        return request

    def encode(self, prompt: str | Sequence[int]) -> "array[int]":
        """The token ids of a prompt, as ``array("I")``. Raises ValueError if they do not fit; any thread may call."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("the model has no tokenizer: give the prompt as token ids")
            ids: array[int] = self.tokenizer.encode(prompt)
        else:
            try:
                ids = array("I", prompt)
            except (TypeError, OverflowError) as error:
                raise ValueError(f"a prompt must be text or token ids: {error}") from error
        room = self.info.max_model_tokens
        if not 1 <= len(ids) < room:
            raise ValueError(f"a prompt of {len(ids)} tokens; it must have at least 1 and fewer than {room}")
        if max(ids) >= self.info.vocab_size:
            raise ValueError(f"token id {max(ids)} is outside the vocabulary of {self.info.vocab_size}")
        return ids

    def _max_tokens(self, prompt: int, params: SamplingParams) -> int:
        room = self.info.max_model_tokens - prompt
        return room if params.max_tokens is None else min(params.max_tokens, room)

    def _text(self, ids: "array[int]", params: SamplingParams) -> OutputText | None:
        if self.tokenizer is None:
            if params.stop:
                raise ValueError("the model has no tokenizer: stop texts cannot be found")
            return None
        return OutputText(self.tokenizer.detokenizer(ids), StopStrings(params.stop) if params.stop else None)

    def abort_request(self, request_id: str) -> None:
        """End a request; an unknown one is ignored."""
        for handle in self._requests.get(request_id, ()):
            self._core.cancel(handle, time.monotonic_ns())

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._samples)

    # ---- steps ----

    def step(self) -> list[RequestOutput]:
        """Go on by at least one result; returns the requests that have something new, up to date.

        Raises ExecutorError if the executor cannot go on.
        """
        changed: dict[str, RequestOutput] = {}
        for sample in self.turn():
            sample.read()
            changed[sample.request.request_id] = sample.request
        return list(changed.values())

    def turn(self) -> "list[_Sample]":
        """One turn without reading texts but where stop texts are looked for; the samples that have something new."""
        try:
            self._submit_plans()
            if self._core.in_flight:
                self._absorb()
        except WorkerLost as lost:
            self._recover(lost)
        record = self._core.take_output()
        return [] if record is None else self._deliver(record)

    def _submit_plans(self) -> None:
        core = self._core
        while core.has_work and core.in_flight < self.info.plans_in_flight:
            plan = core.plan(time.monotonic_ns(), self._max_repeat())
            if plan is None:
                return
            self.executor.submit(plan)

    def _max_repeat(self) -> int:
        """How many steps like the last one make a burst."""
        return max(1, min(self.info.max_repeat, _BURST_NS // self._step_ns)) if self._step_ns else 1

    def _absorb(self) -> None:
        """Wait for a result, and take in all that are there. Raises ExecutorError if none comes."""
        give_up = time.monotonic() + _STEP_S
        while True:
            if time.monotonic() > give_up:
                raise ExecutorError(f"no result within {_STEP_S:.0f} s")
            if self._interrupted:
                raise ExecutorError("the step was interrupted")
            select.select([self.executor.fileno()], [], [], _LOOK_S)
            results = self.executor.results()
            if results:
                break
            self.executor.check_health()
        now = time.monotonic_ns()
        for result in results:
            flight = self._core.absorb(result, now)
            self._step_ns = result.device_ns // flight.repeat if flight else 0

    def _deliver(self, record: Step) -> "list[_Sample]":
        ids, start, changed = unpack_u32(record.ids), 0, []
        for handle, count in zip(unpack_u32(record.handles), record.counts, strict=True):
            sample = self._samples[handle]
            sample.ids += ids[start : start + count]
            start += count
            changed.append(sample)
            if sample.stops and sample.output.finish_reason is None and sample.read():
                self._core.cancel(handle, time.monotonic_ns())
        for finished in record.finished:
            changed.append(self._end(finished))
        return changed

    def _end(self, finished: Finished) -> _Sample:
        sample = self._samples.pop(finished.handle)
        sample.end(finished)
        request, arrival = sample.request, finished.arrival_ns
        if finished.first_token_ns:
            first = (finished.first_token_ns - arrival) / 1e9
            request.first_token_s = first if request.first_token_s is None else min(first, request.first_token_s)
        if request.finished:
            request.finished_s = (finished.finished_ns - arrival) / 1e9
            del self._requests[request.request_id]
        return sample

    def _recover(self, lost: WorkerLost) -> None:
        """Begin a new epoch with another worker. Raises ExecutorError if that happens too often."""
        self._core.lose_epoch(time.monotonic_ns())
        while True:
            self._restarts += 1
            if self._restarts > MOST_RESTARTS:
                raise ExecutorError(f"lost the worker {self._restarts} times: {lost}")
            try:
                self.executor.restart(self._progress)
            except WorkerLost as again:
                lost = again
            else:
                return

    # ---- end ----

    def interrupt(self) -> None:
        """Let a step that waits for a result raise ExecutorError within a second. Any thread may call it.

        After that the engine is good for nothing but ``close``.
        """
        self._interrupted = True

    def close(self) -> None:
        """End the executor. Idempotent."""
        self.executor.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def create_executor(name: str) -> Executor:
    """The executor of that name. Raises ValueError for an unknown one."""
    match name:
        case "uniproc":
            from penstock.executor.uniproc import UniprocExecutor

            return UniprocExecutor()
        case "multiprocess":
            from penstock.executor.multiprocess import MultiprocessExecutor

            return MultiprocessExecutor(log_level="warning")
        case "simulated":
            from penstock.executor.simulated import SimulatedExecutor

            return SimulatedExecutor()
        case _:
            raise ValueError(f"executor {name!r} is not known: auto, uniproc, multiprocess or simulated")


def _is_first(ranks: int) -> bool:
    """Whether this process is the one that draws progress."""
    return ranks <= 1 or read_launch().rank == 0


def _read_tokenizer(folder: Path) -> Tokenizer | None:
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        return Tokenizer(TokenizerFiles.from_directory(folder))
    except TextError as error:
        raise ExecutorError(f"{folder}: {error}") from error
