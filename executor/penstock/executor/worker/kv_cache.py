"""The pool of key/value pages: how many there are, and the tensors that hold them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from penstock.executor.layers.attention import LayerCache
from penstock.executor.models.config import ModelConfig
from penstock.executor.step import ModelSpec

CPU_CACHE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class PageShape:
    """One page holds ``block_tokens`` tokens of every layer."""

    layers: int
    block_tokens: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of a page over all layers, keys and values."""
        return 2 * self.layers * self.block_tokens * self.kv_heads * self.head_dim * self.dtype.itemsize

    @classmethod
    def of(cls, config: ModelConfig, block_tokens: int, dtype: torch.dtype) -> PageShape:
        """The pages of this model."""
        return cls(config.layers, block_tokens, config.kv_heads, config.head_dim, dtype)


def longest_sequence(spec: ModelSpec, config: ModelConfig) -> int:
    """Most tokens of a sequence. Raises ValueError if more are asked for than the model can take."""
    most = config.max_positions
    if spec.max_model_tokens is None:
        return most
    if not 1 <= spec.max_model_tokens <= most:
        of_window = ", its sliding window" if most == config.window else ""
        raise ValueError(f"max_model_tokens {spec.max_model_tokens} is not within the model's {most}{of_window}")
    return spec.max_model_tokens


def count_blocks(spec: ModelSpec, shape: PageShape, max_model_tokens: int) -> int:
    """Blocks of the pool: as many as asked for, else what the bytes hold, at most what all slots can use.

    Raises ValueError if not even one fits.
    """
    if spec.num_blocks is not None:
        blocks = spec.num_blocks
    else:
        useful = spec.max_sequences * -(-max_model_tokens // spec.block_tokens)
        blocks = min((spec.kv_cache_bytes or CPU_CACHE_BYTES) // shape.block_bytes, useful)
    if blocks < 1:
        raise ValueError(f"the key/value cache has no room for one block of {shape.block_bytes} bytes")
    return blocks


def allocate_pages(shape: PageShape, blocks: int, device: torch.device) -> tuple[LayerCache, ...]:
    """The pages of every layer, zeroed; on CPU the memory is taken when it is first written."""
    size = (blocks, shape.block_tokens, shape.kv_heads, shape.head_dim)

    def zeros() -> torch.Tensor:
        return torch.zeros(size, dtype=shape.dtype, device=device)

    return tuple(LayerCache(zeros(), zeros()) for _ in range(shape.layers))
