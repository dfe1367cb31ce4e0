"""Chat examples cut out of the corpus: a request worded from a docstring or a name, answered by the source."""

import ast
import random
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from embedded_model.corpus import Document

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a Python programmer.",
    "Answer with Python code.",
    "You write short, clear Python.",
)
MIN_LINES, MAX_LINES = 2, 60
MAX_REQUEST_CHARS = 300
# Test code outweighs the library and reads alike: a part of it is enough.
KEPT_OF_TESTS = 0.1
KEPT_WITHOUT_DOCSTRING = 0.6
WITH_SYSTEM_PROMPT = 0.1
WITH_SECOND_TURN = 0.15


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a user might ask, and the source that answers it."""

    request: str
    answer: str


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One conversation: at most one system prompt, then whole exchanges."""

    system: str | None
    exchanges: tuple[Exchange, ...]


def dialogues(documents: Sequence[Document], seed: int) -> list[Dialogue]:
    """Dialogues from all functions and classes of suitable length, shuffled.

    Each document draws from its own generator, so that one file's change leaves the others as they were.
    """
    found = [dialogue for document in documents for dialogue in _of_document(document, seed)]
    random.Random(seed).shuffle(found)
    return found


def snippets(documents: Sequence[Document], seed: int) -> list[str]:
    """The library's documented functions and classes, each as a text of its own, shuffled."""
    found = []
    for document in documents:
        if document.is_test:
            continue
        lines = document.text.split("\n")
        for node, _kind_of in _definitions(ast.parse(document.text)):
            if _summary(node) is not None:
                found.append(_source(node, lines))
    random.Random(seed).shuffle(found)
    return found


def _of_document(document: Document, seed: int) -> Iterator[Dialogue]:
    chance = random.Random(f"{seed}:{document.path}")
    exchanges = list(_exchanges(document, chance))
    while exchanges:
        turns = 2 if chance.random() < WITH_SECOND_TURN else 1
        system = chance.choice(SYSTEM_PROMPTS) if chance.random() < WITH_SYSTEM_PROMPT else None
        yield Dialogue(system, tuple(exchanges[:turns]))
        del exchanges[:turns]


def _exchanges(document: Document, chance: random.Random) -> Iterator[Exchange]:
    lines = document.text.split("\n")
    for node, kind in _definitions(ast.parse(document.text)):
        summary = _summary(node)
        if chance.random() > _kept(document, summary):
            continue
        request = chance.choice(_wordings(kind, node.name, summary))
        if len(request) <= MAX_REQUEST_CHARS:
            yield Exchange(request, _source(node, lines))


def _definitions(parent: ast.AST) -> Iterator[tuple[Definition, str]]:
    """Definitions of suitable length below `parent`, each with its kind: function, method or class."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, Definition) and MIN_LINES <= _line_count(node) <= MAX_LINES:
            yield node, _kind(node, parent)
        yield from _definitions(node)


def _kind(node: Definition, parent: ast.AST) -> str:
    if isinstance(node, ast.ClassDef):
        return "class"
    if node.name.startswith("test"):
        return "test"
    return "method" if isinstance(parent, ast.ClassDef) else "function"


def _kept(document: Document, summary: str | None) -> float:
    """The share of such definitions that become examples."""
    if document.is_test:
        return KEPT_OF_TESTS
    return KEPT_WITHOUT_DOCSTRING if summary is None else 1.0


def _first_line(node: Definition) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _line_count(node: Definition) -> int:
    return (node.end_lineno or node.lineno) - _first_line(node) + 1


def _source(node: Definition, lines: Sequence[str]) -> str:
    return textwrap.dedent("\n".join(lines[_first_line(node) - 1 : node.end_lineno])).strip("\n")


def _summary(node: Definition) -> str | None:
    """The docstring's first paragraph on one line, or None."""
    docstring = ast.get_docstring(node)
    if not docstring or not docstring.strip():
        return None
    return " ".join(docstring.strip().split("\n\n")[0].split())


def _words(name: str) -> str:
    return name.strip("_").replace("_", " ").lower() or name


def _wordings(kind: str, name: str, summary: str | None) -> list[str]:
    words = _words(name)
    if kind == "test":
        subject = _words(name.removeprefix("test"))
        return [f"Write a test for {subject}.", f"Write a Python test: {subject}.", f"Test {subject}."]
    if summary is not None:
        return _wordings_of_summary(kind, name, summary)
    if kind == "class":
        return [f"Write a class named {name}.", f"Write a class {name}.", f"Write a class for a {words}."]
    return [
        f"Write a {kind} named {name}.",
        f"Write a Python {kind} to {words}.",
        f"Write a {kind} that {_third_person(words)}.",
        f"How do I {words} in Python?",
    ]


def _wordings_of_summary(kind: str, name: str, summary: str) -> list[str]:
    wish = summary.rstrip(".")
    wish = wish[0].lower() + wish[1:]
    wordings = [summary, f"Write a {kind} named {name}. {summary}", f"Write a Python {kind}: {summary}"]
    if kind == "class":
        return [*wordings, f"Write the class {name}: {summary}", f"Write a class for a {_words(name)}."]
    return [
        *wordings,
        f"Write a {kind} to {wish}.",
        f"Write a {kind} that {_third_person(wish)}.",
        f"How do I {wish} in Python?",
    ]


def _third_person(wish: str) -> str:
    """`reverse the list` as `reverses the list`; a first word that already ends in s stays."""
    verb, space, rest = wish.partition(" ")
    if verb.endswith(("ch", "sh", "x", "z")):
        verb += "es"
    elif not verb.endswith("s") and verb.isalpha():
        verb += "s"
    return verb + space + rest
