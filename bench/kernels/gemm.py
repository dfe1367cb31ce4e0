"""Which way to compute the matrix products of a decode step: ``python bench/kernels/gemm.py [--model 8b]``.

For each product of a model and each number of rows: cuBLAS, cuBLASLt, and both with operands swapped, and what a start
chooses among cuBLASLt's algorithms (:mod:`penstock.executor.layers.matmul`), in microseconds;
where :mod:`penstock.kernels.product` has a cut, our own kernel and its share of the floor, and for one that ends with
SiLU·mul the library's product with that behind it; beside the floor (weights read once at the rate that a matrix-vector
product reaches here, or the multiplications at the rate of a large product, whichever is longer). The weights of all
layers take turns, so that none is in the L2 cache. One JSON line a figure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from penstock.executor.layers.matmul import Products
from penstock.kernels.activation import silu_mul
from penstock.kernels.product import gated_product, gated_shape, split_product, split_shape

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_timing import Report, graph_s, product_rate, read_rate

SHAPES = {
    "0.6b": {"qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072)},
    "8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
}
"""Outputs and inputs of each product."""
ROWS = (1, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256)
ROTATED_BYTES = 256 * 2**20
"""Weights that take turns: several times the L2 cache."""

TUNE_SECONDS = 5.0

Product = Callable[[Tensor, Tensor], Tensor]


def swapped(x: Tensor, weight: Tensor) -> Tensor:
    """The product with operands swapped, its result transposed back into rows."""
    return torch.mm(weight, x.t()).t().contiguous()


def swapped_view(x: Tensor, weight: Tensor) -> Tensor:
    """The same, its result left transposed."""
    return torch.mm(weight, x.t())


VARIANTS: dict[str, tuple[str, Product]] = {
    "cublas": ("cublas", linear),
    "lt": ("cublaslt", linear),
    "swapped": ("cublas", swapped),
    "swapped_view": ("cublas", swapped_view),
    "lt_swapped_view": ("cublaslt", swapped_view),
}


def own(name: str, x: Tensor, weight: Tensor) -> dict[str, Product]:
    """Our kernel for the product of that name, and what it takes the place of; nothing where there is no cut."""
    if name == "gate_up" and (gated := gated_shape(x, weight)) is not None:
        return {
            "own": lambda x, weight: gated_product(x, weight, gated),
            "cublas_silu": lambda x, weight: silu_mul(linear(x, weight)),
        }
    if name in ("o", "down") and (split := split_shape(x, weight)) is not None:
        return {"own": lambda x, weight: split_product(x, weight, split)}
    return {}


def measure(name: str, outputs: int, inputs: int, rows: int) -> dict[str, float]:
    """Microseconds of each variant."""
    copies = max(2, ROTATED_BYTES // (2 * outputs * inputs))
    weights = [torch.randn(outputs, inputs, dtype=torch.bfloat16, device="cuda") * 0.02 for _ in range(copies)]
    x = torch.randn(rows, inputs, dtype=torch.bfloat16, device="cuda")
    found = {}
    ours = {way: ("default", product) for way, product in own(name, x, weights[0]).items()}
    for way, (library, product) in (VARIANTS | ours).items():
        torch.backends.cuda.preferred_blas_library(library)

        def work(product: Product = product) -> None:
            for weight in weights:
                product(x, weight)

        found[way] = 1e6 * graph_s(work, copies)
    torch.backends.cuda.preferred_blas_library("default")
    products = Products()
    products.tune([rows], weights, limit_s=TUNE_SECONDS)
    found["chosen"] = 1e6 * graph_s(lambda: [products(x, weight) for weight in weights], copies)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, action="append")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--out", type=Path, help="append the lines to this file, too")
    arguments = parser.parse_args()
    read, rate = read_rate(), product_rate()
    report = Report("gemm", arguments.out, read_bytes_s=read, product_flop_s=rate)
    with torch.inference_mode():
        for model in arguments.model or SHAPES:
            for name, (outputs, inputs) in SHAPES[model].items():
                for rows in arguments.rows:
                    floor = 1e6 * max(2 * outputs * inputs / read, 2 * outputs * inputs * rows / rate)
                    times = {key: round(value, 2) for key, value in measure(name, outputs, inputs, rows).items()}
                    if "own" in times:
                        times["own_share"] = round(floor / times["own"], 3)
                    report(model=model, product=name, rows=rows, floor_us=round(floor, 2), **times)


if __name__ == "__main__":
    main()
