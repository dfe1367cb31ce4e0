"""What can be wrong with a checkpoint folder, and how an error is put in one line."""

from __future__ import annotations

from pathlib import Path


class CheckpointError(Exception):
    """A checkpoint that cannot be served; one line that names the file, and the tensor if one is at fault."""

    def __init__(self, path: Path, fault: str, tensor: str | None = None) -> None:
        where = str(path) if tensor is None else f"{path}: tensor {tensor!r}"
        super().__init__(" ".join(f"{where}: {fault}".split()))
        self.path = path
        self.tensor = tensor


def one_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0]}" if message else type(error).__name__
