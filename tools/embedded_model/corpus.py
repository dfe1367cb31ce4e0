"""The corpus: one Python version's standard library, split by file and read as documents.

Which files are in, and which split a file belongs to, depends on its path and text alone, so that two
machines with the same Python version build the same corpus.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "pydoc_data"})
EXCLUDED_PREFIXES = ("lib2to3/tests/data/", "config-")
VALIDATION_PERCENT = 3
HELD_OUT_PERCENT = 5


class Split(Enum):
    """What a file is used for: fitting, choosing a checkpoint, or the figures on the card."""

    TRAIN = "train"
    VALIDATION = "validation"
    HELD_OUT = "held_out"


@dataclass(frozen=True, slots=True)
class Document:
    """One source file: its path relative to the standard library's root (posix) and its text."""

    path: str
    text: str

    @property
    def split(self) -> Split:
        """The split of this file, by the SHA-256 of its path."""
        bucket = int.from_bytes(hashlib.sha256(self.path.encode()).digest()[:8], "big") % 100
        if bucket < HELD_OUT_PERCENT:
            return Split.HELD_OUT
        if bucket < HELD_OUT_PERCENT + VALIDATION_PERCENT:
            return Split.VALIDATION
        return Split.TRAIN

    @property
    def is_test(self) -> bool:
        """Whether the file belongs to a test suite rather than to the library proper."""
        return any(part in ("test", "tests", "idle_test") for part in self.path.split("/")[:-1])

    @property
    def size_bytes(self) -> int:
        """Length of the text in UTF-8."""
        return len(self.text.encode())


def read_documents(stdlib: Path) -> list[Document]:
    """Every usable source file below `stdlib`, sorted by path.

    Raises FileNotFoundError when the folder holds none.
    """
    documents = list(_documents(stdlib))
    if not documents:
        raise FileNotFoundError(f"no Python sources below {stdlib}")
    return documents


def of_split(documents: Iterable[Document], split: Split) -> list[Document]:
    """The documents of one split, in their given order."""
    return [document for document in documents if document.split is split]


def digest(documents: Sequence[Document]) -> str:
    """SHA-256 over all paths and texts: names the corpus exactly."""
    state = hashlib.sha256()
    for document in documents:
        for field in (document.path, document.text):
            encoded = field.encode()
            state.update(len(encoded).to_bytes(8, "big") + encoded)
    return state.hexdigest()


def _documents(stdlib: Path) -> Iterator[Document]:
    for file in sorted(stdlib.rglob("*.py")):
        path = file.relative_to(stdlib).as_posix()
        if _is_excluded_path(path):
            continue
        text = _read_utf8(file)
        if text is not None and _is_worth_learning(path, text):
            yield Document(path, text)


def _is_excluded_path(path: str) -> bool:
    parts = path.split("/")
    # `_sysconfigdata…` is generated at build time and holds the build machine's paths.
    return (
        not EXCLUDED_FOLDERS.isdisjoint(parts)
        or path.startswith(EXCLUDED_PREFIXES)
        or parts[-1].startswith("_sysconfigdata")
    )


def _read_utf8(file: Path) -> str | None:
    try:
        return file.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None


def _is_worth_learning(path: str, text: str) -> bool:
    """Leaves out empty files, generated character tables, and files that are no valid Python 3."""
    if not text.strip() or (path.startswith("encodings/") and "decoding_table" in text):
        return False
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True
