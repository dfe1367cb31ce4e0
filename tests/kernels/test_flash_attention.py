"""flash-attn behind the protocol of chunks: on a CPU what they are handed, on a GPU what they compute."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.kernels.attention import flash
from penstock.kernels.attention.chunks import (
    AttendChunks,
    AttentionShape,
    ChunkBackend,
    Chunks,
    LoneKernel,
    PagedKernel,
)
from penstock.kernels.attention.flash import (
    MOST_SEQUENCES,
    Flash2,
    Flash4,
    FlashLibrary,
    FlashPages,
    FlashUnavailable,
    flash_library,
)
from penstock.kernels.attention.tails import clear_tails
from penstock.kernels.dispatch import INTERPRETED
from support.devices import on_every_device
from support.flash_stand_ins import stand_in_2, stand_in_4
from support.prefill_cases import NAN, Case, Lengths

EXACT = torch.float32
"""The stand-ins take it, so that a wrong address cannot hide behind rounding."""
MIXED = [(0, 17), (63, 2), (64, 1), (50, 33), (0, 1), (129, 70), (127, 129)]
LONE_LENGTHS = [1, 63, 64, 65, 300]
BF16_BOUND = 0.01


def poisoned(case: Case) -> Tensor:
    return torch.full_like(case.query, NAN)


def attended(case: Case, attend: AttendChunks) -> Tensor:
    out = poisoned(case)
    attend(case.query, case.keys, case.values, case.scale, out)
    return out


# ---- what the library is handed ----


@pytest.mark.parametrize("block_tokens", [16, 64, 128, 256])
def test_flash_4_over_pages(block_tokens: int) -> None:
    case = Case(MIXED, device="cpu", dtype=EXACT, kv_heads=2, group=2, block_tokens=block_tokens)
    case.assert_right(attended(case, FlashPages(Flash4(stand_in_4)).bind(case.chunks())))


@pytest.mark.parametrize("block_tokens", [256, 512])
def test_flash_2_over_pages(block_tokens: int) -> None:
    case = Case(MIXED, device="cpu", dtype=EXACT, kv_heads=1, group=4, block_tokens=block_tokens)
    case.assert_right(attended(case, FlashPages(Flash2(stand_in_2)).bind(case.chunks())))


@pytest.mark.parametrize("library", [Flash4(stand_in_4), Flash2(stand_in_2)], ids=["4", "2"])
@pytest.mark.parametrize("rows", LONE_LENGTHS)
def test_a_whole_sequence_without_pages(library: FlashLibrary, rows: int) -> None:
    case = Case([(0, rows)], device="cpu", dtype=EXACT, kv_heads=2, group=2, block_tokens=64)
    kernel = LoneKernel(library.name, library.alone, ())
    case.assert_right(attended(case, kernel.bind(case.chunks(cached=0))))


@pytest.mark.parametrize(("lengths", "cached"), [([(5, 7)], 5), ([(0, 7)], None), ([(0, 7), (0, 3)], 0)], ids=str)
def test_only_a_whole_sequence_goes_without_pages(lengths: Lengths, cached: int | None) -> None:
    case = Case(lengths, device="cpu", dtype=EXACT)
    with pytest.raises(ValueError, match="one whole sequence alone"):
        LoneKernel("lone", Flash4(stand_in_4).alone, ()).bind(case.chunks(cached=cached))


def test_rows_of_nobody_and_of_others_are_left_alone() -> None:
    """Rows behind the last chunk, and in front of the first one, as a step has them."""
    case = Case([(20, 30), (0, 3)], device="cpu", dtype=EXACT)
    around = torch.full((50, *case.query.shape[1:]), NAN)
    query = torch.cat([case.query, torch.full_like(around[:5], NAN)])
    FlashPages(Flash4(stand_in_4)).bind(case.chunks())(query, case.keys, case.values, case.scale, around[7:45])
    case.assert_right(around[7:40])
    assert around[:7].isnan().all()
    assert around[45:].isnan().all()


def test_the_tables_are_gathered_once_a_step() -> None:
    """Layers share what was gathered when the step was bound."""
    case = Case(MIXED, device="cpu", dtype=EXACT)
    tables: set[int] = set()

    def forward(*arguments: Any, page_table: Tensor, **options: Any) -> None:
        tables.add(page_table.data_ptr())
        stand_in_4(*arguments, page_table=page_table, **options)

    forward.__signature__ = inspect.signature(stand_in_4)  # type: ignore[attr-defined]
    attend = FlashPages(Flash4(forward)).bind(case.chunks())
    case.assert_right(attended(case, attend))
    case.assert_right(attended(case, attend))
    assert len(tables) == 1


def test_more_sequences_than_are_compiled_for_are_refused() -> None:
    slots = torch.zeros(MOST_SEQUENCES + 1, dtype=torch.int32)
    chunks = Chunks(slots[None], slots, slots, slots, 1, slots.long())
    with pytest.raises(ValueError, match="257 chunks"):
        FlashPages(Flash4(stand_in_4)).bind(chunks)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tails_of_pages_are_cleared(device: str, dtype: torch.dtype) -> None:
    """Behind the end of each sequence, in its last page alone, and nothing of anybody else."""
    case = Case([(0, 17), (63, 1), (0, 64), (100, 29)], device=device, dtype=dtype, kv_heads=3, head_dim=80)
    before = case.values.clone()
    tables = case.tables.index_select(0, case.slots)
    clear_tails(case.values, tables, case.contexts)
    behind = torch.zeros(before.shape[:2], dtype=torch.bool, device=device)
    for table, context in zip(tables, case.contexts.tolist(), strict=True):
        if context % 64:
            behind[table[context // 64].long(), context % 64 :] = True
    assert (case.values[behind] == 0).all()
    assert torch.equal(case.values[~behind].nan_to_num(7.0), before[~behind].nan_to_num(7.0))


# ---- what is refused, by name ----


def shape(**changes: Any) -> AttentionShape:
    settings: dict[str, Any] = {
        "device": torch.device("cuda"), "dtype": torch.bfloat16, "heads": 32, "kv_heads": 8, "head_dim": 128,
        "block_tokens": 64,
    }  # fmt: skip
    return AttentionShape(**settings | changes)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"device": torch.device("cpu")}, "needs an NVIDIA GPU, the device is cpu"),
        ({"dtype": torch.float32}, "computes in bfloat16 or float16, the model in float32"),
        ({"head_dim": 320}, "multiples of 8 up to 256, the model's have 320"),
        ({"head_dim": 100}, "multiples of 8 up to 256, the model's have 100"),
    ],
)
def test_refusals_of_both(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(FlashUnavailable, match=line):
        flash_library(shape(**changes))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    capable_of(monkeypatch, (9, 0))


def capable_of(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def installed(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    monkeypatch.setattr(flash, "_is_installed", lambda module: module in modules)
    monkeypatch.setattr(flash, "_load_4", lambda: Flash4(stand_in_4))
    monkeypatch.setattr(flash, "_load_2", lambda: Flash2(stand_in_2))


@pytest.mark.usefixtures("hopper")
def test_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    with pytest.raises(FlashUnavailable) as caught:
        flash_library(shape())
    assert str(caught.value) == (
        "flash-attn-4 is not installed (pip install 'penstock[flash]'); "
        "flash-attn 2 takes pages of multiples of 256 tokens, block_tokens is 64"
    )


def test_the_newest_that_serves_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    four, two = "flash_attn.cute", "flash_attn.flash_attn_interface"
    capable_of(monkeypatch, (9, 0))
    installed(monkeypatch, four, two)
    assert flash_library(shape()).name == "flash-attn-4"
    installed(monkeypatch, two)
    assert flash_library(shape(block_tokens=256)).name == "flash-attn 2"
    capable_of(monkeypatch, (8, 0))
    installed(monkeypatch, four, two)
    assert flash_library(shape(block_tokens=256)).name == "flash-attn 2"
    with pytest.raises(FlashUnavailable, match=r"no pages for compute capability 8\.0; .* block_tokens is 64"):
        flash_library(shape())
    capable_of(monkeypatch, (7, 5))
    with pytest.raises(FlashUnavailable, match=r"flash-attn 2 has no kernel for compute capability 7\.5"):
        flash_library(shape())
    capable_of(monkeypatch, (10, 0))
    with pytest.raises(FlashUnavailable, match="at most 128, or of 256, on this GPU, the model's have 192"):
        flash_library(shape(head_dim=192))


@pytest.mark.usefixtures("hopper")
def test_one_that_cannot_be_loaded_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "flash_attn.cute", "flash_attn.flash_attn_interface")

    def load() -> Flash4:
        return Flash4(lambda q, k, v, causal, out: None)

    monkeypatch.setattr(flash, "_load_4", load)
    assert flash_library(shape(block_tokens=256)).name == "flash-attn 2"
    with pytest.raises(FlashUnavailable, match="does not know cu_seqlens_q, seqused_k, page_table, softmax_scale"):
        flash_library(shape())


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Writes a package flash_attn of the modules that it is called with, and forgets the machine's own one."""

    def ours() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] == "flash_attn"]

    def write(**modules: str) -> None:
        for name, text in modules.items():
            file = tmp_path.joinpath("flash_attn", *name.split("__")).with_suffix(".py")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    before = {name: sys.modules.pop(name) for name in ours()}
    monkeypatch.syspath_prepend(tmp_path)
    flash._load_4.cache_clear()
    yield write
    flash._load_4.cache_clear()
    for name in ours():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.usefixtures("hopper")
