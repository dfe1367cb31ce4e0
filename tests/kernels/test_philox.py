"""Philox4x32-10 against the known answers of its authors (Random123, ``kat_vectors``)."""

import pytest
import torch
from torch import Tensor

from penstock.kernels.sampling.philox import philox_4x32, uniform, words

Words = tuple[int, int, int, int]

KNOWN_ANSWERS: list[tuple[Words, tuple[int, int], Words]] = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def column(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: Words, key: tuple[int, int], answer: Words) -> None:
    c0, c1, c2, c3 = (column(word) for word in counter)
    out = philox_4x32((c0, c1, c2, c3), (column(key[0]), column(key[1])))
    assert tuple(int(word) for word in out) == answer


def test_a_batch_is_its_rows() -> None:
    """Vectorised and broadcast words are the words of each counter alone."""
    c0, c1, c2, c3 = (column(*(answer[0][i] for answer in KNOWN_ANSWERS)) for i in range(4))
    k0, k1 = (column(*(answer[1][i] for answer in KNOWN_ANSWERS)) for i in range(2))
    out = torch.stack(philox_4x32((c0, c1, c2, c3), (k0, k1)), dim=1)
    assert out.tolist() == [list(answer[2]) for answer in KNOWN_ANSWERS]


def test_words_read_negative_values_as_unsigned() -> None:
    low, high = words(torch.tensor([-1, 0x299F31D0A4093822, -(2**63)]))
    assert low.tolist() == [0xFFFFFFFF, 0xA4093822, 0]
    assert high.tolist() == [0xFFFFFFFF, 0x299F31D0, 0x80000000]


def test_uniform_stays_inside_the_open_interval() -> None:
    ends = uniform(column(0, 1, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF))
    assert ends.dtype == torch.float32
    assert ends[0] == 2.0**-33
    assert bool((ends > 0).all())
    assert bool((ends < 1).all())
    assert bool((ends.diff() >= 0).all())
