"""What a configuration struct says of itself: its settings, their flags, variables, types and defaults."""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

ENVIRONMENT_PREFIX = "PENSTOCK_"
_SECRET_ENDINGS = ("key", "keys", "secret")
_RESERVED = frozenset({"help", "set", "print_config"})
_METAVARS: dict[object, str] = {str: "TEXT", int: "INT", float: "NUMBER", Path: "PATH"}


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One field of a configuration struct."""

    name: str
    annotation: Any
    """The declared type with its constraints."""
    item: Any
    """The type of one value, constraints included, without `| None` and outside `tuple[…, ...]`."""
    plain: object
    """`item` without its constraints."""
    repeated: bool
    optional: bool
    """Whether None is a value of it."""
    description: str
    default: object
    """`msgspec.NODEFAULT` if it must be given."""

    @property
    def flag(self) -> str:
        """`--field-name`."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """`PENSTOCK_FIELD_NAME`."""
        return ENVIRONMENT_PREFIX + self.name.upper()

    @property
    def is_switch(self) -> bool:
        """Whether the flag needs no value: `--flag`, `--no-flag`."""
        return self.plain is bool and not self.repeated

    @property
    def is_required(self) -> bool:
        """Whether there is no default."""
        return self.default is msgspec.NODEFAULT

    @property
    def is_secret(self) -> bool:
        """Whether the value is never shown. The path of a key file is no secret."""
        return self.name.endswith(_SECRET_ENDINGS) and self.plain is not Path

    @property
    def metavar(self) -> str:
        """How the help shows the value."""
        if get_origin(self.plain) is Literal:
            shown = "{" + ",".join(str(choice) for choice in get_args(self.plain)) + "}"
        else:
            shown = _METAVARS.get(self.plain, "VALUE")
        return f"{shown}[,…]" if self.repeated else shown


def settings_of(kind: type[msgspec.Struct]) -> dict[str, Setting]:
    """The settings of a configuration struct by field name, in order of declaration.

    Raises TypeError for a struct that cannot be a configuration: not frozen, a reserved name, a type that
    has no form on a command line.
    """
    if not kind.__struct_config__.frozen:
        raise TypeError(f"{kind.__name__} must be frozen")
    hints = get_type_hints(kind, include_extras=True)
    found = {field.name: _setting(kind, field, hints[field.name]) for field in msgspec.structs.fields(kind)}
    for name in found:
        if name in _RESERVED or (name.startswith("no_") and name.removeprefix("no_") in found):
            raise TypeError(f"{kind.__name__}.{name} collides with another flag")
    return found


def _setting(kind: type[msgspec.Struct], field: msgspec.structs.FieldInfo, annotation: object) -> Setting:
    description = _description(annotation)
    item, optional = _without_none(annotation)
    repeated = get_origin(_plain(item)) is tuple
    if repeated and optional:
        raise TypeError(f"{kind.__name__}.{field.name}: let an empty tuple mean none")
    if repeated:
        item = _element(kind, field.name, _plain(item))
    plain = _plain(item)
    if plain not in (str, int, float, bool, Path) and get_origin(plain) is not Literal:
        raise TypeError(f"{kind.__name__}.{field.name}: {plain!r} has no form on a command line")
    return Setting(
        name=field.name,
        annotation=annotation,
        item=item,
        plain=plain,
        repeated=repeated,
        optional=optional,
        description=description,
        default=_default(field.default, field.default_factory),
    )


def _default(value: object, factory: Callable[[], object] | object) -> object:
    return factory() if callable(factory) else value


def _plain(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _description(annotation: Any) -> str:
    """The first description found, from outside inwards."""
    if get_origin(annotation) is not Annotated:
        return next((text for part in get_args(annotation) if (text := _description(part))), "")
    for meta in get_args(annotation)[1:]:
        if isinstance(meta, msgspec.Meta) and meta.description:
            return " ".join(meta.description.split())
    return _description(_plain(annotation))


def _without_none(annotation: Any) -> tuple[Any, bool]:
    """The type without `| None`, its constraints kept, and whether None was there."""
    plain = _plain(annotation)
    if get_origin(plain) not in (Union, types.UnionType):
        return annotation, False
    others = [part for part in get_args(plain) if part is not type(None)]
    if len(others) != 1 or len(others) == len(get_args(plain)):
        raise TypeError(f"{plain!r}: a union must be of one type and None")
    return others[0], True


def _element(kind: type[msgspec.Struct], name: str, annotation: object) -> Any:
    arguments = get_args(annotation)
    if len(arguments) != 2 or arguments[1] is not Ellipsis:
        raise TypeError(f"{kind.__name__}.{name}: a tuple must be of the form tuple[T, ...]")
    return arguments[0]
