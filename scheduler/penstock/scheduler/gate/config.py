"""What an operator can set for a scheduler: its gate and its engine."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from penstock.config.gpu import has_gpu
from penstock.executor.step import ModelSpec
from penstock.rpc.tls import require_secure
from penstock.scheduler.records.startup import EngineSpec

MIB = 1 << 20

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]
Descriptor = Annotated[int, Meta(ge=0)]


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one scheduler. Raises `ValueError` for settings that contradict one another."""

    model: Annotated[Path, Meta(description="Folder of the checkpoint: safetensors, config.json, tokenizer.json.")]
    served_model_name: Annotated[Name | None, Meta(description="Name of the model. None: the folder's.")] = None
    replica: Annotated[Name | None, Meta(description="Name of this scheduler. None: its address.")] = None
    grpc_address: Annotated[str, Meta(description="Where to listen; port 0 takes a free one.")] = "127.0.0.1:50052"
    executor: Annotated[
        Literal["auto", "multiprocess", "uniproc", "simulated"],
        Meta(
            description="What computes: the model in a process of its own, in the engine's, or a simulation. "
            "auto: multiprocess if there is a GPU, else uniproc."
        ),
    ] = "auto"
    device: Annotated[
        str, Meta(pattern="^(auto|cpu|cuda(:[0-9]+)?)$", description="Where: auto, cpu, cuda or cuda:N.")
    ] = "auto"
    load_format: Annotated[
        Literal["safetensors", "dummy"],
        Meta(description="dummy: weights are drawn instead of read, for measurements; config.json will do."),
    ] = "safetensors"
    policy: Annotated[Literal["fcfs"], Meta(description="Who is admitted first and who gives way.")] = "fcfs"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], Meta(description="Type of weights and cache; auto: the checkpoint's.")
    ] = "auto"
    block_tokens: Annotated[int, Meta(ge=1, le=4096, description="Tokens of a KV block.")] = 64
    num_blocks: Annotated[
        Count | None, Meta(description="KV blocks. None: as many as there is memory for and can be used.")
    ] = None
    kv_cache_mib: Annotated[
        Count | None,
        Meta(description="Memory for KV blocks, in MiB. None: 1024 on a CPU, what is left on a GPU."),
    ] = None
    gpu_memory_utilization: Annotated[
        float, Meta(gt=0, le=1, description="Share of a GPU's memory that may be taken in all.")
    ] = 0.9
    attention_backend: Annotated[
        Literal["auto", "triton", "flash_attn"],
        Meta(
            description="What attends prompts on a GPU: our own kernel, or flash-attn. "
            "auto: the faster one for each step, of those that are installed."
        ),
    ] = "auto"
    cuda_graphs: Annotated[bool, Meta(description="Replay decode steps on a GPU from CUDA graphs.")] = True
    step_timeout: Annotated[
        float, Meta(gt=0, description="Multiprocess executor: seconds for a step; then the worker is replaced.")
    ] = 30.0
    max_sequences: Annotated[
        Annotated[int, Meta(ge=1, le=65536)] | None,
        Meta(description="Sequences that run at once. None: 64 on a CPU, 256 on a GPU."),
    ] = None
    max_step_tokens: Annotated[
        Count | None, Meta(description="Most tokens that one step computes. None: 512 on a CPU, 2048 on a GPU.")
    ] = None
    max_model_tokens: Annotated[
        Count | None, Meta(description="Most tokens of prompt and output together. None: the model's own limit.")
    ] = None
    plans_in_flight: Annotated[int, Meta(ge=1, le=8, description="Steps that may be planned and not yet answered.")] = 2
    threads: Annotated[Count | None, Meta(description="CPU threads of a step. None: the executor decides.")] = None
    step_us: Annotated[int, Meta(ge=0, description="Simulated executor: duration of a step in µs; 0: none.")] = 0
    vocab_size: Annotated[
        int, Meta(ge=1, description="Simulated executor: token ids, where the folder has no config.json.")
    ] = 32_000
    max_waiting: Annotated[int, Meta(ge=1, description="Most attempts that wait; more are RESOURCE_EXHAUSTED.")] = 512
    max_waiting_tokens: Annotated[
        int, Meta(ge=1, description="Most prompt tokens that wait; a single prompt is never refused for it.")
    ] = 4 * MIB
    session_grace: Annotated[
        float, Meta(gt=0, description="Seconds for which attempts live on without the stream of their service.")
    ] = 10.0
    silence: Annotated[
        float, Meta(gt=0, description="Seconds without a word after which the stream of a service is dropped.")
    ] = 1.0
    stall: Annotated[
        float, Meta(gt=0, description="Seconds after which the stream of a service that takes nothing is closed.")
    ] = 10.0
    flush_ms: Annotated[float, Meta(ge=0, le=1000, description="Least time between two messages of tokens.")] = 2.0
    max_connection_age_s: Annotated[
        Seconds | None, Meta(description="Seconds after which connections are ended (GOAWAY). None: never.")
    ] = None
    drain_grace: Annotated[
        float, Meta(ge=0, description="Seconds that running attempts get when the scheduler is told to end.")
    ] = 10.0
    otlp_endpoint: Annotated[
        str | None, Meta(description="Where traces go: URL or host:port of an OTLP gRPC receiver.")
    ] = None
    traced_step_every: Annotated[
        int, Meta(ge=1, description="One engine step in so many is traced, if a traced attempt is in it.")
    ] = 16
    tls_certificate: Annotated[Path | None, Meta(description="PEM certificate chain to serve with.")] = None
    tls_key: Annotated[Path | None, Meta(description="PEM private key of that certificate.")] = None
    client_ca: Annotated[
        Path | None, Meta(description="PEM certificates that vouch for services. None: any may connect.")
    ] = None
    allow_plaintext: Annotated[
        bool, Meta(description="Let plaintext leave this machine, for a network that is trusted.")
    ] = False
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="Least level that is logged.")
    ] = "info"
    ready_fd: Annotated[
        Descriptor | None, Meta(description="Descriptor that gets one JSON line when the engine serves.")
    ] = None
    parent_pid: Annotated[Count | None, Meta(description="Process to end with.")] = None

    def __post_init__(self) -> None:
        _check_address(self.grpc_address)
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key: give both or neither")
        if self.client_ca is not None and self.tls_certificate is None:
            raise ValueError("client_ca: needs tls_certificate and tls_key")
        require_secure(self.grpc_address, self.tls_certificate, self.allow_plaintext)

    @property
    def model_name(self) -> str:
        """What requests call the model."""
        return self.served_model_name or self.model.resolve().name

    @property
    def on_gpu(self) -> bool:
        """Whether the model will be on a GPU."""
        return self.device != "cpu" and self.executor != "simulated" and has_gpu()

    @property
    def sequences(self) -> int:
        """Sequences that run at once."""
        return self.max_sequences or (256 if self.on_gpu else 64)

    def engine_spec(self) -> EngineSpec:
        """What of this the engine is to know."""
        gpu = self.on_gpu
        executor = self.executor if self.executor != "auto" else "multiprocess" if gpu else "uniproc"
        model = ModelSpec(
            path=str(self.model),
            load_format=self.load_format,
            device=self.device,
            dtype=self.dtype,
            max_sequences=self.sequences,
            max_step_tokens=self.max_step_tokens or (2048 if gpu else 512),
            max_model_tokens=self.max_model_tokens,
            block_tokens=self.block_tokens,
            num_blocks=self.num_blocks,
            kv_cache_bytes=None if self.kv_cache_mib is None else self.kv_cache_mib * MIB,
            gpu_memory_utilization=self.gpu_memory_utilization,
            attention_backend=self.attention_backend,
            cuda_graphs=self.cuda_graphs,
            plans_in_flight=self.plans_in_flight,
            threads=self.threads,
            step_us=self.step_us,
            vocab_size=self.vocab_size,
        )
        return EngineSpec(
            executor=executor,
            model=model,
            step_timeout_s=self.step_timeout,
            policy=self.policy,
            log_level=self.log_level,
            traced_step_every=self.traced_step_every,
        )


def _check_address(address: str) -> None:
    if address.startswith(("unix:", "unix-abstract:")):
        return
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise ValueError(f"grpc_address: {address!r} is not HOST:PORT")
