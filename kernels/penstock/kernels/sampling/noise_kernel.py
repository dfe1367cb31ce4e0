# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Gumbel noise inside a kernel: the numbers of :func:`penstock.kernels.sampling.reference.gumbel_noise`."""

import math

import triton
import triton.language as tl

from penstock.kernels.dispatch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
LN2 = tl.constexpr(math.log(2.0))
_SMALL = tl.constexpr(2.0**-5)
_LARGEST = tl.constexpr(1.0 - 2.0**-24)


@triton.jit
def gumbel(quads, position, sample_index, level, seed, size: tl.constexpr):
    """Noise float32 [size] of the ``size`` members of a level from ``4 · quads[0]`` on.

    ``quads`` int32 [size / 4], in a row; ``position``, ``sample_index`` and ``level`` int32, ``seed`` int64: read as
    unsigned. One call of Philox makes the noise of four members.
    """
    word0, word1, word2, word3 = tl.philox(seed, quads, position, sample_index, level)
    # Member 4 q + v is lane v of counter q: joined innermost, so that each thread keeps its own.
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3)).reshape(size)
    uniform = tl.minimum((words.to(tl.float32) + 0.5) * 2.0**-32, _LARGEST)
    return -LN2 * log2(_exponential(uniform))


@triton.jit
def _exponential(uniform):
    """``-log1p(-uniform)``: by its series where ``1 - uniform`` would drop digits that matter."""
    series = uniform * (1.0 + uniform * (1 / 2 + uniform * (1 / 3 + uniform * (1 / 4 + uniform * (1 / 5)))))
    return tl.where(uniform < _SMALL, series, -LN2 * log2(1.0 - uniform))


@triton.jit
def log2(x):
    """The base-2 logarithm of normal numbers by one instruction, to within 2^-22: ``tl.log2`` takes fifteen."""
    if _INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
