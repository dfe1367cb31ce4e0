"""The contract between deciding and computing: plans go in, results come out (torch-free).

The worker keeps ``ModelInfo.max_sequences`` *slots*. A slot holds a sequence's known ids, its block table, its sampling
parameters and how many of its tokens are computed. A :class:`StepPlan` carries *differences* only; a worker applies it
in this order:

1. ``release``: the slots are empty; their blocks belong to others from this plan on.
2. ``admissions``: the slots hold new sequences of which nothing is computed.
3. ``fragments``: further known ids of admitted sequences.
4. ``blocks``: block tables grow.
5. ``hold``: the slots stop decoding until a schedule names them again.
6. ``schedule``: the slots compute that many of their known ids in this step.
7. ``rows``: which slots take part in this step, in which order.

When the last known id of a slot is computed, the step samples the next token; from then on the slot *decodes*: it takes
part in every following plan, computing its last token and sampling the next one, until ``hold`` or ``release``. A held
slot resumes with ``schedule`` of one row: its last token, which the device knows.

**The device stops.** End-of-sequence and stop ids, ``min_tokens`` and ``max_tokens`` are applied by the worker in every
plan. A slot that has stopped is inert until released: it may still be named by plans that were made before anybody
knew, computes nothing that counts and reports count 0. A surplus token therefore does not exist.

Columns of numbers are packed little-endian bytes; ``u32`` and ``f32`` below name their element types.
"""

from array import array
from typing import Final

import msgspec

FRAGMENT_TOKENS: Final = 16_384
"""Most known ids that one plan carries for one slot; longer prompts follow in fragments of later plans."""

MAX_STOP_IDS: Final = 64
"""Most ids that end one sequence, the model's own included."""


def pack_u32(values: "list[int] | tuple[int, ...] | array[int]") -> bytes:
    """Pack ``values``, each in [0, 2³²), as little-endian u32."""
    return (values if isinstance(values, array) else array("I", values)).tobytes()


def unpack_u32(data: bytes) -> "array[int]":
    """Unpack little-endian u32. Raises ValueError if the length is no multiple of four."""
    column = array("I")
    column.frombytes(data)
    return column


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How the tokens of one sequence are chosen, defaults applied."""

    temperature: float = 1.0
    """0 is greedy: the largest logit, the lowest id among equals."""
    top_p: float = 1.0
    """In (0, 1]."""
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bias_ids: bytes = b""
    """u32: tokens whose logits are biased."""
    bias_values: bytes = b""
    """f32: the biases."""
    allowed_ids: bytes = b""
    """u32: the only tokens to choose from; empty: all."""
    bad_words: tuple[bytes, ...] = ()
    """u32 each: words that must not be made."""
    logprobs: int = -1
    """Most likely tokens to report beside the chosen one; -1: report none."""
    prompt_logprobs: int = -1
    """The same for the prompt."""


class Stopping(msgspec.Struct, frozen=True, array_like=True):
    """When a sequence ends. Counts are of output tokens, those made before an admission included."""

    max_tokens: int
    """At least 1."""
    min_tokens: int = 0
    """Until this many are made, the logits of ``stop_ids`` are minus infinity."""
    stop_ids: bytes = b""
    """u32: the tokens that end the sequence, at most MAX_STOP_IDS; the one that does is part of the output."""


class Admission(msgspec.Struct, frozen=True, array_like=True):
    """A sequence enters a slot with nothing computed."""

    slot: int
    ids: bytes
    """u32: its known ids, or the first FRAGMENT_TOKENS of them."""
    total_ids: int
    """Known ids in all: the prompt and the output so far. Those beyond ``ids`` come as fragments."""
    prompt_ids: int
    """Of them, those of the caller's prompt; the others are output."""
    sampling: Sampling
    stopping: Stopping
    seed: int
    """64 bits. Noise is keyed by (seed, sample_index, absolute position of the sampled token, vocabulary index)."""
    sample_index: int = 0
    adapter: int = 0
    """First row of the adapter's region plus one; 0: the base model."""


class Fragment(msgspec.Struct, frozen=True, array_like=True):
    """Further known ids of an admitted sequence."""

    slot: int
    index: int
    """From 1; the admission carries fragment 0."""
    ids: bytes
    """u32."""


class BlockCopy(msgspec.Struct, frozen=True, array_like=True):
    """A copy between device and host blocks on a side stream; its end is reported as a fence."""

    fence: int
    to_host: bool
    device_blocks: bytes
    """u32."""
    host_blocks: bytes
    """u32."""


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """What changes before this step, and what it computes."""

    epoch: int
    number: int
    """Counts from 1 within the epoch."""
    release: bytes = b""
    """u32: slots."""
    admissions: tuple[Admission, ...] = ()
    fragments: tuple[Fragment, ...] = ()
    block_slots: bytes = b""
    """u32: for each appended block its slot, in order."""
    block_ids: bytes = b""
    """u32: the block."""
    hold: bytes = b""
    """u32: slots."""
    schedule_slots: bytes = b""
    """u32: slots that compute known ids in this step."""
    schedule_rows: bytes = b""
    """u32: how many of them."""
    rows: bytes | None = None
    """u32: the slots that take part, longest context first. None: those of the plan before."""
    copies: tuple[BlockCopy, ...] = ()
    repeat: int = 1
    """1…8: a pure decode burst of that many steps; results carry up to that many tokens a slot."""


