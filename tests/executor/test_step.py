"""The step contract on the wire."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.executor import step

NUMBERS = st.integers(0, 2**32 - 1)
COLUMN = st.lists(NUMBERS, max_size=8).map(step.pack_u32)


@given(
    st.builds(
        step.StepPlan,
        NUMBERS,
        NUMBERS,
        COLUMN,
        st.lists(
            st.builds(
                step.Admission,
                NUMBERS,
                COLUMN,
                NUMBERS,
                NUMBERS,
                st.builds(step.Sampling, st.floats(0, 2), st.floats(0, 1)),
                st.builds(step.Stopping, NUMBERS, NUMBERS, COLUMN),
                st.integers(0, 2**64 - 1),
            ),
            max_size=3,
        ).map(tuple),
        st.lists(st.builds(step.Fragment, NUMBERS, NUMBERS, COLUMN), max_size=2).map(tuple),
        COLUMN,
        COLUMN,
        COLUMN,
        COLUMN,
        COLUMN,
        st.none() | COLUMN,
        st.lists(st.builds(step.BlockCopy, NUMBERS, st.booleans(), COLUMN, COLUMN), max_size=2).map(tuple),
        st.integers(1, 8),
    )
)
def test_a_plan_survives_its_encoding(plan: step.StepPlan) -> None:
    assert step.decode_plan(step.encode_plan(plan)) == plan


def test_a_result_survives_its_encoding() -> None:
    columns = step.LogProbColumns(b"\1\0", b"\0" * 4, b"\0" * 4)
    result = step.StepResult(
        1, 2, b"\1", b"\7\0\0\0", (step.SlotFailure(3, "NaN"),), (9,), columns, (step.PromptLogProbs(1, 0, columns),), 5
    )
    assert step.decode_result(step.encode_result(result)) == result


@pytest.mark.parametrize("garbage", [b"", b"\xff", b"\x93\1\2\xa1a", b"\x90", b"\x81\1\2"])
def test_garbage_is_refused(garbage: bytes) -> None:
    for decode in (step.decode_plan, step.decode_result):
        with pytest.raises(msgspec.DecodeError):
            decode(garbage)


def test_columns_are_little_endian_u32() -> None:
    assert step.pack_u32([1, 2**32 - 1]) == b"\1\0\0\0\xff\xff\xff\xff"
    assert step.unpack_u32(b"\1\0\0\0").tolist() == [1]
    with pytest.raises(ValueError, match="multiple"):
        step.unpack_u32(b"\1\0\0")
