"""The files that make a tokenizer, as bytes: a scheduler hands them out, a service builds on them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import msgspec

from penstock.service.text.errors import TokenizerFilesError

MIB: Final = 1 << 20

MAX_FILE_BYTES: Final[Mapping[str, int]] = MappingProxyType(
    {
        "tokenizer.json": 64 * MIB,
        "tokenizer_config.json": 8 * MIB,
        "chat_template.jinja": 1 * MIB,
        "special_tokens_map.json": 1 * MIB,
    }
)
"""The files that are used, and the most bytes each may have (large `tokenizer.json` have 34 MB)."""


def digest(files: Mapping[str, bytes]) -> str:
    """BLAKE2b-256, in hex, over the names in sorted order and their contents.

    Every name (UTF-8) and every content is preceded by its length as eight little-endian bytes.
    """
    state = blake2b(digest_size=32)
    for name in sorted(files):
        for part in (name.encode(), files[name]):
            state.update(len(part).to_bytes(8, "little"))
            state.update(part)
    return state.hexdigest()


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """A checked bundle: `tokenizer.json` is there, no name is unknown, no file is over its cap.

    Raises `TokenizerFilesError` otherwise.
    """

    contents: Mapping[str, bytes] = field(repr=False, compare=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        if "tokenizer.json" not in self.contents:
            raise TokenizerFilesError("there is no tokenizer.json")
        for name, content in self.contents.items():
            _check_size(name, len(content))
        object.__setattr__(self, "contents", MappingProxyType(dict(self.contents)))
        object.__setattr__(self, "digest", digest(self.contents))

    @classmethod
    def from_directory(cls, directory: Path) -> "TokenizerFiles":
        """Those of the known files that exist in `directory`; sizes are checked before anything is read."""
        try:
            found = {name: path for name in MAX_FILE_BYTES if (path := directory / name).is_file()}
            for name, path in found.items():
                _check_size(name, path.stat().st_size)
            return cls({name: path.read_bytes() for name, path in found.items()})
        except OSError as error:
            raise TokenizerFilesError(f"cannot read the tokenizer in {directory}: {error.strerror}") from error

    def json_object(self, name: str) -> dict[str, Any]:
        """The JSON object in file `name`; empty when the bundle has no such file."""
        if name not in self.contents:
            return {}
        try:
            return msgspec.json.decode(self.contents[name], type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise TokenizerFilesError(f"{name} is not a JSON object: {error}") from error

    def text(self, name: str) -> str | None:
        """The UTF-8 text of file `name`; None when the bundle has no such file."""
        if name not in self.contents:
            return None
        try:
            return self.contents[name].decode()
        except UnicodeDecodeError as error:
            raise TokenizerFilesError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from error


def _check_size(name: str, size_bytes: int) -> None:
    if name not in MAX_FILE_BYTES:
        raise TokenizerFilesError(f"{name!r} is not a tokenizer file")
    if size_bytes > MAX_FILE_BYTES[name]:
        raise TokenizerFilesError(f"{name} has {size_bytes} bytes, at most {MAX_FILE_BYTES[name]} are read")
