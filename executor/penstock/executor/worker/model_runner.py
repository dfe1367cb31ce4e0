"""A model, its pages and its slots: runs plan after plan."""

from __future__ import annotations

import hashlib
import queue
import time
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from penstock.executor.executor import ExecutorError
from penstock.executor.layers.attention import AttentionBatch, LayerCache
from penstock.executor.layers.parallel import ALONE, Group
from penstock.executor.models.config import ModelConfig, read_config
from penstock.executor.models.registry import Model, build_model
from penstock.executor.models.shares import find_shares, rank_config
from penstock.executor.models.weights import NO_SHARES, ByteProgress, LoadedWeights, Shares, draw_weights, load_weights
from penstock.executor.step import StepPlan, StepResult, pack_u32
from penstock.executor.worker.batch_state import BatchState
from penstock.executor.worker.sampler import choose_tokens
from penstock.executor.worker.slots import Capacity
from penstock.executor.worker.step_input import StepInput
from penstock.kernels.attention.reference import Scratch

LOAD_FORMATS: Final = ("safetensors", "dummy")
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class UnsetModel:
    """A model whose parameters are allocated."""

    model: Model
    config: ModelConfig
    dtype: torch.dtype
    shard: ModelConfig
    """What this rank computes of it."""
    shares: Shares
    device: torch.device
    group: Group = ALONE

    def fill(self, folder: Path, on_progress: ByteProgress) -> LoadedModel:
        """Set the parameters from a checkpoint. Raises CheckpointError."""
        return self._filled(load_weights(self.model, folder, on_progress, self.shares))

    def draw(self) -> LoadedModel:
        """Set them at random: see :func:`penstock.executor.models.weights.draw_weights`."""
        return self._filled(draw_weights(self.model, shares=self.shares))

    def _filled(self, weights: LoadedWeights) -> LoadedModel:
        if absorbs(self.device, self.dtype):
            self.model.absorb_norms()
        return LoadedModel(self.model, self.config, weights, self.dtype, self.shard, self.group)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model whose parameters are set."""

    model: Model
    config: ModelConfig
    weights: LoadedWeights
    dtype: torch.dtype
    shard: ModelConfig
    """What this rank computes of it."""
    group: Group = ALONE

    @property
    def digest(self) -> str:
        """What the model computes: its weights and its configuration, 128 bits as hex."""
        return hashlib.blake2b(f"{self.config} {self.weights.digest}".encode(), digest_size=16).hexdigest()


def load_model(
    folder: Path,
    dtype: str,
    on_progress: ByteProgress,
    *,
    device: torch.device,
    load_format: str = "safetensors",
    group: Group = ALONE,
) -> LoadedModel:
    """Read a local checkpoint, or this rank's share of it, onto ``device``; ``dtype`` "auto" is its own.

    Raises CheckpointError, and ExecutorError for a dtype or a load format that is not offered.
    """
    unset = allocate_model(folder, dtype, device=device, load_format=load_format, group=group)
    return unset.draw() if load_format == "dummy" else unset.fill(folder, on_progress)


def allocate_model(
    folder: Path, dtype: str, *, device: torch.device, load_format: str = "safetensors", group: Group = ALONE
) -> UnsetModel:
    """The same without the parameters: whatever is launched with them before they are set computes nonsense.

    Raises CheckpointError, and ExecutorError for a dtype or a load format that is not offered.
    """
    config = read_config(folder)
    name = config.dtype if dtype == "auto" else dtype
    if name not in DTYPES:
        raise ExecutorError(f"dtype {name!r} is not supported, only 'auto', {', '.join(map(repr, DTYPES))}")
    if load_format not in LOAD_FORMATS:
        raise ExecutorError(f"load_format {load_format!r} is not supported, only {', '.join(map(repr, LOAD_FORMATS))}")
    shard = rank_config(config, group.size, folder)
    model = build_model(shard, DTYPES[name], device, group)
    if absorbs(device, DTYPES[name]):
        model.expect_absorbed_norms()
    return UnsetModel(model, config, DTYPES[name], shard, _find_shares(config, model, group), device, group)


def _find_shares(config: ModelConfig, model: Model, group: Group) -> Shares:
    if group.size == 1:
        return NO_SHARES
    whole = build_model(config, torch.float32, torch.device("meta"))
    return find_shares(whole.destinations(), model.destinations(), group.rank)


def absorbs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model there is made fast by :meth:`Model.absorb_norms`; elsewhere weights stay what they were."""
    return device.type == "cuda" and dtype == torch.bfloat16


