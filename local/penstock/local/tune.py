"""`penstock tune MODEL_DIR`: find the best cuts of steps of few rows for a model on this machine's GPU."""

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from penstock.config import ConfigError, load
from penstock.executor.executor import ExecutorError
from penstock.executor.models.errors import CheckpointError

_HELP: Final = """\
Measures whole decode steps of one to three rows, cut in different ways, and writes the best ones to a file that workers
read when they start. A cut whose result is not as near to a float32 reference as the default's is not taken.
Weights are drawn: a folder with a config.json will do. Takes about a minute for each number of rows and class of
context; nothing else should use the GPU meanwhile."""


class TuneConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What to tune, and for how long."""

    model_dir: Annotated[Path, Meta(description="A model folder; its config.json will do.")]
    rows: Annotated[str, Meta(description="Numbers of rows, separated by commas, or all.")] = "all"
    contexts: Annotated[str, Meta(description="Classes of contexts, 0 short to 2 long, separated by commas.")] = "0,1,2"
    seconds: Annotated[float, Meta(gt=0, description="At most, for each of them.")] = 90.0
    device: Annotated[str, Meta(description="cuda or cuda:N.")] = "cuda"
    output: Annotated[Path | None, Meta(description="The file; None: where this user's workers look for it.")] = None


def main(argv: Sequence[str]) -> int:
    """Run ``penstock tune``."""
    config = load(TuneConfig, argv, os.environ, prog="penstock tune", description=_HELP, positional="model_dir")
    try:
        return run(config)
    except (CheckpointError, ExecutorError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def run(config: TuneConfig) -> int:
    """Tune, telling every improvement. Raises ExecutorError if it cannot be done."""
    import torch

    from penstock.executor.worker.device.tune import tokens_of, tune
    from penstock.executor.worker.model_runner import load_model
    from penstock.executor.worker.worker import choose_device
    from penstock.kernels.gemv.shapes import MOST_ROWS, most_rows
    from penstock.kernels.gemv.tuned import file_of, read_entries, user_folder, write_entries

    rows = _numbers(config.rows, "rows", range(1, MOST_ROWS + 1)) if config.rows != "all" else None
    contexts = _numbers(config.contexts, "contexts", range(3))
    device = choose_device(config.device)
    if device.type != "cuda":
        raise ExecutorError(f"device {config.device!r} is no GPU: there is nothing to tune")
    torch.cuda.set_device(device)
    path = config.output or user_folder() / file_of(torch.cuda.get_device_name(device))
    if path.is_file():
        try:
            read_entries(path)
        except ValueError as error:
            raise ExecutorError(str(error)) from error
    with torch.inference_mode():
        loaded = load_model(config.model_dir, "bfloat16", lambda done, total: None, device=device, load_format="dummy")
        weights = loaded.model.few_rows()
    if weights is None:
        raise ExecutorError(f"{config.model_dir}: the kernels for few rows do not take this model")
    most = most_rows(weights.sizes)
    if rows and max(rows) > most:
        raise ExecutorError(f"{config.model_dir}: steps of more than {most} rows have other kernels in this model")
    for count in rows or range(1, most + 1):
        near = None
        for context in contexts:
            if tokens_of(weights, context) is None:
                _tell(f"contexts {context}: the model has no positions for them")
                continue
            begun = time.monotonic()
            entry = tune(weights, count, context, near=near, limit_s=config.seconds, measured=_versions(), told=_tell)
            if entry is None:
                raise ExecutorError(f"{config.model_dir}: the kernels for few rows do not take this model")
            near = near or entry.shape
            write_entries(path, [entry])
            _tell(
                f"{count} rows, {entry.tokens} tokens: {entry.step_ms:.3f} ms a step, {entry.default_ms:.3f} untuned, "
                f"error {entry.error:.4f}; {time.monotonic() - begun:.0f} s"
            )
    print(f"written to {path}")
    return 0


def _numbers(words: str, name: str, allowed: range) -> list[int]:
    try:
        found = [int(word) for word in words.split(",")]
    except ValueError:
        raise ConfigError(f"{name} {words!r}: must be numbers separated by commas") from None
    for number in found:
        if number not in allowed:
            raise ConfigError(f"{name} {number}: must be from {allowed[0]} to {allowed[-1]}")
    return found


def _versions() -> str:
    versions: list[Any] = [f"{name} {metadata.version(name)}" for name in ("torch", "triton")]
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions.append(f"penstock {metadata.version('penstock')}")
    return ", ".join(versions)


def _tell(line: str) -> None:
    print(line, flush=True)
