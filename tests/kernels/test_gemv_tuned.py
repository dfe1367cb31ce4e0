"""The cuts of steps of few rows: those that are shipped, the files they are in, and those that are made up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from penstock.kernels.gemv import tuned
from penstock.kernels.gemv.neighbours import alternatives, attention_alternatives
from penstock.kernels.gemv.shapes import (
    CONTEXTS,
    MOST_MERGED_BY_PRODUCT,
    MOST_ROWS,
    PRODUCTS,
    GemvShape,
    LayerSizes,
    SplitShape,
    StepShape,
    context_class,
    default_shape,
    most_rows,
    starts,
)
from penstock.kernels.gemv.tuned import (
    SHIPPED,
    Entry,
    entries_of,
    file_of,
    read_entries,
    step_shape,
    user_folder,
    write_entries,
)
from penstock.kernels.sampling.reference import TILE

GPU = "NVIDIA H200"
TINY = LayerSizes(hidden=64, inner=96, heads=4, kv_heads=2, head_dim=16, vocabulary=320)
CUDA = torch.device("cuda")
ALL_CONTEXTS = range(len(CONTEXTS))


def entry_of(rows: int = 1, context: int = 0, sizes: LayerSizes = TINY, ms: float = 1.0) -> Entry:
    shape = starts(sizes, rows, context)[0]
    return Entry(sizes, rows, context, shape, ms, 2.0, 256, 0.01, 0.01, "by hand")


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of this user for an H200; nothing is remembered from before, or afterwards."""
    monkeypatch.setenv("PENSTOCK_TUNED", str(tmp_path))
    entries_of.cache_clear()
    yield tmp_path / "nvidia_h200.json"
    entries_of.cache_clear()


# ---- what is shipped ----


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_what_is_shipped_was_worth_it(path: Path) -> None:
    entries = read_entries(path)
    assert len({(entry.sizes, entry.rows, entry.context) for entry in entries}) == len(entries) > 0
    for entry in entries:
        assert entry.sizes.fits(entry.shape)
        assert 0 < entry.step_ms <= entry.default_ms
        assert 0 < entry.error <= min(0.05, 1.2 * entry.default_error)
        assert context_class(entry.tokens) == entry.context
        assert entry.measured


def test_an_h200_has_cuts() -> None:
    assert {(entry.rows, entry.context) for entry in read_entries(SHIPPED / file_of(GPU))} >= {(1, 0), (1, 1), (2, 0)}


# ---- files ----


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA H200", "nvidia_h200.json"),
        ("NVIDIA GeForce RTX 4090", "nvidia_geforce_rtx_4090.json"),
        ("../NVIDIA A100-SXM4-80GB ", "nvidia_a100_sxm4_80gb.json"),
    ],
)
def test_a_file_for_each_kind_of_gpu(gpu: str, name: str) -> None:
    assert file_of(gpu) == name


def test_the_folder_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PENSTOCK_TUNED", "")
    assert user_folder() == tmp_path / ".cache" / "penstock" / "tuned"
    assert "``~/.cache/penstock/tuned``" in str(tuned.__doc__)
    monkeypatch.setenv("PENSTOCK_TUNED", "/somewhere")
    assert user_folder() == Path("/somewhere")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "gpu.json"
    entries = [entry_of(1, 0), entry_of(2, 1)]
    write_entries(path, entries)
    assert read_entries(path) == entries


def test_writing_replaces_the_same_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    other = replace(TINY, vocabulary=640)
    kept = [entry_of(1, 0), entry_of(2, 0), entry_of(1, 1), entry_of(1, 0, other)]
    write_entries(path, kept)
    write_entries(path, [entry_of(1, 0, ms=0.5), entry_of(3, 0)])
    assert read_entries(path) == [entry_of(1, 0, ms=0.5), *kept[1:], entry_of(3, 0)]
    assert [file.name for file in tmp_path.iterdir()] == ["gpu.json"]


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gpu.json"
    write_entries(path, [entry_of(1)])
    before = path.read_text()

    def fails(self: Path, text: str) -> int:
        with self.open("w") as file:
            file.write(text[:40])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", fails)
    with pytest.raises(OSError, match="no space left"):
        write_entries(path, [entry_of(2)])
    assert path.read_text() == before


def test_a_broken_file_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_text("[")
    with pytest.raises(ValueError, match=r"gpu\.json holds no tuned shapes"):
        write_entries(path, [entry_of(1)])
    assert path.read_text() == "["