class ModelRunner:
    """Executes plans strictly in order. Not thread-safe."""

    def __init__(self, loaded: LoadedModel, pages: tuple[LayerCache, ...], capacity: Capacity) -> None:
        """``pages``: one cache per layer, of ``capacity.num_blocks`` blocks."""
        self._model, self._pages, self._group = loaded.model, pages, loaded.group
        self._scratch = Scratch(loaded.dtype)
        self._capacity = capacity
        self._batch = BatchState(capacity)
        self._epoch = 0
        self._number = 0
        self._computed: queue.SimpleQueue[StepResult] = queue.SimpleQueue()

    def launch(self, plan: StepPlan) -> None:
        """Compute the plan: on a CPU there is nobody else who could."""
        self._computed.put(self.execute_model(plan))

    def collect(self) -> StepResult:
        """The oldest result."""
        return self._computed.get()

    def take_thread(self) -> None:
        """Called once by each thread: OpenMP counts its helpers for each thread that asks.

        torch brings the number that another thread has set over to this one when it is asked for it here, and else
        only after the first products have run with one helper a processor.
        """
        torch.get_num_threads()

    @torch.inference_mode()
    def execute_model(self, plan: StepPlan) -> StepResult:
        """Apply the plan and compute its step.

        A slot of which something impossible is asked, or whose logits are not finite, fails alone. Raises
        ExecutorError for a plan out of order or of a kind that is not offered, ValueError for a malformed one.
        """
        started = time.perf_counter_ns()
        self._take_turn(plan)
        self._batch.apply(plan)
        step = self._batch.compose()
        made = self._compute(step) if step is not None else {}
        rows = self._batch.rows
        return StepResult(
            epoch=plan.epoch,
            number=plan.number,
            counts=bytes(slot in made for slot in rows),
            ids=pack_u32(array("I", [made[slot] for slot in rows if slot in made])),
            failed=tuple(self._batch.failures),
            device_ns=time.perf_counter_ns() - started,
        )

    def _take_turn(self, plan: StepPlan) -> None:
        if plan.epoch != self._epoch:
            self._epoch, self._number = plan.epoch, 0
            self._batch = BatchState(self._capacity)
        if plan.number != self._number + 1:
            raise ExecutorError(f"plan {plan.number} came where {self._number + 1} was due")
        self._number = plan.number
        if plan.repeat != 1 or plan.copies:
            raise ExecutorError(f"plan {plan.number} asks for bursts or block copies, which are not offered")

    def _compute(self, step: StepInput) -> dict[int, int]:
        """Slot → token."""
        hidden, choosing = self._forward(step), step.choosing
        if not choosing.slots.numel():
            return self._batch.absorb(step, choosing.slots, choosing.slots.bool())
        tokens, sound = self._choose(hidden, step)
        return self._batch.absorb(step, tokens, sound)

    def _choose(self, hidden: Tensor, step: StepInput) -> tuple[Tensor, Tensor]:
        """Tokens and which rows are sound, as :func:`choose_tokens`; rank 0 chooses for all ranks of a group."""
        if self._group.rank == 0:
            logits = self._model.logits(hidden).float()
            outputs = self._batch.tensors.outputs[step.choosing.slots]
            positions = step.positions[step.last_rows] + 1
            tokens, sound = choose_tokens(logits, step.choosing, outputs, positions)
            if self._group.size == 1:
                return tokens, sound
            chosen = torch.stack((tokens, sound.long()))
        else:
            chosen = torch.empty(2, step.choosing.slots.numel(), dtype=torch.int64)
        self._group.broadcast(chosen)
        return chosen[0], chosen[1].bool()

    def _forward(self, step: StepInput) -> Tensor:
        batch = AttentionBatch.build(
            step.positions,
            step.query_start,
            step.context_lengths,
            step.block_tables,
            block_tokens=self._capacity.block_tokens,
            scratch=self._scratch,
        )
        chosen = None if step.last_rows.numel() == step.ids.numel() else step.last_rows
        return self._model.forward(step.ids, batch, self._pages, chosen)
