"""cuBLASLt's own list of algorithms for a product, and products by one of them (cuBLASLt API reference, CUDA toolkit).

Torch takes the first algorithm that the library's heuristics name. For the few rows of a decode step, and for the many
of a full one, another of the same list is often the faster one: by up to a tenth.

The library is the one that torch has loaded; nothing is linked. All of one model's products share one work space, so
that they must run in one stream.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

WORKSPACE_BYTES: Final = 32 * 2**20
"""What NVIDIA advises for this generation."""
_ALIGNMENT: Final = 256
"""Bytes: what the heuristics expect of every address."""
_BFLOAT16, _FLOAT32, _COMPUTE_FLOAT32, _TRANSPOSED = 14, 0, 68, 1
"""CUDA_R_16BF, CUDA_R_32F, CUBLAS_COMPUTE_32F and CUBLAS_OP_T."""
_TRANSPOSE_FIRST, _MOST_WORKSPACE = 3, 1
"""CUBLASLT_MATMUL_DESC_TRANSA and CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES."""


Layouts = tuple[c_void_p, c_void_p, c_void_p]
"""Of the first operand, the second and the result."""


class CublasLtError(Exception):
    """The library cannot do what it was asked."""


class Algorithm(ctypes.Structure):
    """One entry of the list: cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class CublasLt:
    """A handle of the library, and its work space on one device."""

    def __init__(self, device: torch.device) -> None:
        """Raises CublasLtError if torch has not loaded the library."""
        self._library = ctypes.CDLL(_loaded_library())
        self._matmul = self._library.cublasLtMatmul
        self._matmul.argtypes = [c_void_p] * 14 + [c_size_t, c_void_p]
        self._handle = c_void_p()
        self._check(self._library.cublasLtCreate(byref(self._handle)))
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._workspace_at = self._workspace.data_ptr()
        self._device = self._workspace.device.index

    def product(self, rows: int, outputs: int, inputs: int) -> LtProduct:
        """The product of bfloat16 [rows, inputs] and [outputs, inputs]."""
        return LtProduct(self, rows, outputs, inputs)

    def descriptor(self) -> c_void_p:
        """Of a product summed in float32, its first operand transposed."""
        made = c_void_p()
        self._check(self._library.cublasLtMatmulDescCreate(byref(made), _COMPUTE_FLOAT32, _FLOAT32))
        option = c_int(_TRANSPOSED)
        self._check(self._library.cublasLtMatmulDescSetAttribute(made, _TRANSPOSE_FIRST, byref(option), c_size_t(4)))
        return made

    def layout(self, rows: int, columns: int) -> c_void_p:
        """Of a dense bfloat16 matrix, columns one behind the other."""
        made = c_void_p()
        size = (c_uint64(rows), c_uint64(columns), c_int64(rows))
        self._check(self._library.cublasLtMatrixLayoutCreate(byref(made), _BFLOAT16, *size))
        return made

    def algorithms(self, descriptor: c_void_p, layouts: Layouts, most: int) -> list[Algorithm]:
        """Up to ``most``, the one that the library holds for the best first."""
        preference = c_void_p()
        self._check(self._library.cublasLtMatmulPreferenceCreate(byref(preference)))
        room = c_size_t(WORKSPACE_BYTES)
        self._check(
            self._library.cublasLtMatmulPreferenceSetAttribute(preference, _MOST_WORKSPACE, byref(room), c_size_t(8))
        )
        found, count = (Algorithm * most)(), c_int()
        first, second, result = layouts
        self._check(
            self._library.cublasLtMatmulAlgoGetHeuristic(
                self._handle, descriptor, first, second, result, result, preference, most, found, byref(count)
            )
        )
        self._library.cublasLtMatmulPreferenceDestroy(preference)
        return [entry for entry in found[: count.value] if entry.state == 0]

    def run(
        self,
        descriptor: c_void_p,
        layouts: Layouts,
        algorithm: Algorithm,
        pointers: tuple[int, int, int],
        keep: c_float,
    ) -> None:
        """``result = first · second + keep · result`` in the current stream; addresses in that order, result last.

        A step without a graph makes hundreds of these calls: all that is found out here is the stream.
        """
        first, second, result = pointers
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        status = self._matmul(
            self._handle, descriptor, _ONE_AT, first, layouts[0], second, layouts[1], byref(keep), result, layouts[2],
            result, layouts[2], byref(algorithm), self._workspace_at, WORKSPACE_BYTES, stream,
        )  # fmt: skip
        if status:
            self._check(status)

    def _check(self, status: int) -> None:
        if status:
            raise CublasLtError(f"cuBLASLt says {status}")


_ONE, _ZERO = c_float(1.0), c_float(0.0)
_ONE_AT = byref(_ONE)


class LtProduct:
    """``x Wᵀ`` for one shape. To the library, whose matrices are column-major, it is ``W`` transposed times ``x``."""

    def __init__(self, library: CublasLt, rows: int, outputs: int, inputs: int) -> None:
        """Raises CublasLtError for a shape that the library does not take."""
        self._library = library
        self._descriptor = library.descriptor()
        self._layouts = (library.layout(inputs, outputs), library.layout(inputs, rows), library.layout(outputs, rows))

    def algorithms(self, most: int) -> list[Algorithm]:
        """Up to ``most`` that can do it, the one that the library holds for the best first."""
        return self._library.algorithms(self._descriptor, self._layouts, most)

    def run(self, algorithm: Algorithm, x: Tensor, weight: Tensor, out: Tensor, *, add: bool) -> None:
        """``out = x Wᵀ``, or ``out += x Wᵀ`` to ``add``. All as :meth:`takes` has them."""
        keep = _ONE if add else _ZERO
        pointers = weight.data_ptr(), x.data_ptr(), out.data_ptr()
        self._library.run(self._descriptor, self._layouts, algorithm, pointers, keep)

    @staticmethod
    def takes(*tensors: Tensor) -> bool:
        """Whether these operands are ones that the algorithms were chosen for."""
        return all(
            tensor.dtype == torch.bfloat16 and tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0
            for tensor in tensors
        )


def _loaded_library() -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "libcublasLt.so" in line:
            return line.split(maxsplit=5)[-1]
    raise CublasLtError("torch has not loaded cuBLASLt")