def changed(raw: dict[str, Any], path: str, value: object) -> list[dict[str, Any]]:
    """One entry with something in it set; None: taken out."""
    *parents, last = path.split(".")
    inside = raw
    for name in parents:
        inside = inside[name]
    inside[last] = value
    if value is None:
        del inside[last]
    return [raw]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("shape.qkv.outputs", 5),
        ("shape.down.inputs", 256),
        ("shape.qkv.colour", 3),
        ("shape.attention.colour", 3),
        ("colour", "red"),
        ("sizes.hidden", 100),
        ("sizes.colour", 1),
        ("shape.output", None),
        ("shape.attention", None),
        ("shape.head.warps", None),
        ("error", None),
        ("sizes", 7),
    ],
)
def test_what_is_no_entry_is_refused_by_name(path: str, value: object, tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(changed(entry_of().to_json(), path, value)))
    with pytest.raises(ValueError, match=r"gpu\.json holds no tuned shapes: "):
        read_entries(file)


@pytest.mark.parametrize("text", ["", "[", "7", '{"a": 1}', "[7]", '["entry"]', "[[]]", "[null]", "\x80"])
def test_what_holds_no_entries_is_refused_by_name(text: str, tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"gpu\.json holds no tuned shapes: "):
        read_entries(file)


# ---- which one is used ----


def other_cut(shape: StepShape) -> StepShape:
    return replace(shape, qkv=replace(shape.qkv, warps=16))


