"""How fast a model could be: the bytes and the multiplications of the work over what the machine can do at most.

A decode step reads all weights once and the keys and values of every sequence; its products take at least as long as
reading the weights, or as multiplying them. A prompt costs its multiplications. Launches, norms, sampling and the host
cost nothing here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.executor.models.config import ModelConfig, read_config
from penstock.local.measure.ceilings import Ceilings


@dataclass(frozen=True, slots=True)
class Cost:
    """What a model costs, from its shape alone."""

    weights: int
    """Parameters that every row is multiplied with, the head included."""
    head: int
    """Of them those of the head: only rows that are sampled from."""
    kv_elements: int
    """Elements of keys and values of one token."""
    attention: int
    """Multiplications of one row with one token of its context, all layers."""
    element_bytes: int

    @classmethod
    def of(cls, config: ModelConfig, dtype: str) -> "Cost":
        """The cost of a model in "bfloat16" or "float32"."""
        queries, shared = config.heads * config.head_dim, config.kv_heads * config.head_dim
        attention = config.hidden_size * (2 * queries + 2 * shared)
        layer = attention + 3 * config.hidden_size * config.intermediate_size
        head = config.vocab_size * config.hidden_size
        return cls(
            weights=config.layers * layer + head,
            head=head,
            kv_elements=2 * config.layers * shared,
            attention=2 * config.layers * queries,
            element_bytes=2 if dtype == "bfloat16" else 4,
        )

    @classmethod
    def of_folder(cls, folder: Path, dtype: str) -> "Cost":
        """The cost of the model in a folder. Raises CheckpointError."""
        return cls.of(read_config(folder), dtype)

    def step_s(self, contexts: Sequence[int], ceilings: Ceilings) -> float:
        """A decode step of sequences of these lengths."""
        read = self.weights * self.element_bytes / ceilings.read_bytes_s
        multiply = 2 * self.weights * len(contexts) / ceilings.flop_s
        kv_bytes = sum(contexts) * self.kv_elements * self.element_bytes
        return max(read, multiply) + kv_bytes / ceilings.copy_bytes_s

    def prefill_s(self, prompts: Sequence[int], ceilings: Ceilings) -> float:
        """The multiplications of these prompts."""
        products = sum(prompts) * (self.weights - self.head) + len(prompts) * self.head
        attention = sum(length * (length + 1) // 2 for length in prompts) * self.attention
        return 2 * (products + attention) / ceilings.flop_s

    def work_s(self, prompts: Sequence[int], outputs: Sequence[int], ceilings: Ceilings) -> float:
        """All prompts, then decode steps of all sequences that are not done, until none is left."""
        seconds = self.prefill_s(prompts, ceilings)
        left = sorted(zip(outputs, prompts, strict=True), reverse=True)
        for step in range(1, max(outputs)):
            while left and left[-1][0] <= step:
                left.pop()
            seconds += self.step_s([prompt + step for _, prompt in left], ceilings)
        return seconds
