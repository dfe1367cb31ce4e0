"""The tokenizer's files, as bytes that services fetch by digest. Nothing here reads what is in them."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType
from typing import Final, Self

from penstock.rpc.errors import not_found
from penstock.v1 import ErrorReason, GetTokenizerResponse

MIB: Final = 1 << 20
PIECE_BYTES: Final = 256 << 10

MAX_FILE_BYTES: Final[Mapping[str, int]] = MappingProxyType(
    {
        "tokenizer.json": 64 * MIB,
        "tokenizer_config.json": 8 * MIB,
        "chat_template.jinja": 1 * MIB,
        "special_tokens_map.json": 1 * MIB,
    }
)
"""The files that are handed out, and the most bytes each may have."""


class TokenizerError(Exception):
    """The tokenizer's files cannot be handed out; the text is one line that names the file."""


def digest(files: Mapping[str, bytes]) -> str:
    """BLAKE2b-256, in hex, over the names in sorted order and their contents.

    Every name (UTF-8) and every content is preceded by its length as eight little-endian bytes. Services compute the
    same over what they have received.
    """
    state = blake2b(digest_size=32)
    for name in sorted(files):
        for part in (name.encode(), files[name]):
            state.update(len(part).to_bytes(8, "little"))
            state.update(part)
    return state.hexdigest()


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The files of a model folder that make its tokenizer."""

    contents: Mapping[str, bytes] = field(repr=False)
    digest: str

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Those of the known files that are there. Raises TokenizerError; tokenizer.json must be there."""
        found = {name: path for name in MAX_FILE_BYTES if (path := folder / name).is_file()}
        contents = {name: _read(path, MAX_FILE_BYTES[name]) for name, path in found.items()}
        if "tokenizer.json" not in contents:
            raise TokenizerError(f"{folder / 'tokenizer.json'}: there is no such file")
        return cls(MappingProxyType(contents), digest(contents))

    async def pieces(self, wanted: str) -> AsyncIterator[GetTokenizerResponse]:
        """All files in pieces; a file's pieces follow one another. Raises NOT_FOUND for another digest."""
        if wanted != self.digest:
            raise not_found(ErrorReason.TOKENIZER_NOT_FOUND, "no tokenizer of that digest")
        for name, content in self.contents.items():
            for start in range(0, max(len(content), 1), PIECE_BYTES):
                yield GetTokenizerResponse(name=name, data=content[start : start + PIECE_BYTES])


def _read(path: Path, most: int) -> bytes:
    try:
        if (size := path.stat().st_size) > most:
            raise TokenizerError(f"{path}: {size} bytes, at most {most} are served")
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: {error.strerror}") from error
