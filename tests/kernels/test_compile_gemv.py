"""The kernels of a step of few rows compile for sm_90 on a machine without a GPU, as a step launches them.

What makes them fast can be read off there: nothing spills, weights come 16 bytes at a time, and the first of them are
asked for before a kernel waits for the one in front of it. So can what keeps them right while they overlap.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.kernels.dispatch import INTERPRETED

if INTERPRETED:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton")

import triton

from penstock.executor.layers.attention import LayerCache
from penstock.executor.layers.few_rows import LayerWeights, StepWeights
from penstock.executor.worker.device.few_rows import FewRowsStep
from penstock.kernels import overlap
from penstock.kernels.batch.state import ArenaLayout, BatchState
from penstock.kernels.compile import REGISTERS, SHARED_MEMORY_BYTES, Compiled, compile_for_sm90
from penstock.kernels.gemv import (
    attention,
    attention_kernel,
    begin,
    begin_kernel,
    head,
    head_kernel,
    product,
    product_kernel,
)
from penstock.kernels.gemv.attention import HeadNorms
from penstock.kernels.gemv.product import Norm
from penstock.kernels.gemv.shapes import GemvShape, LayerSizes, StepShape, default_shape, most_rows
from penstock.kernels.gemv.tuned import SHIPPED, read_entries

META = torch.device("meta")
LLAMA = LayerSizes(4096, 14336, 32, 8, 128, 128256)
QWEN3 = LayerSizes(1024, 3072, 16, 8, 128, 151936)
QWEN2 = LayerSizes(896, 4864, 14, 2, 64, 151936)
ORDER = ("begin", "qkv", "attention", "output", "gate_up", "down", "head", "choose")
"""The kernels of a step of one layer."""
GEMV = ("qkv", "output", "gate_up", "down", "head")
WAIT, RELEASE = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
WIDE = r"ld\.global\S*\.(?:v4\.b32|v2\.b64)\s"
LOAD = r"ld\.global\S*\s"
WRITE = r"(?:st|atom|red)\.\S*global|red\.global"


def shipped() -> dict[str, tuple[LayerSizes, int, StepShape]]:
    return {
        f"measured, hidden {entry.sizes.hidden}, {entry.rows} rows, context {entry.context}": (
            entry.sizes, entry.rows, entry.shape,
        )
        for entry in read_entries(SHIPPED / "nvidia_h200.json")
    }  # fmt: skip


def defaults() -> dict[str, tuple[LayerSizes, int, StepShape]]:
    found = {}
    for sizes in (LLAMA, QWEN3, QWEN2):
        for rows, context in (*((rows, 0) for rows in range(1, most_rows(sizes) + 1)), (1, 2)):
            shape = default_shape(sizes, rows, context)
            assert shape is not None
            found[f"default, hidden {sizes.hidden}, {rows} rows, context {context}"] = (sizes, rows, shape)
    return found


CASES = shipped() | defaults()
DEFAULT = CASES["default, hidden 1024, 1 rows, context 0"]


@dataclass(frozen=True)
class Launched:
    """One launch of a step."""

    kernel: Compiled
    overlapped: bool
    """The launch itself lets the kernel begin early."""

    @property
    def before(self) -> str:
        """What is done before it waits."""
        return self.kernel.ptx.partition(WAIT)[0]

    @property
    def after(self) -> str:
        return self.kernel.ptx.partition(WAIT)[2]


COMPILED: dict[tuple[object, ...], Compiled] = {}
"""Most kernels are those of several steps."""


def key_of(argument: object) -> object:
    return argument.dtype if isinstance(argument, Tensor) else argument


class Launches:
    """Stands where a kernel does, and compiles what it is launched with."""

    def __init__(self, kernel: Any, made: list[Launched]) -> None:
        self._kernel, self._made = kernel, made

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: object, num_warps: int, launch_pdl: bool = False) -> None:
            alike = (self._kernel, num_warps, *(key_of(argument) for argument in arguments))
            if alike not in COMPILED:
                COMPILED[alike] = compile_for_sm90(self._kernel, arguments, warps=num_warps)
            self._made.append(Launched(COMPILED[alike], launch_pdl))

        return launch


Step = Callable[[tuple[LayerSizes, int, StepShape]], dict[str, Launched]]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that lets kernels overlap."""
    monkeypatch.setattr(overlap, "can_overlap", lambda: True)


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Step:
    """Launches a step of one layer; its kernels by name, compiled."""
    made: list[Launched] = []
    for module, name in (
        (begin_kernel, "begin_kernel"),
        (product_kernel, "gemv_kernel"),
        (attention_kernel, "few_rows_attention_kernel"),
        (head_kernel, "head_kernel"),
        (head_kernel, "choose_kernel"),
    ):
        monkeypatch.setattr(module, name, Launches(getattr(module, name), made))
    for dispatching in (begin, product, attention, head):
        monkeypatch.setattr(dispatching, "uses_triton", lambda tensor: True)

    def launched(case: tuple[LayerSizes, int, StepShape]) -> dict[str, Launched]:
        made.clear()
        sizes, rows, shape = case
        launch(sizes, rows, shape)
        assert len(made) == len(ORDER)
        return dict(zip(ORDER, made, strict=True))

    return launched


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def launch(sizes: LayerSizes, rows: int, shape: StepShape) -> None:
    norm, dim = Norm(meta(sizes.hidden), 1e-6), sizes.head_dim
    layer = LayerWeights(
        norm,
        meta(*sizes.weight("qkv")),
        meta(sizes.weight("qkv")[0]) if sizes == QWEN2 else None,
        HeadNorms(meta(dim), meta(dim), 1e-6) if sizes == QWEN3 else None,
        meta(*sizes.weight("output")),
        norm,
        meta(2 * sizes.inner, sizes.hidden),
        meta(*sizes.weight("down")),
    )
    vocabulary, angles = meta(sizes.vocabulary, sizes.hidden), meta(4096, dim, dtype=torch.float32)
    weights = StepWeights(sizes, vocabulary, [layer], norm, vocabulary, angles, dim**-0.5)
    pages = meta(9, 64, sizes.kv_heads, dim)
    state = BatchState.allocate(ArenaLayout(rows, 64, rows), META, scratch_block=8)
    few = FewRowsStep(weights, [LayerCache(pages, pages)], state, meta(rows, sizes.vocabulary), rows)
    few.compute(rows, shape)


