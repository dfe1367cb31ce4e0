"""The command line: which text was given for which setting, by which flag."""

import difflib
from collections.abc import Mapping, Sequence

import msgspec

from penstock.config.errors import ConfigError
from penstock.config.fields import Setting


class Given(msgspec.Struct, frozen=True):
    """What one source says of one setting."""

    source: str
    """The flag or variable, as the user wrote it."""
    texts: list[str]


class Arguments(msgspec.Struct, frozen=True):
    """A parsed command line."""

    given: dict[str, list[Given]]
    help: bool
    print_config: bool


def parse(argv: Sequence[str], settings: Mapping[str, Setting], positional: str | None) -> Arguments:
    """Read `--flag value`, `--flag=value`, `--flag`, `--no-flag`, `--set key=value` and the positional.

    Nothing is abbreviated. `--` ends the flags. Raises ConfigError for what it does not know.
    """
    reader = _Reader(argv, settings, positional)
    reader.run()
    return Arguments(reader.given, reader.help, reader.print_config)


class _Reader:
    def __init__(self, argv: Sequence[str], settings: Mapping[str, Setting], positional: str | None) -> None:
        self.given: dict[str, list[Given]] = {}
        self.help = False
        self.print_config = False
        self._rest = list(reversed(argv))
        self._settings = settings
        self._flags = {setting.flag: setting for setting in settings.values()}
        self._positional = settings[positional] if positional is not None else None

    def run(self) -> None:
        flags_over = False
        while self._rest:
            word = self._rest.pop()
            if word == "--" and not flags_over:
                flags_over = True
            elif word.startswith("-") and word != "-" and not flags_over:
                self._flag(word)
            else:
                self._free(word)

    def _flag(self, word: str) -> None:
        name, equals, attached = word.partition("=")
        value = attached if equals else None
        if word in ("--help", "-h"):
            self.help = True
        elif word == "--print-config":
            self.print_config = True
        elif name == "--set":
            self._set(self._value(name, value))
        elif (setting := self._flags.get(name)) is not None:
            bare = setting.is_switch and value is None
            self._note(setting, name, "true" if bare else self._value(name, value))
        elif (setting := self._negated(name)) is not None and value is None:
            self._note(setting, name, "false")
        else:
            raise ConfigError(f"unknown flag {name}{self._hint(name, self._flags)}")

    def _negated(self, name: str) -> Setting | None:
        setting = self._flags.get("--" + name.removeprefix("--no-")) if name.startswith("--no-") else None
        return setting if setting is not None and setting.is_switch else None

    def _set(self, pair: str) -> None:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair}: expected key=value")
        name = key.strip().replace("-", "_")
        if name not in self._settings:
            raise ConfigError(f"--set {key}: unknown key{self._hint(name, self._settings)}")
        self._note(self._settings[name], f"--set {name}", value)

    def _free(self, word: str) -> None:
        if self._positional is None:
            raise ConfigError(f"unexpected argument {word!r}")
        self._note(self._positional, self._positional.name.upper(), word)

    def _value(self, name: str, attached: str | None) -> str:
        if attached is not None:
            return attached
        if not self._rest or self._rest[-1].startswith("--"):
            raise ConfigError(f"{name}: needs a value")
        return self._rest.pop()

    def _note(self, setting: Setting, source: str, text: str) -> None:
        givens = self.given.setdefault(setting.name, [])
        same = next((given for given in givens if given.source == source), None)
        if same is None:
            givens.append(Given(source, [text]))
        else:
            same.texts.append(text)

    @staticmethod
    def _hint(name: str, known: Mapping[str, Setting]) -> str:
        close = difflib.get_close_matches(name, known, n=1)
        return f" (did you mean {close[0]}?)" if close else ""
