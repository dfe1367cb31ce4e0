"""Resolve a role's configuration: flags over environment over defaults."""

import sys
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

import msgspec

from penstock.config.arguments import Arguments, Given, parse
from penstock.config.convert import Unfit, to_value
from penstock.config.errors import ConfigError
from penstock.config.fields import Setting, settings_of
from penstock.config.render import help_text, printed

T = TypeVar("T", bound=msgspec.Struct)
Origin = Literal["default", "environment", "flag"]


def load(
    kind: type[T],
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    prog: str,
    description: str,
    positional: str | None = None,
) -> T:
    """The configuration of one role from its command line (without the program's name) and environment.

    Each field of `kind`, a frozen struct, is `--field-name`, `--set field_name=value` and
    `PENSTOCK_FIELD_NAME`; the field named by `positional` may also stand alone. Flags win over variables,
    variables over defaults; an empty variable counts as unset, an unknown one is ignored, since roles share
    one environment. `--help` and `--print-config` print to stdout and raise SystemExit(0).

    Raises ConfigError for what is unknown, contradictory, missing, of the wrong type or out of range, and for
    a ValueError of the struct's own `__post_init__`.
    """
    settings = settings_of(kind)
    arguments = parse(argv, settings, positional)
    if arguments.help:
        _print_and_exit(help_text(settings, prog=prog, description=description, positional=positional))
    resolved = {name: _resolve(setting, arguments, environ) for name, setting in settings.items()}
    config = _build(kind, {name: value for name, (value, _) in resolved.items()})
    if arguments.print_config:
        origins: dict[str, str] = {name: origin for name, (_, origin) in resolved.items()}
        _print_and_exit(printed(config, settings, origins))
    return config


def _resolve(setting: Setting, arguments: Arguments, environ: Mapping[str, str]) -> tuple[object, Origin]:
    if givens := arguments.given.get(setting.name):
        return _agreed(setting, givens), "flag"
    if text := environ.get(setting.variable):
        return _convert(setting, Given(setting.variable, [text])), "environment"
    if setting.is_required:
        raise ConfigError(f"{setting.flag} is required (or {setting.variable})")
    return setting.default, "default"


def _agreed(setting: Setting, givens: Sequence[Given]) -> object:
    """The value that a flag, `--set` and the positional agree on; two different values are an error."""
    values = [(_convert(setting, given), given.source) for given in _each(setting, givens)]
    value, source = values[0]
    for other, other_source in values[1:]:
        if other != value:
            how = f"{source} is given twice" if other_source == source else f"{source} and {other_source}"
            raise ConfigError(f"{how}: the values contradict each other")
    return value


def _each(setting: Setting, givens: Sequence[Given]) -> Sequence[Given]:
    """One entry for each value: the texts of a repeated setting make one value together."""
    if setting.repeated:
        return givens
    return [Given(given.source, [text]) for given in givens for text in given.texts]


def _convert(setting: Setting, given: Given) -> object:
    try:
        return to_value(setting, given.texts)
    except Unfit as error:
        raise ConfigError(f"{given.source}: {error}") from None


def _build(kind: type[T], values: Mapping[str, object]) -> T:
    try:
        return kind(**values)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _print_and_exit(text: str) -> None:
    print(text)
    sys.exit(0)
