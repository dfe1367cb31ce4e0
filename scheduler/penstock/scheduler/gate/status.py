"""How a scheduler describes itself: its model, its limits, how full it is."""

import os
from typing import Final

from penstock.executor.step import MAX_STOP_IDS, ModelInfo
from penstock.scheduler.gate.checks import MAX_SAMPLES, ModelLimits
from penstock.scheduler.gate.config import SchedulerConfig
from penstock.scheduler.records import events
from penstock.v1 import GetStatusResponse, Limits, Load, ProtocolVersion, SchedulerState, Welcome

PROTOCOL: Final = ProtocolVersion(major=1, minor=0)


class ReplicaStatus:
    """What is known of the engine so far."""

    def __init__(self, config: SchedulerConfig, tokenizer_digest: str, epoch: int) -> None:
        """``epoch`` tells this life of the scheduler from its earlier ones."""
        self._config = config
        self._tokenizer_digest = tokenizer_digest
        self._epoch = epoch
        self.address = config.grpc_address
        """Where it listens."""
        self.info: ModelInfo | None = None
        """None until the engine has started."""
        self.limits: ModelLimits | None = None
        self.load = events.Load(0, 0, 0, 0, config.sequences, 0, 0, 0, 0, 0, 0)
        """The engine's latest report."""

    @property
    def replica(self) -> str:
        """The scheduler's name."""
        return self._config.replica or self.address

    def to_load(self, state: SchedulerState) -> Load:
        """How full it is, for services."""
        load = self.load
        return Load(
            state=state,
            waiting=load.waiting,
            waiting_tokens=load.waiting_tokens,
            running=load.running,
            max_running=load.max_running,
            free_blocks=load.free_blocks,
            total_blocks=load.total_blocks,
            step_us=load.step_us,
            oldest_wait_ms=load.oldest_wait_ms,
        )

    def to_welcome(self, state: SchedulerState, *, resumed: bool, lost_handles: bytes) -> Welcome:
        """The answer to a hello; the engine has started."""
        info, limits = self.info, self.limits
        assert info is not None
        assert limits is not None
        return Welcome(
            protocol=PROTOCOL,
            epoch=self._epoch,
            resumed=resumed,
            lost_handles=lost_handles,
            replica=self.replica,
            model=self._config.model_name,
            model_digest=info.model_digest,
            tokenizer_digest=self._tokenizer_digest,
            vocab_size=info.vocab_size,
            eos_ids=list(info.eos_ids),
            block_tokens=info.block_tokens,
            limits=Limits(
                max_model_tokens=limits.max_model_tokens,
                max_samples=MAX_SAMPLES,
                max_stop_ids=MAX_STOP_IDS,
                max_waiting=self._config.max_waiting,
                max_waiting_tokens=self._config.max_waiting_tokens,
            ),
            load=self.to_load(state),
        )

    def to_status(self, state: SchedulerState, *, sessions: int, attempts: int, engine_pid: int) -> GetStatusResponse:
        """The answer to GetStatus."""
        load = self.load
        return GetStatusResponse(
            replica=self.replica,
            load=self.to_load(state),
            sessions=sessions,
            attempts=attempts,
            gate_pid=os.getpid(),
            engine_pid=engine_pid,
            preemptions=load.preemptions,
            preemptions_in_flight=load.preemptions_in_flight,
            steps=load.steps,
        )
