"""Loading weights: single and sharded files round-trip; every fault is one line naming file and tensor."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from safetensors.torch import save_file

from penstock.executor.models.checkpoint import Piece, list_tensors, open_files, read_header, read_piece
from penstock.executor.models.config import read_config
from penstock.executor.models.errors import CheckpointError
from penstock.executor.models.registry import Model, build_model
from penstock.executor.models.weights import LoadedWeights, draw_weights, load_weights
from support.tiny_llama import TinyLlama, build_tiny_llama, random_weights, save_weights

SHAPE = TinyLlama(vocab_size=259, num_hidden_layers=1)
K_PROJ = "model.layers.0.self_attn.k_proj.weight"
Spoil = Callable[[Path], object]


def load(
    folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Model, LoadedWeights, list[tuple[int, int]]]:
    seen: list[tuple[int, int]] = []
    model = build_model(read_config(folder), dtype, torch.device(device))
    return model, load_weights(model, folder, lambda done, total: seen.append((done, total))), seen


def edit_header(folder: Path, edit: Callable[[dict[str, dict[str, object]]], object]) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    edit(header)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])


def edit_weights(folder: Path, **changed: torch.Tensor | None) -> None:
    weights = random_weights(SHAPE, 0) | {K_PROJ: changed["k_proj"]}
    save_weights(folder, {name: tensor for name, tensor in weights.items() if tensor is not None})


def write_raw(folder: Path, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(data)


def truncate(folder: Path, size: int) -> None:
    write_raw(folder, (folder / "model.safetensors").read_bytes()[:size])


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_arrives_in_its_part(shards: int, dtype: torch.dtype, tmp_path: Path) -> None:
    shape = replace(SHAPE, attention_bias=True, mlp_bias=True)
    build_tiny_llama(tmp_path, seed=2, shape=shape, shards=shards)
    model, loaded, seen = load(tmp_path, dtype)
    weights = random_weights(shape, 2)
    destinations = model.destinations()
    assert destinations.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(destinations[name], tensor.to(dtype)), name
    assert loaded.parameters == sum(tensor.numel() for tensor in weights.values())
    assert loaded.weight_bytes == loaded.parameters * dtype.itemsize
    total = 4 * loaded.parameters
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert len(seen) == len(weights) + 1


def test_the_digest_is_that_of_the_weights(tmp_path: Path) -> None:
    digests = [
        load(build_tiny_llama(tmp_path / name, seed=seed, shape=SHAPE, shards=shards))[1].digest
        for name, seed, shards in (("a", 1, 1), ("b", 1, 2), ("c", 2, 1))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_a_copy_of_a_tied_head_is_passed_over(tmp_path: Path) -> None:
    shape = replace(SHAPE, tie_word_embeddings=True)
    build_tiny_llama(tmp_path, shape=shape)
    weights = random_weights(shape, 0)
    save_weights(tmp_path, weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1})
    model, _, _ = load(tmp_path)
    assert torch.equal(model.destinations()["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("readers", [1, 4])
def test_large_tensors_come_in_pieces(readers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that end in the middle of a row, progress after each; nothing larger than a piece is read at once."""
    monkeypatch.setattr("penstock.executor.models.weights.PIECE_BYTES", 1000)
    monkeypatch.setattr("penstock.executor.models.weights.HOST_READERS", readers)
    build_tiny_llama(tmp_path, seed=5, shape=SHAPE, shards=2)
    model, loaded, seen = load(tmp_path)
    weights = random_weights(SHAPE, 5)
    for name, tensor in model.destinations().items():
        assert torch.equal(tensor, weights[name]), name
    steps = [after - before for (before, _), (after, _) in pairwise(seen)]
    assert max(steps) == 1000
    assert sum(steps) == loaded.weight_bytes
    assert len(steps) == sum(-(-tensor.nbytes // 1000) for tensor in weights.values())


def test_a_fault_in_one_of_several_readers_ends_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_tiny_llama(tmp_path, shape=SHAPE)
    read: list[str] = []

    def fail(file: BinaryIO, piece: Piece, memory: memoryview) -> None:
        read.append(piece.entry.name)
        time.sleep(0.01)
        raise CheckpointError(piece.entry.path, "is truncated", piece.entry.name)

    monkeypatch.setattr("penstock.executor.models.weights.HOST_READERS", 2)
    monkeypatch.setattr("penstock.executor.models.weights.PIECE_BYTES", 100)
    monkeypatch.setattr("penstock.executor.models.weights.read_piece", fail)
    with pytest.raises(CheckpointError, match="is truncated"):
        load(tmp_path)
    assert len(read) < 500  # of thousands


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    build_tiny_llama(tmp_path, shape=SHAPE)
    entries = list_tensors(tmp_path)
    truncate(tmp_path, entries[-1].offset + 10)
    with open_files(entries) as files, pytest.raises(CheckpointError) as caught:
        read_piece(files[entries[-1].path], Piece(entries[-1], 0, 16), memoryview(bytearray(64)))
    for part in ("model.safetensors", entries[-1].name, "truncated"):
        assert part in str(caught.value)


def test_drawn_weights_need_the_configuration_only(tmp_path: Path) -> None:
    shape = replace(SHAPE, attention_bias=True, model_type="qwen3", hidden_size=256)
    build_tiny_llama(tmp_path, shape=shape)
    (tmp_path / "model.safetensors").unlink()
    first, second = (build_model(read_config(tmp_path), torch.bfloat16, torch.device("cpu")) for _ in "ab")
    loaded = draw_weights(first)
    assert loaded.digest.startswith("dummy")
    assert loaded.weight_bytes == 2 * loaded.parameters
    assert draw_weights(second) == loaded
    for name, tensor in first.destinations().items():
        assert torch.equal(tensor, second.destinations()[name]), name
        if name.endswith(("norm.weight", ".bias")):
            assert torch.equal(tensor, torch.full_like(tensor, 1.0 if name.endswith("norm.weight") else 0.0)), name
        else:
            assert 0.019 < tensor.float().std() < 0.021, name
    assert not torch.equal(*(first.destinations()[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")))
    draw_weights(second, seed=1)
    assert not torch.equal(*(model.destinations()["lm_head.weight"] for model in (first, second)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpu_gets_what_the_host_gets(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through many small pieces, so that all readers take part."""
    monkeypatch.setattr("penstock.executor.models.weights.PIECE_BYTES", 1000)
    build_tiny_llama(tmp_path, seed=5, shape=replace(SHAPE, attention_bias=True), shards=2)
    on_gpu, on_host = (load(tmp_path, dtype, device) for device in ("cuda", "cpu"))
    assert on_gpu[1:] == on_host[1:]
    for name, tensor in on_host[0].destinations().items():
        assert torch.equal(on_gpu[0].destinations()[name].cpu(), tensor), name


@pytest.mark.gpu
def test_weights_are_drawn_on_the_gpu(tmp_path: Path) -> None:
    build_tiny_llama(tmp_path, shape=replace(SHAPE, hidden_size=256))
    model = build_model(read_config(tmp_path), torch.bfloat16, torch.device("cuda"))
    assert draw_weights(model).digest.startswith("dummy")
    for name, tensor in model.destinations().items():
        assert tensor.is_cuda
        if not name.endswith("norm.weight"):
            assert 0.019 < tensor.float().std().item() < 0.021, name


SPOILS: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), ("config.json", "no such file")),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ("model.safetensors", "no such file")),
    "pickled": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        ("pytorch_model.bin", "pickled"),
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ("config.json", "no such file")),
    "missing tensor": (lambda f: edit_weights(f, k_proj=None), ("model.safetensors", K_PROJ, "missing")),
    "unexpected tensor": (
        lambda f: edit_header(f, lambda h: h.update({"extra.weight": h.pop(K_PROJ)})),
        ("model.safetensors", "'extra.weight'", "unexpected"),
    ),
    "wrong shape": (
        lambda f: edit_weights(f, k_proj=torch.zeros(16, 64)),
        ("model.safetensors", K_PROJ, "shape [16, 64]", "[32, 64]"),
    ),
    "integers": (
        lambda f: edit_weights(f, k_proj=torch.zeros(32, 64, dtype=torch.int32)),
        ("model.safetensors", K_PROJ, "dtype 'I32'"),
    ),
    "truncated data": (lambda f: truncate(f, 20_000), ("model.safetensors", "tensor", "truncated")),
    "truncated header": (lambda f: truncate(f, 100), ("model.safetensors", "truncated")),
    "empty": (lambda f: truncate(f, 0), ("model.safetensors", "truncated")),
    "five bytes": (lambda f: truncate(f, 5), ("model.safetensors", "truncated")),
    "trailing bytes": (
        lambda f: write_raw(f, (f / "model.safetensors").read_bytes() + b"more"),
        ("model.safetensors", "4 bytes behind"),
    ),
    "absurd header": (
        lambda f: write_raw(f, struct.pack("<Q", 2**63) + b"{}"),
        ("model.safetensors", "header claims 9223372036854775808 bytes", "limit"),
    ),
    "header above the limit": (
        lambda f: write_raw(f, struct.pack("<Q", 100_000_001) + b"{}"),
        ("model.safetensors", "limit is 100000000"),
    ),
    "header larger than the file": (
        lambda f: write_raw(f, struct.pack("<Q", 3) + b"{}"),
        ("model.safetensors", "truncated", "3 bytes"),
    ),
    "a header that is no JSON": (
        lambda f: write_raw(f, struct.pack("<Q", 8) + b"\xff" * 8),
        ("model.safetensors", "not valid JSON"),
    ),
    "a header as deep as a well": (
        lambda f: write_raw(f, struct.pack("<Q", 200_000) + b"[" * 200_000),
        ("model.safetensors", "not valid JSON"),
    ),
    "a header that is a list": (
        lambda f: write_raw(f, struct.pack("<Q", 2) + b"[]"),
        ("model.safetensors", "not a JSON object"),
    ),
    "garbled entry": (
        lambda f: edit_header(f, lambda h: h[K_PROJ].update(data_offsets=[-8, 8])),
        ("model.safetensors", K_PROJ, "garbled"),
    ),
    "shape and bytes disagree": (
        lambda f: edit_header(f, lambda h: h[K_PROJ].update(shape=[10**9, 10**9, 10**9])),
        ("model.safetensors", K_PROJ, "needs 4000000000000000000000000000 bytes"),
    ),
    "overlap": (
        lambda f: edit_header(f, lambda h: h[K_PROJ].update(data_offsets=[0, 4 * 32 * 64])),
        ("model.safetensors", "overlap"),
    ),
    "foreign family": (
        lambda f: edit_config(f, architectures=["GPT2LMHeadModel"]),
        ("config.json", "'GPT2LMHeadModel'", "LlamaForCausalLM"),
    ),
}


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("name", SPOILS)
def test_faults_are_one_line_naming_file_and_tensor(name: str, tmp_path: Path) -> None:
    folder = build_tiny_llama(tmp_path / "model", shape=SHAPE)
    spoil, words = SPOILS[name]
    spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in (*words, str(folder)):
        assert word in message


INDEX_SPOILS: dict[str, tuple[Callable[[dict[str, str]], object], str]] = {
    "parent folder": (
        lambda m: m.update({K_PROJ: "../other.safetensors"}),
        "no safetensors file of this folder",
    ),
    "absolute path": (
        lambda m: m.update({K_PROJ: "/etc/passwd.safetensors"}),
        "no safetensors file of this folder",
    ),
    "pickled shard": (
        lambda m: m.update({K_PROJ: "pytorch_model.bin"}),
        "no safetensors file of this folder",
    ),
    "missing shard": (
        lambda m: m.update(dict.fromkeys(m, "model-9.safetensors")),
        "model-9.safetensors: no such file",
    ),
    "tensor not in its shard": (
        lambda m: m.update({"other": next(iter(m.values()))}),
        "tensor 'other': is missing",
    ),
    "tensor not in the index": (lambda m: m.pop(K_PROJ), f"tensor {K_PROJ!r}: is unexpected"),
}


@pytest.mark.parametrize("name", INDEX_SPOILS)
def test_faults_of_an_index(name: str, tmp_path: Path) -> None:
    folder = build_tiny_llama(tmp_path, shape=SHAPE, shards=2)
    edit, words = INDEX_SPOILS[name]
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=words):
        load(folder)


def test_random_damage_to_a_header_is_a_typed_fault_or_harmless(tmp_path: Path) -> None:
    """600 headers with one byte changed: never any other exception, never a wild allocation."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, path)
    data = path.read_bytes()
    refused = 0
    for number in range(600):
        spoiled = bytearray(data)
        spoiled[number * 7919 % (len(data) - 88)] ^= 1 << number % 8
        path.write_bytes(spoiled)
        try:
            read_header(path)
        except CheckpointError:
            refused += 1
    assert refused > 300
