"""The pool of KV blocks."""

from collections.abc import Iterable


class BlockPool:
    """Numbers of free blocks, 0…total-1, last freed first: what was just read is still in the caches."""

    __slots__ = ("_free", "block_tokens", "total")

    def __init__(self, total: int, block_tokens: int) -> None:
        self.total = total
        self.block_tokens = block_tokens
        self._free = list(range(total - 1, -1, -1))

    @property
    def free(self) -> int:
        """How many blocks are free."""
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-tokens // self.block_tokens)

    def take(self) -> int:
        """A free block. Raises IndexError if there is none."""
        return self._free.pop()

    def give_back(self, blocks: Iterable[int]) -> None:
        """Free blocks. A later plan may use them at once: the device works in the order of plans."""
        self._free.extend(blocks)