class SlotFailure(msgspec.Struct, frozen=True, array_like=True):
    """A sequence that failed alone; its slot is inert until released."""

    slot: int
    reason: str


class LogProbColumns(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of a step's tokens: token i has the next ``counts[i]`` entries, the chosen token first."""

    counts: bytes
    """u16."""
    ids: bytes
    """u32."""
    values: bytes
    """f32: natural logarithms."""


class PromptLogProbs(msgspec.Struct, frozen=True, array_like=True):
    """A numbered fragment of a prompt's log-probabilities."""

    slot: int
    offset: int
    """Number of the first prompt token of this fragment."""
    columns: LogProbColumns


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """What a plan produced."""

    epoch: int
    number: int
    counts: bytes
    """u8: tokens of each row, in the order of the plan's rows; 0…repeat."""
    ids: bytes
    """u32: the rows' tokens, one row after another."""
    failed: tuple[SlotFailure, ...] = ()
    fences: tuple[int, ...] = ()
    """Copies that have ended since the result before."""
    logprobs: LogProbColumns | None = None
    prompt_logprobs: tuple[PromptLogProbs, ...] = ()
    device_ns: int = 0
    """How long the device computed."""
    host_ns: int = 0
    """How long the worker took to apply the plan and to launch its step."""


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to load and how much room to give it. None: the executor decides."""

    path: str
    """A local folder: config.json and safetensors."""
    load_format: str = "safetensors"
    """"safetensors", or "dummy": weights drawn from N(0, 0.02), for measurements; config.json will do."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cuda", "cuda:N" or "cpu"."""
    dtype: str = "auto"
    """"auto" (the checkpoint's), "float32" or "bfloat16"."""
    max_sequences: int = 64
    max_step_tokens: int = 512
    """Most rows of one step."""
    max_model_tokens: int | None = None
    """Most tokens of prompt and output together. None: the model's own."""
    block_tokens: int = 64
    num_blocks: int | None = None
    """None: as many as kv_cache_bytes hold, at most what max_sequences whole contexts need."""
    kv_cache_bytes: int | None = None
    """None: 1 GiB on a CPU; on a GPU what gpu_memory_utilization leaves once the model, a step and the graphs have
    theirs."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory that this worker may take, in (0, 1]."""
    resident: bool | None = None
    """Whether the batch lives on the device, which steps are then launched ahead of; None: on a GPU."""
    attention_backend: str = "auto"
    """What attends chunks of prompts: "triton" (our own kernel), "flash_attn" (where it is installed; 16-bit, on a
    GPU), or "auto": the faster one for the shape of each step."""
    cuda_graphs: bool = True
    """Decode steps are replayed from CUDA graphs; off: every step is launched kernel by kernel."""
    plans_in_flight: int = 1
    threads: int | None = None
    """CPU threads of one step. None: half of the processors, shared by the ranks."""
    tensor_parallel: int = 1
    """Ranks that share the model, each of them a process that a launcher has started."""
    rank_seconds: float = 300.0
    """How long one rank waits for another before that one counts as lost; loading and compiling are part of it."""
    step_us: int = 0
    """Simulated executor: how long a step takes; 0: no time."""
    vocab_size: int = 32_000
    """Simulated executor: number of token ids."""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an executor offers; returned by start and true until shutdown."""

    model_digest: str
    vocab_size: int
    eos_ids: tuple[int, ...]
    max_model_tokens: int
    max_sequences: int
    """Slots."""
    max_step_tokens: int
    block_tokens: int
    num_blocks: int
    plans_in_flight: int
    """Plans that may be submitted and not yet answered."""
    tokens_ahead: int
    """Sampled tokens of one sequence that may be unknown when a plan is made: 0 means that a sequence that sampled
    takes part again only after its result."""
    adapter_rows: int = 0
    device: str = "cpu"
    dtype: str = ""
    parameters: int = 0
    weight_bytes: int = 0
    attention_backends: tuple[str, ...] = ()
    """What may attend chunks of prompts, in the order in which they are asked; empty: the executor has no choice."""
    max_repeat: int = 1
    """Most steps of one burst (StepPlan.repeat)."""
    startup_ms: dict[str, int] = {}
    """How long each stage of the start took."""
    memory_bytes: dict[str, int] = {}
    """What took the device's memory: weights, step, graphs, state, pages."""


_encoder = msgspec.msgpack.Encoder()
_plan_decoder = msgspec.msgpack.Decoder(StepPlan)
_result_decoder = msgspec.msgpack.Decoder(StepResult)


def encode_plan(plan: StepPlan) -> bytes:
    """Encode a plan for a ring."""
    return _encoder.encode(plan)


def decode_plan(data: bytes) -> StepPlan:
    """Decode a plan. Raises msgspec.DecodeError (ValidationError among them) for anything else."""
    return _plan_decoder.decode(data)


def encode_result(result: StepResult) -> bytes:
    """Encode a result for a ring."""
    return _encoder.encode(result)


def decode_result(data: bytes) -> StepResult:
    """Decode a result. Raises msgspec.DecodeError (ValidationError among them) for anything else."""
    return _result_decoder.decode(data)