def test_a_package_is_found_and_imported(packages: Callable[..., None]) -> None:
    names = "cu_seqlens_q, seqused_k, page_table, softmax_scale, causal, out"
    packages(cute__interface=f"def _flash_attn_fwd(q, k, v, {names}): ...")
    assert flash_library(shape()).name == "flash-attn-4"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    "fault",
    ["import nowhere_to_be_found", "raise OSError('libcuda\\nis gone')", "import sys; sys.nowhere_to_be_found"],
)
def test_a_package_that_is_broken_says_how(packages: Callable[..., None], fault: str) -> None:
    packages(cute__interface=fault)
    with pytest.raises(
        FlashUnavailable, match=r"flash-attn-4 cannot be imported: .*(nowhere_to_be_found|is gone)"
    ) as e:
        flash_library(shape())
    assert "\n" not in str(e.value)


def test_versions_without_pages_are_refused() -> None:
    with pytest.raises(FlashUnavailable, match="does not know block_table"):
        Flash2(lambda q, k, v: None)


# ---- what is computed, on a GPU ----

HEADS = [(8, 2, 128), (8, 4, 128), (2, 8, 128), (8, 4, 64), (4, 2, 64)]
"""Key/value heads, query heads for each, components."""
CASES = [
    pytest.param([(0, 1024)] * 4, id="4 of 1024"),
    pytest.param([(0, 7), (0, 4096), (0, 100), (0, 513), (0, 64)], id="7 to 4096"),
    pytest.param([(4096, 512), (1000, 512)], id="512 over 4096"),
    pytest.param([(0, 7), (3000, 1), (777, 333), (0, 2049), (64, 64)], id="mixed"),
]


