"""An executor without a model: its answers can be computed by hand, its pace is set.

The "model": a hash runs over the ids, h₋₁ = 0 and hₚ = (31 · hₚ₋₁ + idₚ + 1) mod 2³², and the token after position p is
hₚ mod V. :func:`answer` computes it. Instead of keys and values, position p's place in the paged pool holds hₚ, and a
step reads its predecessor from there *through the block table*: a wrong table, a block that was given to two sequences
or one that was freed too early changes the answer. Sampling parameters but the stop conditions are ignored.

The "device" takes ``step_us`` for each step (a burst has several) and works on one plan after another; 0: no time at
all.
"""

import hashlib
import json
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from penstock.executor.executor import ExecutorError, Progress
from penstock.executor.step import (
    MAX_STOP_IDS,
    Admission,
    Fragment,
    ModelInfo,
    ModelSpec,
    StepPlan,
    StepResult,
)
from penstock.executor.timer import TimerFd

_FACTOR: Final = 31
_MASK: Final = 0xFFFFFFFF
_DEFAULT_MODEL_TOKENS: Final = 4096
_NO_ID: Final = -1

MAX_REPEAT: Final = 8
"""Most steps of a burst."""

Ints = npt.NDArray[np.int64]


def answer(ids: Iterable[int], vocab_size: int, stop_ids: Iterable[int] = ()) -> int:
    """The token that follows ``ids``; ``stop_ids`` are those that may not be chosen yet (min_tokens)."""
    state = 0
    for token in ids:
        state = (_FACTOR * state + token + 1) & _MASK
    return _avoid(state % vocab_size, vocab_size, frozenset(stop_ids))


def _avoid(token: int, vocab_size: int, banned: frozenset[int]) -> int:
    """The token, or the next one that is not banned; the token itself if all are."""
    candidates = ((token + step) % vocab_size for step in range(vocab_size))
    return next((candidate for candidate in candidates if candidate not in banned), token)


