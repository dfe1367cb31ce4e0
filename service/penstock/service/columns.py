"""Columns of the link: packed little-endian u32, as `array('I')` in memory."""

import sys
from array import array
from collections.abc import Iterable
from typing import Final

_ITEM_BYTES: Final = 4
_SWAP: Final = sys.byteorder == "big"


class BadColumn(Exception):
    """A column whose bytes are no whole number of elements, or columns of one table that differ in length."""


def pack_u32(values: "Iterable[int]") -> bytes:
    """The column of `values`, each below 2**32."""
    column = values if isinstance(values, array) and values.typecode == "I" else array("I", values)
    if _SWAP:
        column = column[:]
        column.byteswap()
    return column.tobytes()


def unpack_u32(data: bytes) -> "array[int]":
    """The values of a column. Raises `BadColumn`."""
    if len(data) % _ITEM_BYTES:
        raise BadColumn(f"a column of u32 has {len(data)} bytes")
    column = array("I", data)
    if _SWAP:
        column.byteswap()
    return column
