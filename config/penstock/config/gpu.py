"""Whether this machine has a GPU, found out without loading anything."""

from pathlib import Path
from typing import Final

_DEVICES: Final = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"))


def has_gpu() -> bool:
    """Whether an NVIDIA driver is there."""
    return any(path.exists() for path in _DEVICES)
