"""Runs plans on a device, a step ahead of their results.

:meth:`DeviceRunner.launch` changes the state on the device and launches a step without waiting for it; by then the
step before may still run. :meth:`DeviceRunner.collect`, on another thread, waits for the oldest one and returns what
it made. Everything that a step needs to know of the one before it, the tokens it sampled above all, is on the device.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from penstock.executor.executor import ExecutorError
from penstock.executor.step import SlotFailure, StepPlan, StepResult
from penstock.executor.worker.device.attention import ChunkRows
from penstock.executor.worker.device.graphs import DecodeGraphs
from penstock.executor.worker.device.mirror import Chunk, Ints, Mirror, Step
from penstock.executor.worker.device.prefill_graphs import PrefillGraphs
from penstock.executor.worker.device.program import MixedStep, Program
from penstock.executor.worker.device.sizes import graph_size, step_size
from penstock.executor.worker.device.timeline import CudaTimeline, HostTimeline, Mark
from penstock.executor.worker.device.upload import Upload, Words
from penstock.executor.worker.slots import Capacity
from penstock.kernels.attention.decode_shapes import Spread

MAX_REPEAT = 8
"""Most steps of one burst."""
_FAILED = 2
_NOT_FINITE = "the model's logits are not finite"
_NOTHING = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens of one step of a plan on their way to the host."""

    memory: Tensor
    """int32 [2 · samples], tokens and statuses, once ``arrived``"""
    arrived: Mark


@dataclass(frozen=True, slots=True)
class Launched:
    """A plan whose step is launched."""

    epoch: int
    number: int
    rows: Ints
    samples: Ints
    sample_rows: Ints
    steps: Sequence[Sampled]
    failures: list[SlotFailure]
    begin: Mark
    end: Mark
    host_ns: int