def flash_or_skip(head_dim: int, block_tokens: int) -> FlashPages:
    if INTERPRETED:
        pytest.skip("our own kernel is interpreted")
    wanted = AttentionShape(torch.device("cuda", 0), torch.bfloat16, 32, 8, head_dim, block_tokens)
    try:
        return FlashPages(flash_library(wanted))
    except FlashUnavailable as reason:
        pytest.skip(str(reason))


def assert_as_good_as_ours(case: Case, backend: ChunkBackend, *, cached: int | None = None) -> None:
    """Within twice the error of our own kernel, and within the bound."""
    ours = case.error(attended(case, PagedKernel().bind(case.chunks())))
    theirs = case.error(attended(case, backend.bind(case.chunks(cached=cached))))
    assert theirs <= min(2 * ours, BF16_BOUND), (theirs, ours)


@pytest.mark.gpu
@pytest.mark.parametrize("block_tokens", [64, 128, 256])
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), HEADS, ids=str)
@pytest.mark.parametrize("lengths", CASES)
def test_flash_against_the_definition(
    lengths: Lengths, kv_heads: int, group: int, head_dim: int, block_tokens: int
) -> None:
    """Pages are not-a-number wherever nobody wrote, the ends of the last pages included."""
    case = Case(
        lengths, device="cuda", dtype=torch.bfloat16, kv_heads=kv_heads, group=group, head_dim=head_dim,
        block_tokens=block_tokens,
    )  # fmt: skip
    assert_as_good_as_ours(case, flash_or_skip(head_dim, block_tokens))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [256, 513, 1024, 4096])
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), HEADS, ids=str)
def test_flash_of_a_whole_sequence_without_pages(rows: int, kv_heads: int, group: int, head_dim: int) -> None:
    case = Case(
        [(0, rows)], device="cuda", dtype=torch.bfloat16, kv_heads=kv_heads, group=group, head_dim=head_dim
    )  # fmt: skip
    library = flash_or_skip(head_dim, 64).library
    assert_as_good_as_ours(case, LoneKernel(library.name, library.alone, ()), cached=0)


FIRST: Lengths = [(4096, 512), (100, 300), (0, 212)]
SECOND: Lengths = [(0, 300), (4000, 700), (37, 24)]


@pytest.mark.gpu
@pytest.mark.parametrize("block_tokens", [64, 128, 256])
@pytest.mark.parametrize("ours", [False, True], ids=["flash", "triton"])
def test_a_graph_is_replayed_with_other_sequences(ours: bool, block_tokens: int) -> None:
    """Other tables, lengths, slots and pages; as many rows and sequences."""
    backend = PagedKernel() if ours else flash_or_skip(128, block_tokens)
    first, second = (
        Case(
            lengths, device="cuda", dtype=torch.bfloat16, kv_heads=8, group=4, head_dim=128,
            block_tokens=block_tokens, pool=120, width=80,
        )
        for lengths in (FIRST, SECOND)
    )  # fmt: skip
    longest = max(first.longest, second.longest)
    first.longest = longest
    out = poisoned(first)

    def step() -> None:
        attend = backend.bind(first.chunks_on_device())
        attend(first.query, first.keys, first.values, first.scale, out)

    step()
    first.assert_right(out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for name in ("query", "keys", "values", "tables", "slots", "starts", "contexts"):
        getattr(first, name).copy_(getattr(second, name))
    out.fill_(math.nan)
    graph.replay()
    second.assert_right(out)