def loads_of_a_tile(shape: GemvShape) -> int:
    """A thread's loads of 16 bytes for one step of a program: eight weights each, of bfloat16."""
    return max(1, shape.outputs * shape.inputs // (8 * 32 * shape.warps))


def matrices(name: str) -> int:
    return 2 if name == "gate_up" else 1


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", CASES)
def test_every_kernel_fits(case: str, step: Step) -> None:
    sizes, rows, shape = CASES[case]
    for name, launched in step(CASES[case]).items():
        kernel = launched.kernel
        assert kernel.shared_bytes <= SHARED_MEMORY_BYTES, name
        assert kernel.registers * kernel.threads <= REGISTERS, name
        if rows == 1:
            assert kernel.spilled_bytes == 0, name
        if name in GEMV:
            steps = sizes.weight(name)[1] // getattr(shape, name).inputs
            weights = steps * matrices(name) * loads_of_a_tile(getattr(shape, name))
            assert len(re.findall(WIDE, kernel.ptx)) >= weights, f"{name}: weights come 16 bytes at a time"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", CASES)
def test_the_first_weights_are_asked_for_before_the_wait(case: str, step: Step) -> None:
    _, _, shape = CASES[case]
    for name, launched in step(CASES[case]).items():
        if name in GEMV:
            cut: GemvShape = getattr(shape, name)
            first = cut.ahead * matrices(name) * loads_of_a_tile(cut)
            assert len(re.findall(WIDE, launched.before)) == first, name


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", CASES)
def test_overlapping_kernels_keep_their_order(case: str, step: Step) -> None:
    for name, launched in step(CASES[case]).items():
        assert launched.overlapped, name
        assert launched.kernel.ptx.count(WAIT) == launched.kernel.ptx.count(RELEASE) == 1, name
        assert not re.search(WRITE, launched.before), f"{name} writes before the kernel in front of it is done"
        assert re.search(WRITE, launched.after), name
        released_late = RELEASE in launched.after
        assert released_late == (name == "qkv"), f"{name}: attention reads what is older than qkv before it waits"


@pytest.mark.usefixtures("hopper")
def test_the_first_pages_are_asked_for_before_the_wait(step: Step) -> None:
    sizes, _, shape = DEFAULT
    attend = step(DEFAULT)["attention"]
    tile = 2 * shape.attention.tile * sizes.head_dim // (8 * 32 * shape.attention.warps)
    assert len(re.findall(r"ld\.global\.cg\.v4\.b32", attend.before)) == tile, "keys and values of one tile"


@pytest.mark.parametrize("hidden", [1024, 896])
def test_nothing_waits_where_launches_do_not_overlap(hidden: int, step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "can_overlap", lambda: False)
    for name, launched in step(CASES[f"default, hidden {hidden}, 1 rows, context 0"]).items():
        assert not launched.overlapped, name
        assert "griddepcontrol" not in launched.kernel.ptx, name


def test_what_may_stand_anywhere_is_not_loaded_wide() -> None:
    kernel = begin_kernel.begin_kernel
    word, row = meta(1, dtype=torch.int32), meta(1)
    arguments = (word, word, word, word, row, word, word, row, word, 4, 1024, 1024, False)
    assert re.search(WIDE, compile_for_sm90(kernel, arguments, warps=4).ptx)
    anywhere = triton.jit(do_not_specialize_on_alignment=["embedding"])(kernel.fn)
    assert not re.search(WIDE, compile_for_sm90(anywhere, arguments, warps=4).ptx)
