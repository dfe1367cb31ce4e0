"""The jinja2 environment of chat templates: what `transformers` gives them, and bounds that it does not set.

A template comes with the model and is trusted as far as the model's folder is; its data come from anyone. The
bounds keep a careless template, or hostile data fed to it, from holding a thread for ever or filling the
memory: a limit on time that every loop turn, every call and every printed value checks, a limit on printed
characters, and one on the sizes that `range`, `*`, `**`, `+` and `~` may make.
"""

import json
import time
from collections.abc import Callable, Sized
from datetime import datetime
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

BUDGET: Final = " budget"
"""Where a rendering's budget stands among its variables; no template can write a name with a space."""

MAX_INTEGER_BITS: Final = 4096


class RefusedByTemplate(jinja2.TemplateError):
    """Raised by a template's own `raise_exception`."""


class OverBudget(jinja2.TemplateError):
    """A bound was reached."""


class Budget:
    """What one rendering may still use."""

    __slots__ = ("_chars", "_deadline", "max_chars")

    def __init__(self, *, max_seconds: float, max_chars: int) -> None:
        self.max_chars = max_chars
        self._chars = max_chars
        self._deadline = time.monotonic() + max_seconds

    def tick(self) -> None:
        if time.monotonic() > self._deadline:
            raise OverBudget("it ran out of time")

    def print(self, chars: int) -> None:
        self.tick()
        self._chars -= chars
        if self._chars < 0:
            raise OverBudget(f"it printed more than {self.max_chars} characters")


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Compiles chat templates. The variables of a rendering must hold its `Budget` under `BUDGET`."""

    intercepted_binops = frozenset({"*", "**", "+"})

    def __init__(self, *, max_chars: int, now: Callable[[], datetime]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, loopcontrols],
            finalize=_count_printed,
        )
        self.max_chars = max_chars
        self.filters["tojson"] = _to_json
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=lambda format: now().strftime(format),
            namespace=_GuardedNamespace,
        )
        del self.globals["lipsum"]

    def tick(self) -> None:
        """Called at the start of every loop turn; `call` does the checking."""

    def concatenate(self, *values: Any) -> str:
        """The `~` operator."""
        texts = [str(value) for value in values]
        self._check_size(sum(map(len, texts)))
        return "".join(texts)

    def call(self, context: Context, callee: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call that a template makes comes through here."""
        _budget(context).tick()
        return super().call(context, callee, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            _check_integers(operator, left, right)
        elif operator == "+":
            self._check_size(_size(left) + _size(right))
        elif operator == "*":
            self._check_size(_size(left) * _count(right), _size(right) * _count(left))
        return super().call_binop(context, operator, left, right)

    def _check_size(self, *sizes: int) -> None:
        if max(sizes) > self.max_chars:
            raise OverBudget(f"a value would be larger than {self.max_chars}")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _AddBounds().visit(super()._parse(source, name, filename))
        return tree


class GenerationTag(Extension):
    """`{% generation %} … {% endgeneration %}` marks the assistant's words, for training: here, no change."""

    tags = {"generation"}  # noqa: RUF012 - an instance variable in jinja2's eyes

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _AddBounds(NodeTransformer):
    """Puts `tick()` into every loop and replaces `~`, which the sandbox cannot intercept."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 - jinja2 dispatches by name
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("tick", [])).set_lineno(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("concatenate", node.nodes).set_lineno(node.lineno)


def _call(method: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)


class _GuardedNamespace(Namespace):
    """`namespace()` whose attributes cannot begin with `_`: Python's own names stay out of reach."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *values = args  # so that a template may name an attribute `self`
        attributes = dict(*values, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have an attribute {name!r}")


def _budget(context: Context) -> Budget:
    budget: Budget = context.parent[BUDGET]
    return budget


@pass_context
def _count_printed(context: Context, value: Any) -> Any:
    _budget(context).print(_size(value))
    return value


def _check_integers(operator: str, left: int, right: int) -> None:
    bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
    if bits > MAX_INTEGER_BITS:
        raise OverBudget("an integer would be too large")


def _size(value: object) -> int:
    return len(value) if isinstance(value, Sized) else 0


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def _raise_exception(message: object) -> None:
    raise RefusedByTemplate(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own filter it escapes no HTML, and it has the options of `transformers`' one."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
