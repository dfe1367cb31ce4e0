"""Token ids to text, as they come: never half a UTF-8 character, and O(1) a token however long the output is.

For every decoder: whatever the chunking, the deltas and the final flush together are the text that the whole
output has behind its prompt. That is `decode(prompt + output)` without `decode(prompt)`, with one deliberate
difference: where a run of byte-fallback tokens is *not* valid UTF-8, the library turns the whole run into
U+FFFD, also its good characters. They were streamed long ago; here only the bad bytes become U+FFFD.
"""

from codecs import utf_8_decode
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from penstock.service.text.pieces import ByteFallbackPieces, ByteLevelPieces

REPLACEMENT: Final = "\ufffd"

MAX_UTF8_BYTES: Final = 4


class IncrementalDetokenizer(Protocol):
    """The state of one sample's output. Not for use from several threads."""

    def feed(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete, perhaps none."""
        ...

    def flush(self) -> str:
        """The rest: bytes that never became a character, as U+FFFD. The output ends here."""
        ...


class ByteLevelDetokenizer:
    """For byte-level BPE: a table of bytes and an incremental UTF-8 decoder.

    A prompt that ends in half a character is continued: its first bytes are in the prompt, the character
    comes out here.
    """

    __slots__ = ("_pending", "_pieces", "_skip")

    def __init__(
        self, pieces: ByteLevelPieces, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._pieces = pieces
        self._skip = skip_special_tokens
        self._pending = b""
        self.feed(prompt_ids[-MAX_UTF8_BYTES:])

    def feed(self, ids: Sequence[int]) -> str:
        data = self._pending + self._pieces.join(ids, skip_special_tokens=self._skip)
        text, used = utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def flush(self) -> str:
        text, _ = utf_8_decode(self._pending, "replace", True)
        self._pending = b""
        return text


class ByteFallbackDetokenizer:
    """For SentencePiece BPE with byte fallback: texts pass through, runs of byte tokens are read as UTF-8.

    The space at the start of a text is dropped, as the decoder does, only if nothing visible stands in the
    prompt.
    """

    __slots__ = ("_pending", "_pieces", "_skip", "_strip_left")

    def __init__(
        self, pieces: ByteFallbackPieces, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._pieces = pieces
        self._skip = skip_special_tokens
        self._pending = bytearray()
        prompt = pieces.select(prompt_ids, skip_special_tokens=skip_special_tokens)
        self._strip_left = 0 if any(piece != "" for piece in prompt) else pieces.strip_count

    def feed(self, ids: Sequence[int]) -> str:
        texts = []
        for piece in self._pieces.select(ids, skip_special_tokens=self._skip):
            if isinstance(piece, int):
                texts.append(self._take_byte(piece))
            elif self._pending:
                texts.append(self._give_up() + piece)
            else:
                texts.append(piece)
        return self._strip("".join(texts))

    def flush(self) -> str:
        return self._strip(self._give_up())

    def _take_byte(self, byte: int) -> str:
        self._pending.append(byte)
        bad = ""
        while True:
            try:
                text, used = utf_8_decode(self._pending, "strict", False)
            except UnicodeDecodeError as error:
                bad += REPLACEMENT * error.end
                del self._pending[: error.end]
            else:
                del self._pending[:used]
                return bad + text

    def _give_up(self) -> str:
        """Each byte of an unfinished character is one U+FFFD."""
        count = len(self._pending)
        self._pending.clear()
        return REPLACEMENT * count

    def _strip(self, text: str) -> str:
        while self._strip_left and text:
            if text[0] != self._pieces.strip:
                self._strip_left = 0
            else:
                text = text[1:]
                self._strip_left -= 1
        return text


class WindowDetokenizer:
    """For any other decoder: two decodes of a short window a token.

    The window holds the tokens whose text came out last, for context, and those whose text has not come out
    yet; the new text is what the second group adds to the text of the first. Text that ends in U+FFFD may be
    half a character and is held back, but not for more tokens than a character has bytes.
    """

    __slots__ = ("_context", "_context_text", "_decode", "_kept", "_window")

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        kept: Callable[[int], bool],
        prompt_ids: Sequence[int] = (),
    ) -> None:
        """`decode` is the tokenizer's; `kept` tells the ids that it does not skip."""
        self._decode = decode
        self._kept = kept
        self._window = last_kept(prompt_ids, kept, MAX_UTF8_BYTES)
        self._context = len(self._window)
        self._context_text = decode(self._window)

    def feed(self, ids: Sequence[int]) -> str:
        return "".join([self._feed_one(token) for token in ids if self._kept(token)])

    def flush(self) -> str:
        return self._take(self._decode(self._window)) if len(self._window) > self._context else ""

    def _feed_one(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) and len(self._window) - self._context < MAX_UTF8_BYTES:
            return ""
        return self._take(text)

    def _take(self, text: str) -> str:
        fresh = text[len(self._context_text) :]
        del self._window[: self._context]
        self._context = len(self._window)
        self._context_text = self._decode(self._window)
        return fresh


def last_kept(ids: Sequence[int], kept: Callable[[int], bool], count: int) -> list[int]:
    """The last `count` of those `ids` that are kept, in order."""
    found: list[int] = []
    for token in reversed(ids):
        if len(found) == count:
            break
        if kept(token):
            found.append(token)
    return found[::-1]
