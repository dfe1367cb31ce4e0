"""Zero the GPU code for other chips than sm_90 in a CUDA library, in place, so that it packs to nothing.

The layout of the file stays, and so does its sm_90 code. Intermediate code (PTX) goes where sm_90 code is beside it.
``python fatprune.py LIBRARY``
"""

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_MAGIC = struct.pack("<I", 0xBA55ED50)
_CONTAINER = struct.Struct("<IHHQ")
"""Of a fat binary: magic, version, bytes of this header, bytes that follow."""
_ENTRY = struct.Struct("<HHIQ")
"""Of one code object: kind, flags, bytes of its header, bytes that follow."""
_ARCH_OFFSET = 28
_PTX, _ELF = 1, 2
_KINDS = frozenset({1, 2, 4, 8, 16, 32, 64})
_KEPT_ARCH = 90


class Entry(NamedTuple):
    """One code object in the file."""

    kind: int
    arch: int
    start: int
    size: int


def prune(library: bytearray) -> int:
    """Zero what sm_90 does not need; how many bytes that were."""
    zeroed = 0
    for entries in containers(library):
        has_kept = any(entry.kind == _ELF and entry.arch == _KEPT_ARCH for entry in entries)
        for entry in entries:
            if (entry.kind == _ELF and entry.arch != _KEPT_ARCH) or (entry.kind == _PTX and has_kept):
                library[entry.start : entry.start + entry.size] = bytes(entry.size)
                zeroed += entry.size
    return zeroed


def containers(library: bytearray) -> Iterator[list[Entry]]:
    """The code objects of each fat binary. Raises ValueError for one that is not understood."""
    at = library.find(_MAGIC)
    while at >= 0:
        _, version, header, size = _CONTAINER.unpack_from(library, at)
        end = at + header + size
        if version == 1 and header == _CONTAINER.size and end <= len(library):
            yield list(_entries(library, at + header, end))
            at = library.find(_MAGIC, end)
        else:  # these bytes only look like one
            at = library.find(_MAGIC, at + 4)


def _entries(library: bytearray, at: int, end: int) -> Iterator[Entry]:
    while at < end:
        kind, _, header, size = _ENTRY.unpack_from(library, at)
        if kind not in _KINDS or not 32 <= header <= 4096:
            raise ValueError(f"no code object at {at:#x}: kind {kind}, header of {header} bytes")
        (arch,) = struct.unpack_from("<I", library, at + _ARCH_OFFSET)
        yield Entry(kind, arch, at + header, size)
        at += header + size


def main() -> None:
    """Prune the file that is named."""
    path = Path(sys.argv[1])
    library = bytearray(path.read_bytes())
    zeroed = prune(library)
    path.write_bytes(library)
    print(f"{path.name}: {zeroed / 2**20:.1f} MiB zeroed of {len(library) / 2**20:.1f}")


if __name__ == "__main__":
    main()
