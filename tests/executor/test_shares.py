"""Each rank's share of a checkpoint, in whatever pieces it is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from penstock.executor.layers.attention import AttentionBatch, LayerCache
from penstock.executor.layers.parallel import ALONE, Group
from penstock.executor.models.config import read_config
from penstock.executor.models.errors import CheckpointError
from penstock.executor.models.shares import Share, rank_config
from penstock.executor.worker.kv_cache import PageShape
from penstock.executor.worker.model_runner import LoadedModel, load_model
from penstock.kernels.attention.reference import Scratch
from support.rank_threads import ranks
from support.reference import load_reference
from support.tiny_llama import (
    TINY_MISTRAL,
    TINY_QWEN2,
    TINY_QWEN3,
    TinyLlama,
    build_tiny_llama,
    random_weights,
    save_weights,
)

LLAMA = TinyLlama(attention_bias=True, mlp_bias=True, num_key_value_heads=4)
QWEN3 = replace(TINY_QWEN3, num_key_value_heads=4)
QWEN2 = replace(TINY_QWEN2, num_key_value_heads=4)
MISTRAL = replace(TINY_MISTRAL, num_key_value_heads=4)
COLUMN = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
ROW = ["self_attn.o_proj", "mlp.down_proj"]


def load(folder: Path, group: Group, **changes: str) -> LoadedModel:
    """One rank's model. Groups here are mostly connected to nobody: loading tells nobody anything."""
    settings = {"dtype": "float32", "load_format": "safetensors"} | changes
    dtype = settings.pop("dtype")
    cpu = torch.device("cpu")
    return load_model(folder, dtype, lambda done, total: None, device=cpu, group=group, **settings)


def share_of(name: str, tensor: Tensor, rank: int, size: int) -> Tensor:
    """What the layers' own names say."""
    kind = name.rsplit(".", 1)[1]
    if any(f".{part}." in name for part in COLUMN):
        return tensor.chunk(size, dim=0)[rank]
    if kind == "weight" and any(f".{part}." in name for part in ROW):
        return tensor.chunk(size, dim=1)[rank]
    return tensor