def test_the_users_file_goes_before_the_shipped_one(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    shipped = next(entry for entry in read_entries(SHIPPED / user.name) if (entry.rows, entry.context) == (1, 0))
    sizes = shipped.sizes
    assert step_shape(sizes, 1, 0, CUDA) == shipped.shape
    mine = replace(shipped, shape=other_cut(shipped.shape))
    write_entries(user, [mine])
    entries_of.cache_clear()
    assert step_shape(sizes, 1, 0, CUDA) == mine.shape != shipped.shape
    assert len(entries_of(GPU)) == len(read_entries(SHIPPED / user.name)), "the others are there as well"


def test_a_file_is_read_once(user: Path) -> None:
    write_entries(user, [entry_of()])
    assert entries_of(GPU)[TINY, 1, 0] == entry_of()
    user.write_text("[")
    assert entries_of(GPU)[TINY, 1, 0] == entry_of()


def test_a_broken_file_of_the_user_is_named(user: Path) -> None:
    user.write_text("[")
    with pytest.raises(ValueError, match=str(user)):
        entries_of(GPU)


@pytest.mark.usefixtures("user")
def test_what_nobody_measured_has_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    assert step_shape(TINY, 1, 0, CUDA) == default_shape(TINY, 1, 0) is not None
    assert step_shape(replace(TINY, head_dim=24), 1, 0, CUDA) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    sizes = read_entries(SHIPPED / file_of(GPU))[0].sizes
    assert step_shape(sizes, 1, 0, CUDA) == default_shape(sizes, 1, 0)


def test_no_gpu_is_asked_for_its_name(user: Path) -> None:
    user.write_text("[")
    assert step_shape(TINY, 1, 0, torch.device("cpu")) == default_shape(TINY, 1, 0)


@pytest.mark.usefixtures("user")
def test_a_cut_that_was_measured_for_more_rows_than_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    assert step_shape(TINY, MOST_ROWS + 1, 0, CUDA) is None


# ---- made up ----

multiples = st.integers(1, 512).map(lambda count: 32 * count)


@st.composite
def sizes_taken(draw: st.DrawFn) -> LayerSizes:
    kv_heads = draw(st.integers(1, 16))
    heads = kv_heads * draw(st.integers(1, 16))
    dim = draw(st.sampled_from([16, 32, 64, 128, 256]))
    return LayerSizes(draw(multiples), draw(multiples), heads, kv_heads, dim, draw(st.integers(1, 300_000)))


def assert_usable(shape: StepShape, sizes: LayerSizes) -> None:
    """It fits, and is what kernels take: tiles are powers of two, and what is loaded ahead is there."""
    assert sizes.fits(shape)
    for name in PRODUCTS:
        cut: GemvShape = getattr(shape, name)
        outputs, inputs = sizes.weight(name)
        assert not inputs % cut.inputs
        assert name == "head" or not outputs % cut.outputs
        assert all(count & (count - 1) == 0 < count for count in (cut.outputs, cut.inputs, cut.warps))
        assert 1 <= cut.ahead <= inputs // cut.inputs
    assert TILE % shape.head.outputs == 0, "a tile of the choice is whole programs"
    split = shape.attention
    assert all(count & (count - 1) == 0 < count for count in (split.splits, split.tile, split.warps))
    assert split.tile >= 16
    assert split.stages >= 1
    assert split.merged or split.splits <= MOST_MERGED_BY_PRODUCT


@given(sizes_taken(), st.integers(1, 4), st.sampled_from(ALL_CONTEXTS))
def test_starts_fit(sizes: LayerSizes, rows: int, context: int) -> None:
    found = starts(sizes, rows, context)
    assert len(set(found)) > 0
    for shape in found:
        assert_usable(shape, sizes)
        if rows <= most_rows(sizes):
            assert default_shape(sizes, rows, context) == found[0]


@given(sizes_taken(), st.sampled_from(ALL_CONTEXTS))
def test_a_step_of_the_default_gives_a_thread_a_whole_load(sizes: LayerSizes, context: int) -> None:
    shape = default_shape(sizes, 1, context)
    assert shape is not None
    for name in PRODUCTS:
        cut: GemvShape = getattr(shape, name)
        assert cut.warps == 1 or cut.outputs * cut.inputs >= 8 * 32 * cut.warps


@given(sizes_taken(), st.integers(1, 4), st.sampled_from(ALL_CONTEXTS), st.data())
def test_alternatives_fit_and_differ(sizes: LayerSizes, rows: int, context: int, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(starts(sizes, rows, context)))
    for _ in range(6):
        product = data.draw(st.sampled_from([*PRODUCTS, "attention"]))
        near = list(attention_alternatives(shape) if product == "attention" else alternatives(shape, sizes, product))
        for one in near:
            assert_usable(one, sizes)
            assert one != shape
            assert replace(one, **{product: getattr(shape, product)}) == shape, "nothing else is changed"
        if near:
            shape = data.draw(st.sampled_from(near))


def test_a_search_reaches_every_cut() -> None:
    """From the default, by alternatives alone, to cuts that were measured to be the best."""
    for entry in read_entries(SHIPPED / file_of(GPU)):
        (start, *_) = starts(entry.sizes, entry.rows, entry.context)
        for product in (*PRODUCTS, "attention"):
            met = {start}
            rim = {start}
            wanted = getattr(entry.shape, product)
            while rim and not any(getattr(shape, product) == wanted for shape in rim):
                near = {
                    one
                    for shape in rim
                    for one in (
                        attention_alternatives(shape)
                        if product == "attention"
                        else alternatives(shape, entry.sizes, product)
                    )
                }
                rim = near - met
                met |= rim
            assert rim, (entry, product)


@pytest.mark.parametrize(
    "odd",
    [
        {"head_dim": 24},
        {"head_dim": 80},
        {"head_dim": 512},
        {"heads": 5},
        {"heads": 34},
        {"heads": 6, "kv_heads": 4},
        {"hidden": 48},
        {"inner": 100},
    ],
    ids=str,
)
def test_what_the_kernels_do_not_take(odd: dict[str, int]) -> None:
    assert default_shape(TINY, 1, 0) is not None
    assert default_shape(replace(TINY, **odd), 1, 0) is None


@given(sizes_taken(), st.integers(-2, 64), st.sampled_from(ALL_CONTEXTS))
def test_rows_that_are_not_few(sizes: LayerSizes, rows: int, context: int) -> None:
    assume(not 1 <= rows <= most_rows(sizes))
    assert default_shape(sizes, rows, context) is None


def test_a_cut_that_divides_nothing_does_not_fit() -> None:
    shape = default_shape(TINY, 1, 0)
    assert shape is not None
    assert TINY.fits(shape)
    for name in PRODUCTS:
        cut: GemvShape = getattr(shape, name)
        wrong: dict[str, Any] = {name: replace(cut, inputs=56)}
        assert not TINY.fits(replace(shape, **wrong)), name
        ragged: dict[str, Any] = {name: replace(cut, outputs=7)}
        assert TINY.fits(replace(shape, **ragged)) == (name == "head"), "the vocabulary alone may be ragged"


@pytest.mark.parametrize(
    ("longest", "found"), [(1, 0), (1024, 0), (1025, 1), (8192, 1), (8193, 2), (131_072, 2), (1 << 30, 2)]
)
def test_classes_of_contexts(longest: int, found: int) -> None:
    assert context_class(longest) == found


def test_splits_that_a_product_merges_are_few() -> None:
    (shape, *_) = starts(TINY, 1, 0)
    many = replace(shape, attention=SplitShape(16, 32, 2, 4, True))
    assert all(one.attention.merged for one in attention_alternatives(many) if one.attention.splits > 8)
