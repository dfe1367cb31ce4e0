"""What a message costs on the wire: our codec beside betterproto2's own and the bare C codec (upb).

One-token StreamResponse, encode and parse; Outputs of 256 samples. µs, medians of 7 rounds.
``python bench/codec.py``
"""

import statistics
import timeit
from array import array
from collections.abc import Callable
from typing import Any

from google.protobuf.message_factory import GetMessageClass

from penstock.rpc.codec import decoder, descriptor_of, encoder
from penstock.v1 import Outputs, StreamResponse
from record import save

ROUNDS = 7
CALLS = 5000


def cost(call: Callable[[], object]) -> float:
    """µs of one call."""
    return statistics.median(timeit.repeat(call, number=CALLS, repeat=ROUNDS)) / CALLS * 1e6


def chunk() -> dict[str, float]:
    """A message with one token."""
    message = StreamResponse(text=" return", token_ids=[1234])
    encode, decode = encoder(StreamResponse), decoder(StreamResponse)
    data = encode(message)
    wire: Any = GetMessageClass(descriptor_of(StreamResponse))
    whole = wire.FromString(data)
    return {
        "ours_encode_us": cost(lambda: encode(message)),
        "ours_parse_us": cost(lambda: decode(data)),
        "betterproto2_encode_us": cost(lambda: bytes(message)),
        "betterproto2_parse_us": cost(lambda: StreamResponse.parse(data)),
        "upb_encode_us": cost(whole.SerializeToString),
        "upb_parse_us": cost(lambda: wire.FromString(data)),
    }


def outputs() -> dict[str, float]:
    """One id for each of 256 samples."""
    column = array("I", range(256)).tobytes()
    message = Outputs(handles=column, offsets=column, counts=column, ids=column)
    encode, decode = encoder(Outputs), decoder(Outputs)
    data = encode(message)
    return {
        "ours_encode_us": cost(lambda: encode(message)),
        "ours_parse_us": cost(lambda: decode(data)),
        "betterproto2_encode_us": cost(lambda: bytes(message)),
        "betterproto2_parse_us": cost(lambda: Outputs.parse(data)),
    }


def main() -> None:
    """Measure, print and save."""
    figures = {"one_token": chunk(), "outputs_of_256": outputs()}
    print(figures)
    save("codec", figures)


if __name__ == "__main__":
    main()