class SimulatedDevice:
    """Slots and pool. ``execute`` applies a plan and computes it at once."""

    def __init__(self, info: ModelInfo) -> None:
        slots = info.max_sequences
        self._info = info
        self._block = info.block_tokens
        self._pool: npt.NDArray[np.uint32] = np.zeros(info.num_blocks * info.block_tokens, np.uint32)
        self._table: Ints = np.zeros((slots, -(-info.max_model_tokens // info.block_tokens)), np.int64)
        self._blocks: Ints = np.zeros(slots, np.int64)
        self._ids: list[Ints] = [np.empty(0, np.int64)] * slots
        self._known: Ints = np.zeros(slots, np.int64)
        self._computed: Ints = np.zeros(slots, np.int64)
        self._last: Ints = np.zeros(slots, np.int64)
        self._made: Ints = np.zeros(slots, np.int64)
        self._least: Ints = np.zeros(slots, np.int64)
        self._most: Ints = np.zeros(slots, np.int64)
        self._stops: Ints = np.full((slots, MAX_STOP_IDS), _NO_ID, np.int64)
        self._active: npt.NDArray[np.bool_] = np.zeros(slots, np.bool_)
        self._inert: npt.NDArray[np.bool_] = np.ones(slots, np.bool_)
        self._rows: Ints = np.empty(0, np.int64)

    # ---- differences ----

    def execute(self, plan: StepPlan) -> StepResult:
        """Apply the plan and compute its step. Raises ExecutorError if it breaks the contract."""
        for slot in _ints(plan.release):
            self._inert[slot] = True
            self._active[slot] = False
        for admission in plan.admissions:
            self._admit(admission)
        for fragment in plan.fragments:
            self._extend(fragment)
        for slot, block in zip(_ints(plan.block_slots), _ints(plan.block_ids), strict=True):
            self._table[slot, self._blocks[slot]] = block
            self._blocks[slot] += 1
        self._active[_ints(plan.hold)] = False
        scheduled = dict(zip(_ints(plan.schedule_slots).tolist(), _ints(plan.schedule_rows).tolist(), strict=True))
        if plan.rows is not None:
            self._rows = _ints(plan.rows)
        if plan.repeat > 1:
            return self._burst(plan)
        return self._compute(plan, scheduled)

    def _burst(self, plan: StepPlan) -> StepResult:
        """The step again and again, each row by its own tokens."""
        steps = [self._compute(plan, {}) for _ in range(plan.repeat)]
        made: list[list[int]] = [[] for _ in self._rows]
        for step in steps:
            tokens = iter(np.frombuffer(step.ids, np.uint32).tolist())
            for row, count in enumerate(step.counts):
                made[row] += [next(tokens) for _ in range(count)]
        ids = np.array([token for row in made for token in row], np.uint32)
        return StepResult(plan.epoch, plan.number, bytes(len(row) for row in made), ids.tobytes())

    def _admit(self, admission: Admission) -> None:
        slot = admission.slot
        if not self._inert[slot] and self._blocks[slot]:
            raise ExecutorError(f"slot {slot} is admitted to while it is taken")
        stops = _ints(admission.stopping.stop_ids)
        self._stops[slot] = _NO_ID
        self._stops[slot, : len(stops)] = stops
        self._ids[slot] = _ints(admission.ids)
        self._known[slot] = admission.total_ids
        self._made[slot] = admission.total_ids - admission.prompt_ids
        self._least[slot] = admission.stopping.min_tokens
        self._most[slot] = min(admission.stopping.max_tokens, self._info.max_model_tokens - admission.prompt_ids)
        self._computed[slot] = 0
        self._blocks[slot] = 0
        self._active[slot] = False
        self._inert[slot] = False

    def _extend(self, fragment: Fragment) -> None:
        self._ids[fragment.slot] = np.concatenate([self._ids[fragment.slot], _ints(fragment.ids)])

    # ---- the step ----

    def _compute(self, plan: StepPlan, scheduled: dict[int, int]) -> StepResult:
        rows = self._rows
        samples = np.zeros(len(rows), np.bool_)
        chunked = [i for i, slot in enumerate(rows.tolist()) if slot in scheduled] if scheduled else []
        decoding = self._active[rows] & ~self._inert[rows]
        for i in chunked:
            slot = int(rows[i])
            if self._inert[slot]:
                continue
            if self._computed[slot] < self._known[slot]:
                samples[i] = self._compute_chunk(slot, scheduled[slot])
            else:
                decoding[i] = True
                self._active[slot] = True
        if decoding.any():
            self._compute_decodes(rows[decoding])
            samples |= decoding
        tokens = self._sample(rows[samples])
        return StepResult(plan.epoch, plan.number, samples.astype(np.uint8).tobytes(), tokens)

    def _compute_chunk(self, slot: int, count: int) -> bool:
        """Compute that many known ids; whether the next token is to be sampled."""
        start = int(self._computed[slot])
        state = int(self._pool[self._place(slot, start - 1)]) if start else 0
        for position, token in enumerate(self._ids[slot][start : start + count].tolist(), start):
            state = (_FACTOR * state + token + 1) & _MASK
            self._pool[self._place(slot, position)] = state
        self._computed[slot] = start + count
        self._active[slot] = start + count == self._known[slot]
        return bool(self._active[slot])

    def _place(self, slot: int, position: int) -> int:
        return int(self._table[slot, position // self._block]) * self._block + position % self._block

    def _places(self, slots: Ints, positions: Ints) -> Ints:
        places: Ints = self._table[slots, positions // self._block] * self._block + positions % self._block
        return places

    def _compute_decodes(self, slots: Ints) -> None:
        positions = self._computed[slots]
        states = self._pool[self._places(slots, positions - 1)].astype(np.int64)
        states = (_FACTOR * states + self._last[slots] + 1) & _MASK
        self._pool[self._places(slots, positions)] = states
        self._computed[slots] = positions + 1

    def _sample(self, slots: Ints) -> bytes:
        """Sample and stop, as the contract says; returns the tokens, u32."""
        states = self._pool[self._places(slots, self._computed[slots] - 1)].astype(np.int64)
        tokens = states % self._info.vocab_size
        stopped = (tokens[:, None] == self._stops[slots]).any(1)
        for i in np.flatnonzero(stopped & (self._made[slots] < self._least[slots])):
            banned = frozenset(self._stops[slots[i]].tolist())
            tokens[i] = _avoid(int(tokens[i]), self._info.vocab_size, banned)
            stopped[i] = False
        self._last[slots] = tokens
        self._made[slots] += 1
        self._inert[slots] = stopped | (self._made[slots] >= self._most[slots])
        return tokens.astype(np.uint32).tobytes()


class SimulatedExecutor:
    """See the module. A plan's result is computed when it is submitted and given when the device would have it."""

    def __init__(self) -> None:
        self._timer: TimerFd | None = None
        self._device: SimulatedDevice | None = None
        self._step_ns = 0
        self._free_ns = 0
        self._due: deque[tuple[int, StepResult]] = deque()

    def start(self, spec: ModelSpec, progress: Progress) -> ModelInfo:
        """See Executor. Vocabulary and end tokens are those of the folder's config.json, if there is one."""
        if spec.tensor_parallel > 1:
            raise ExecutorError(f"tensor_parallel {spec.tensor_parallel}: only the uniproc executor offers it")
        info = describe(spec)
        self._timer = TimerFd()
        self._device = SimulatedDevice(info)
        self._step_ns = spec.step_us * 1000
        return info

    def restart(self, progress: Progress) -> ModelInfo:
        """See Executor: it is never lost."""
        raise ExecutorError("the simulated executor is never lost")

    def submit(self, plan: StepPlan) -> None:
        """See Executor."""
        assert self._device is not None
        result = self._device.execute(plan)
        device_ns = self._step_ns * plan.repeat
        self._free_ns = max(self._free_ns, time.monotonic_ns()) + device_ns
        result = msgspec.structs.replace(result, device_ns=device_ns)
        self._due.append((self._free_ns, result))
        if len(self._due) == 1:
            self._arm()

    def results(self) -> Sequence[StepResult]:
        """See Executor."""
        now = time.monotonic_ns()
        ready: list[StepResult] = []
        while self._due and self._due[0][0] <= now:
            ready.append(self._due.popleft()[1])
        if ready:
            self._arm()
        return ready

    def _arm(self) -> None:
        assert self._timer is not None
        self._timer.set(max(self._due[0][0], 1) if self._due else 0)

    def fileno(self) -> int:
        """See Executor."""
        assert self._timer is not None
        return self._timer.fileno()

    def submit_mask(self, number: int, mask: bytes) -> None:
        """See Executor: there is nothing to mask."""
        raise ExecutorError("the simulated executor takes no masks")

    def load_adapter(self, path: str, first_row: int) -> int:
        """See Executor: there is nothing to adapt."""
        raise ExecutorError("the simulated executor has no adapters")

    def check_health(self) -> None:
        """See Executor: it is always well."""

    def shutdown(self) -> None:
        """See Executor."""
        if self._timer is not None:
            self._timer.close()
            self._timer = None


def describe(spec: ModelSpec) -> ModelInfo:
    """What a simulated model of that specification offers. Raises ExecutorError for a config.json that is no object."""
    config = _read_config(Path(spec.path) / "config.json")
    eos = config.get("eos_token_id")
    model_tokens = spec.max_model_tokens or int(config.get("max_position_embeddings", _DEFAULT_MODEL_TOKENS))
    blocks = spec.num_blocks or spec.max_sequences * -(-model_tokens // spec.block_tokens)
    vocab_size = int(config.get("vocab_size", spec.vocab_size))
    return ModelInfo(
        model_digest=hashlib.blake2b(f"simulated {vocab_size}".encode(), digest_size=32).hexdigest(),
        vocab_size=vocab_size,
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        max_model_tokens=min(model_tokens, blocks * spec.block_tokens),
        max_sequences=spec.max_sequences,
        max_step_tokens=spec.max_step_tokens,
        block_tokens=spec.block_tokens,
        num_blocks=blocks,
        plans_in_flight=spec.plans_in_flight,
        tokens_ahead=1 if spec.plans_in_flight == 2 else 0,
        device="simulated",
        max_repeat=MAX_REPEAT,
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ExecutorError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ExecutorError(f"{path}: not a JSON object")
    return config


def _ints(data: bytes) -> Ints:
    return np.frombuffer(data, np.uint32).astype(np.int64)
