"""A configuration written out: as help, as JSON with origins, as the command line of a child process."""

import json
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path

import msgspec

from penstock.config.fields import Setting, settings_of

_MASK = "********"
_HELP_INDENT = " " * 8


def help_text(settings: Mapping[str, Setting], *, prog: str, description: str, positional: str | None) -> str:
    """What `--help` prints: usage, description, every setting with its variable and default."""
    width = max(40, min(shutil.get_terminal_size().columns, 110))
    own = settings[positional] if positional is not None else None
    parts = [_usage(prog, own), textwrap.fill(description, width)]
    if own is not None:
        parts.append("argument:\n" + _entry(own, own.name.upper(), width))
    listed = [_entry(setting, _spelling(setting), width) for setting in settings.values() if setting != own]
    parts.append("\n".join(["settings (flags win over variables, variables over defaults):", *listed]))
    parts.append(
        "general:\n"
        "  --set KEY=VALUE\n        a setting by its name; may be repeated\n"
        "  --print-config\n        print the resolved configuration with its origins as JSON and exit\n"
        "  --help\n        print this and exit"
    )
    return "\n\n".join(part for part in parts if part)


def _usage(prog: str, positional: Setting | None) -> str:
    if positional is None:
        return f"usage: {prog} [flags]"
    name = positional.name.upper()
    return f"usage: {prog} {name if positional.is_required else f'[{name}]'} [flags]"


def _spelling(setting: Setting) -> str:
    if setting.is_switch:
        return f"{setting.flag}, --no-{setting.flag.removeprefix('--')}"
    return f"{setting.flag} {setting.metavar}"


def _entry(setting: Setting, spelling: str, width: int) -> str:
    notes = [setting.variable, "required" if setting.is_required else f"default {_default(setting)}"]
    text = f"{setting.description} [{', '.join(notes)}]".strip()
    body = textwrap.fill(
        text,
        width,
        initial_indent=_HELP_INDENT,
        subsequent_indent=_HELP_INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return f"  {spelling}\n{body}"


def _default(setting: Setting) -> str:
    if setting.default in (None, ()):
        return "none"
    return _MASK if setting.is_secret else _text(setting.default)


def printed(config: msgspec.Struct, settings: Mapping[str, Setting], origins: Mapping[str, str]) -> str:
    """The resolved configuration as JSON: each value with its origin, secrets masked."""
    shown = {
        name: {"value": _shown(setting, getattr(config, name)), "origin": origins[name]}
        for name, setting in settings.items()
    }
    return json.dumps(shown, indent=2, ensure_ascii=False)


def _shown(setting: Setting, value: object) -> object:
    if setting.is_secret and value not in (None, (), ""):
        return _MASK
    return msgspec.to_builtins(value, enc_hook=str)


def to_argv(config: msgspec.Struct) -> list[str]:
    """The flags that give a child process this configuration, secrets excepted.

    Defaults are spelt out too, since the child's environment would win over them. A command line can be
    read by every user of the machine, so secrets go by `secret_environ`. Raises ValueError for a value that a
    flag cannot express: an empty text where None is allowed, a tuple's element with a comma.
    """
    return [_as_flag(setting, value) for setting, value in _pairs(config) if not setting.is_secret]


def secret_environ(config: msgspec.Struct) -> dict[str, str]:
    """The variables that give a child process the secrets of this configuration ("" where there is none)."""
    return {setting.variable: _spelt(setting, value) for setting, value in _pairs(config) if setting.is_secret}


def _pairs(config: msgspec.Struct) -> list[tuple[Setting, object]]:
    return [(setting, getattr(config, name)) for name, setting in settings_of(type(config)).items()]


def _as_flag(setting: Setting, value: object) -> str:
    if setting.is_switch and value is not None:
        return setting.flag if value else "--no-" + setting.flag.removeprefix("--")
    return f"{setting.flag}={_spelt(setting, value)}"


def _spelt(setting: Setting, value: object) -> str:
    if setting.optional and value == "":
        raise ValueError(f"{setting.name}: an empty text would be read as none")
    return _text(value)


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(_element(part) for part in value)
    return str(value) if isinstance(value, str | int | Path) else repr(value)


def _element(part: object) -> str:
    text = _text(part)
    if "," in text or text != text.strip() or not text:
        raise ValueError(f"{text!r} cannot stand in a comma-separated list")
    return text