class DeviceRunner:
    """See :class:`penstock.executor.worker.runner.Runner`. launch and collect are called by one thread each."""

    def __init__(
        self,
        program: Program,
        graphs: DecodeGraphs,
        prefills: PrefillGraphs,
        capacity: Capacity,
        max_step_tokens: int,
        device: torch.device,
    ) -> None:
        """``program`` computes on ``device``; ``graphs`` are its decode steps, ``prefills`` its short prompts.

        What has been launched of them so far was to meet them.
        """
        self._program, self._graphs, self._prefills = program, graphs, prefills
        self._capacity, self._device = capacity, device
        self._timeline = CudaTimeline(device) if device.type == "cuda" else HostTimeline()
        self._upload = Upload(self._timeline, device, 16 * (max_step_tokens + capacity.max_sequences) + 4096)
        self._mirror = Mirror(capacity, program.layout)
        self._launched: queue.SimpleQueue[Launched] = queue.SimpleQueue()
        self._memory: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        self._downloaded: Mark | None = None
        self._epoch = 0
        self._number = 0
        if program.few_rows is not None:
            program.few_rows.restart()

    def take_thread(self) -> None:
        """Called once by each thread that uses this."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        torch.get_num_threads()

    # ---- launch ----

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> None:
        """Apply the plan and launch its step.

        A slot of which something impossible is asked fails alone. Raises ExecutorError for a plan out of order or of a
        kind that is not offered, ValueError for a malformed one.
        """
        started = time.perf_counter_ns()
        self._take_turn(plan)
        self._mirror.apply(plan)
        step = self._mirror.compose(plan.repeat)
        begin = self._timeline.mark()
        steps = self._launch_mixed(step) if step.chunks else self._launch_decodes(step, plan.repeat)
        self._launched.put(
            Launched(
                plan.epoch,
                plan.number,
                step.rows,
                step.samples,
                step.sample_rows,
                steps,
                self._mirror.failures,
                begin,
                self._timeline.mark(),
                time.perf_counter_ns() - started,
            )
        )

    def _take_turn(self, plan: StepPlan) -> None:
        if plan.epoch != self._epoch:
            self._epoch, self._number = plan.epoch, 0
            self._mirror = Mirror(self._capacity, self._program.layout)
            self._program.forget()
        if plan.number != self._number + 1:
            raise ExecutorError(f"plan {plan.number} came where {self._number + 1} was due")
        self._number = plan.number
        if plan.copies or not 1 <= plan.repeat <= MAX_REPEAT:
            raise ExecutorError(f"plan {plan.number} asks for block copies or too long a burst")

    def _launch_decodes(self, step: Step, repeat: int) -> list[Sampled]:
        (words,) = self._upload.send([self._mirror.changes.take().reshape(-1)])
        self._program.apply(words)
        rows = len(step.decodes)
        if not rows:
            return []
        steps = []
        few = self._graphs.takes_few(rows) and not step.filtered
        for _ in range(repeat):
            if few:
                steps.append(self._download(self._graphs.few(rows, longest=step.longest), rows))
                continue
            self._graphs.decode(rows, spread=step.spread)
            self._timeline.settle(self._downloaded)
            self._graphs.choose(rows, filtered=step.filtered)
            steps.append(self._fetch(rows))
        return steps

    def _launch_prefill(self, step: Step, size: int) -> list[Sampled]:
        """A step of known ids alone, by a graph of ``size`` rows."""
        changes, packed = self._upload.send(
            [self._mirror.changes.take().reshape(-1), self._prefills.pack(step.chunks, size)]
        )
        self._program.apply(changes)
        self._prefills.compute(size, packed)
        if not len(step.samples):
            return []
        self._timeline.settle(self._downloaded)
        self._prefills.choose(filtered=step.filtered)
        return [self._fetch(len(step.samples))]

    def _launch_mixed(self, step: Step) -> list[Sampled]:
        size = self._prefills.size_of(step)
        if size is not None:
            return self._launch_prefill(step, size)
        words, *sections = self._upload.send(
            [self._mirror.changes.take().reshape(-1), *_chunk_sections(step, self._program)]
        )
        self._program.apply(words)
        ids, positions, slots, chunk_slots, query_start, contexts, chosen, sample_slots = sections
        longest = max(chunk.ids.size for chunk in step.chunks)
        cached = sum(chunk.start for chunk in step.chunks)
        chunks = ChunkRows(chunk_slots, query_start, contexts, longest, cached)
        mixed = MixedStep(ids, positions, slots, chunks, chosen, sample_slots)
        samples = self._program.mixed(len(step.decodes), mixed, spread=step.spread)
        if not samples:
            return []
        self._timeline.settle(self._downloaded)
        self._program.choose_mixed(mixed, filtered=step.filtered)
        return [self._fetch(samples)]

    def _fetch(self, samples: int) -> Sampled:
        """Start to bring the tokens of the step to the host; they must be there before the next ones are chosen."""
        output = self._program.output
        sampled = self._download((output.tokens, output.status), samples)
        self._downloaded = sampled.arrived
        return sampled

    def _download(self, made: Iterable[Tensor], samples: int) -> Sampled:
        """``made``: tokens and statuses, int32 [≥ samples]."""
        try:
            memory = self._memory.get_nowait()
        except queue.Empty:
            memory = self._timeline.memory(2 * self._capacity.max_sequences)
        tokens, status = made
        pairs = [
            (memory[:samples], tokens[:samples]),
            (memory[self._capacity.max_sequences :][:samples], status[:samples]),
        ]
        return Sampled(memory, self._timeline.download(pairs))

    # ---- collect ----

    def collect(self) -> StepResult:
        """Wait for the oldest plan launched, and tell what it made."""
        launched = self._launched.get()
        tokens, counts, failed = self._read(launched)
        launched.end.wait()
        row_counts = np.zeros(len(launched.rows), np.uint8)
        row_counts[launched.sample_rows] = counts
        order = np.argsort(launched.sample_rows, kind="stable")
        made = np.arange(tokens.shape[1]) < counts[order, None]
        return StepResult(
            epoch=launched.epoch,
            number=launched.number,
            counts=row_counts.tobytes(),
            ids=tokens[order][made].tobytes(),
            failed=(*launched.failures, *failed),
            device_ns=launched.end.since(launched.begin),
            host_ns=launched.host_ns,
        )

    def _read(self, launched: Launched) -> tuple[Words, Ints, list[SlotFailure]]:
        """Tokens int32 [samples, steps], how many of each sample count, and who failed."""
        samples = len(launched.samples)
        tokens = np.zeros((samples, len(launched.steps)), np.int32)
        counts = np.zeros(samples, np.int64)
        failed: list[SlotFailure] = []
        for number, step in enumerate(launched.steps):
            step.arrived.wait()
            words = step.memory.numpy()
            status = words[self._capacity.max_sequences :][:samples]
            tokens[:, number] = words[:samples]
            counts += status == 1
            failed += [SlotFailure(int(slot), _NOT_FINITE) for slot in launched.samples[status == _FAILED]]
            self._memory.put(step.memory)
        return tokens, counts, failed

    # ---- measurement ----

    def logits(self, rows: int) -> Tensor:
        """[rows, vocabulary]: those of the last step, in the order of its samples. For tests."""
        return self._program.logits[:rows]

    @torch.inference_mode()
    def replay(self, rows: int, steps: int) -> list[int]:
        """Nanoseconds of each of ``steps`` steps of the decode batch with nothing between them.

        For measurements: nobody is told a token, and afterwards the batch is where it was, so that plans may compute
        the same steps. The pages of its sequences must have room for these steps. Nothing may be in flight.
        """
        before = self._program.state.arena.clone()
        longest = int(self._program.state.computed.max()) + steps
        marks = [self._timeline.mark()]
        for _ in range(steps):
            if self._graphs.takes_few(rows):
                self._graphs.few(rows, longest=longest)
            else:
                self._graphs.decode(rows, spread=Spread.EVEN)
                self._graphs.choose(rows, filtered=False)
            marks.append(self._timeline.mark())
        self._program.state.arena.copy_(before)
        marks[-1].wait()
        return [end.since(begin) for begin, end in pairwise(marks)]


def _chunk_sections(step: Step, program: Program) -> list[Words]:
    """What :class:`MixedStep` holds, in its order of fields, padded to sizes that the start has met."""
    chunks, decodes, nobody = step.chunks, len(step.decodes), program.layout.slots
    lengths = np.array([chunk.ids.size for chunk in chunks], np.int64)
    ends = np.cumsum(lengths)
    last_rows = [int(end) - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.completes]
    rows, samples = int(ends[-1]), len(step.samples)
    padded_rows = step_size(decodes + rows, program.max_rows) - decodes
    padded_samples = graph_size(samples, nobody) if samples else 0
    return [
        _padded([chunk.ids for chunk in chunks], padded_rows, 0),
        _padded([_positions(chunk) for chunk in chunks], padded_rows, 0),
        _padded([np.repeat(np.array([chunk.slot for chunk in chunks], np.int32), lengths)], padded_rows, nobody),
        np.array([chunk.slot for chunk in chunks], np.int32),
        np.concatenate(([0], ends)).astype(np.int32),
        np.array([chunk.start + chunk.ids.size for chunk in chunks], np.int32),
        _padded([np.arange(decodes), decodes + np.array(last_rows, np.int64)], padded_samples, 0),
        step.samples.astype(np.int32),
    ]


def _positions(chunk: Chunk) -> Words:
    return np.arange(chunk.start, chunk.start + chunk.ids.size, dtype=np.int32)


def _padded(parts: Sequence[Words | Ints], size: int, filling: int) -> Words:
    padded = np.full(size, filling, np.int32)
    joined = np.concatenate(parts)
    padded[: joined.size] = joined
    return padded