@pytest.mark.parametrize("shape", [LLAMA, QWEN3, QWEN2, MISTRAL], ids=["llama", "qwen3", "qwen2", "mistral"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("piece_bytes", [1000, 2**24])
def test_each_rank_has_its_share_and_the_digest_of_all(
    shape: TinyLlama, size: int, piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of pieces that begin and end in the middle of a row."""
    monkeypatch.setattr("penstock.executor.models.weights.PIECE_BYTES", piece_bytes)
    folder = build_tiny_llama(tmp_path, seed=5, shape=shape, shards=2)
    weights, whole = random_weights(shape, 5), load(folder, ALONE)
    for rank in range(size):
        loaded = load(folder, Group(rank, size))
        assert (loaded.digest, loaded.weights.parameters) == (whole.digest, whole.weights.parameters)
        own = loaded.model.destinations()
        assert own.keys() == weights.keys()
        for name, tensor in weights.items():
            assert torch.equal(own[name], share_of(name, tensor, rank, size)), name
        assert loaded.weights.weight_bytes == sum(tensor.nbytes for tensor in own.values())
        pages = PageShape.of(loaded.shard, 8, torch.float32).block_bytes
        assert pages == PageShape.of(loaded.config, 8, torch.float32).block_bytes // size


def test_drawn_weights_are_shares_of_those_of_one_rank(tmp_path: Path) -> None:
    folder = build_tiny_llama(tmp_path, shape=LLAMA)
    whole = load(folder, ALONE, load_format="dummy")
    for rank in range(2):
        loaded = load(folder, Group(rank, 2), load_format="dummy")
        assert (loaded.digest, loaded.weights.parameters) == (whole.digest, whole.weights.parameters)
        for name, tensor in loaded.model.destinations().items():
            assert torch.equal(tensor, share_of(name, whole.model.destinations()[name], rank, 2)), name


def test_columns_of_a_piece_of_any_size() -> None:
    whole = torch.arange(7 * 12, dtype=torch.float32).view(7, 12)
    share = Share((7, 12), dim=1, first=4)
    for size in range(1, 90):
        got = torch.full((7, 3), float("nan"))
        for start in range(0, whole.numel(), size):
            share.copy(whole.view(-1)[start : start + size], start, got)
        assert torch.equal(got, whole[:, 4:7]), size


def test_a_tensor_of_the_wrong_shape_is_held_against_the_whole(tmp_path: Path) -> None:
    folder = build_tiny_llama(tmp_path, shape=LLAMA)
    name = "model.layers.0.mlp.down_proj.weight"
    weights = random_weights(LLAMA, 0)
    save_weights(folder, weights | {name: weights[name][:, :48].contiguous()})
    with pytest.raises(CheckpointError) as caught:
        load(folder, Group(0, 2))
    assert str(caught.value).endswith(f"tensor {name!r}: has shape [64, 48], config.json asks for [64, 96]")


@pytest.mark.parametrize(
    ("changes", "size", "line"),
    [
        ({}, 3, "num_attention_heads 4 is not a multiple of tensor_parallel 3"),
        ({"num_key_value_heads": 2}, 4, "num_key_value_heads 2 is not a multiple of tensor_parallel 4"),
        ({"intermediate_size": 97}, 2, "intermediate_size 97 is not a multiple of tensor_parallel 2"),
    ],
)
def test_what_cannot_be_divided_is_named(changes: dict[str, int], size: int, line: str, tmp_path: Path) -> None:
    folder = build_tiny_llama(tmp_path, shape=replace(LLAMA, **changes))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError) as caught:
        load(folder, Group(0, size))
    assert str(caught.value) == f"{folder}/config.json: {line}"


def test_a_family_that_nobody_has_spread_is_refused(tmp_path: Path) -> None:
    config = replace(read_config(build_tiny_llama(tmp_path)), architecture="FusedForCausalLM")
    with pytest.raises(CheckpointError, match="not for FusedForCausalLM"):
        rank_config(config, 2, tmp_path)
    assert rank_config(config, 1, tmp_path) is config


def prompt_logits(loaded: LoadedModel, ids: Tensor) -> Tensor:
    """float32 [ids, vocabulary]"""
    shape = (8, 16, loaded.shard.kv_heads, loaded.shard.head_dim)
    pages = [LayerCache(*torch.zeros(2, *shape, dtype=loaded.dtype)) for _ in range(loaded.shard.layers)]
    count = ids.numel()
    batch = AttentionBatch.build(
        torch.arange(count),
        torch.tensor([0, count]).int(),
        torch.tensor([count]).int(),
        torch.arange(8)[None].int(),
        block_tokens=16,
        scratch=Scratch(loaded.dtype),
    )
    with torch.inference_mode():
        return loaded.model.logits(loaded.model.forward(ids, batch, pages)).float()


@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
@pytest.mark.parametrize(
    "shape",
    [replace(LLAMA, attention_bias=False, mlp_bias=False), QWEN3, QWEN2, MISTRAL],
    ids=["llama", "qwen3", "qwen2", "mistral"],
)
def test_the_logits_of_two_ranks_are_those_of_transformers(
    shape: TinyLlama, late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 as far from them as those of one rank. ``late``: layers that add to the stream where they end."""
    monkeypatch.setattr("penstock.executor.models.llama.late_pays", lambda rows, size: late)
    folder = build_tiny_llama(tmp_path, seed=5, shape=shape)
    ids = torch.randint(3, shape.vocab_size, (90,), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        expected = load_reference(folder)(ids[None]).logits[0]

    def logits(group: Group, dtype: str) -> Tensor:
        loaded = load(folder, group, dtype=dtype)
        if late:
            loaded.model.absorb_norms()
        return prompt_logits(loaded, ids)

    def error(got: Tensor) -> float:
        return float((got - expected).norm() / expected.norm())

    with ranks(2) as threads:
        for got in threads.each(lambda group: logits(group, "float32")):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
        for got in threads.each(lambda group: logits(group, "bfloat16")):
            assert error(got) < 1.5 * error(logits(ALONE, "bfloat16"))
