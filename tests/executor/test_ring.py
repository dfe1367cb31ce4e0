"""The byte ring: order, wrap-around, bounds, wake-ups, several readers."""

import os
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.executor.ring import RingHandle, RingReader, RingWriter, create_ring


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=1000), st.just(None)), max_size=200))
def test_messages_come_out_once_and_in_order(script: list[bytes | None]) -> None:
    """None stands for a read; whatever is full is read once and tried again."""
    handle = create_ring(4096)
    writer, reader = RingWriter(handle), RingReader(handle)
    sent: list[bytes] = []
    got: list[bytes] = []

    def read() -> bool:
        message = reader.get()
        if message is not None:
            got.append(message)
        return message is not None

    for item in script:
        if item is None:
            read()
            continue
        while not writer.put(item):
            assert read()
        sent.append(item)
    while read():
        pass
    assert got == sent
    assert writer.free_bytes() == 4096
    writer.close()
    reader.close()
    handle.close()


def test_a_full_ring_takes_nothing_and_an_oversized_message_is_an_error() -> None:
    handle = create_ring(4096)
    writer = RingWriter(handle)
    assert [writer.put(bytes(1020)) for _ in range(5)] == [True] * 4 + [False]
    with pytest.raises(ValueError, match="more than the ring's 1024"):
        writer.put(bytes(1025))


def test_the_slowest_reader_bounds_the_writer_and_each_gets_all() -> None:
    handle = create_ring(4096, readers=2)
    writer, one, two = RingWriter(handle), RingReader(handle, 0), RingReader(handle, 1)
    for i in range(4):
        assert writer.put(bytes([i]) * 1000)
    assert [one.get() is not None for _ in range(5)] == [True] * 4 + [False]
    assert not writer.put(bytes(1000))
    assert two.get() == bytes(1000)
    assert writer.put(bytes(1000))


def test_no_wake_up_is_lost() -> None:
    """A writer and a sleeping reader on two threads: each message arrives long before the timeout."""
    handle = create_ring(1 << 16)
    writer, reader = RingWriter(handle), RingReader(handle)
    late: list[float] = []

    def read() -> None:
        for _ in range(2000):
            message = reader.wait(5.0)
            assert message is not None
            late.append(time.monotonic() - float(message))

    thread = threading.Thread(target=read)
    thread.start()
    for i in range(2000):
        assert writer.put(str(time.monotonic()).encode())
        if i % 3:
            time.sleep(0.0001)
    thread.join(20)
    assert len(late) == 2000
    assert max(late) < 2


def test_wait_returns_none_after_its_time() -> None:
    handle = create_ring(4096)
    start = time.monotonic()
    assert RingReader(handle).wait(0.05) is None
    assert 0.04 < time.monotonic() - start < 1


def test_a_sleeping_reader_of_another_process_is_woken() -> None:
    handle = create_ring(1 << 16)
    writer = RingWriter(handle)
    code = (
        "import sys\n"
        "from penstock.executor.ring import RingHandle, RingReader\n"
        "reader = RingReader(RingHandle.decode(sys.argv[1]))\n"
        "print(sum(len(reader.wait(10) or b'') for _ in range(3)))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, handle.encode()], pass_fds=handle.fds(), stdout=subprocess.PIPE, env=os.environ
    )
    for size in (10, 20, 30):
        time.sleep(0.1)
        assert writer.put(bytes(size))
    output, _ = child.communicate(timeout=20)
    assert output == b"60\n"


def test_a_handle_survives_its_encoding() -> None:
    handle = create_ring(4096, readers=2)
    again = RingHandle.decode(handle.encode())
    assert again.fds() == handle.fds()
    with pytest.raises(ValueError, match="invalid literal"):
        RingHandle.decode("garbage")
