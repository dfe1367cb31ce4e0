"""Which role a `--set key=value` is for: asked from the roles themselves, which are never imported here."""

import difflib
import json
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from penstock.config import ConfigError
from penstock.local.roles import role_command

Printed = Mapping[str, Mapping[str, object]]
"""What a role's `--print-config` shows: each setting with its value and where that comes from."""

_PRINT_TIMEOUT_S = 60.0
_OWNED = frozenset({"grpc_address", "schedulers", "otlp_endpoint", "ready_fd", "parent_pid", "print_config", "help"})
"""What the supervisor itself decides."""

_SECRETS = frozenset({"api_keys"})


def split(argv: Sequence[str], own: frozenset[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Take the `--set key=value` whose keys are not among `own` out of a command line.

    Returns what is left, and the pairs. What is malformed stays, for the parser of what is left to refuse.
    """
    left: list[str] = []
    pairs: list[tuple[str, str]] = []
    words = iter(argv)
    for word in words:
        if word == "--":
            return [*left, word, *words], pairs
        text = next(words, None) if word == "--set" else _attached(word)
        key, equals, value = (text or "").partition("=")
        name = key.strip().replace("-", "_")
        if equals and name and name not in own:
            pairs.append((name, value))
        else:
            left += [word] if text is None or word != "--set" else [word, text]
    return left, pairs


def _attached(word: str) -> str | None:
    return word.removeprefix("--set=") if word.startswith("--set=") else None


def printed(commands: Mapping[str, Sequence[str]]) -> dict[str, Printed]:
    """What `--print-config` of each role says, by role; `commands` gives module and arguments.

    Raises ConfigError with the first complaint of a role.
    """
    with ThreadPoolExecutor(max_workers=max(1, len(commands))) as pool:
        return dict(zip(commands, pool.map(_printed, commands, commands.values()), strict=True))


def _printed(role: str, command: Sequence[str]) -> Printed:
    module, *argv = command
    done = subprocess.run(
        role_command(module, [*argv, "--print-config"]),
        capture_output=True,
        text=True,
        timeout=_PRINT_TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise ConfigError(said[-1].removeprefix("error: ") if said else f"the {role} does not start")
    answer: dict[str, dict[str, object]] = json.loads(done.stdout)
    return answer


def assign(pairs: Sequence[tuple[str, str]], known: Mapping[str, Printed]) -> dict[str, list[str]]:
    """The arguments that the pairs add to each role; a key that several roles know goes to all of them.

    Raises ConfigError for a key that no role knows, or that the supervisor decides.
    """
    arguments: dict[str, list[str]] = {role: [] for role in known}
    for key, value in pairs:
        if key in _OWNED:
            raise ConfigError(f"--set {key}: is decided by serve itself")
        if key in _SECRETS:
            raise ConfigError(f"--set {key}: give it as PENSTOCK_{key.upper()}, as all users can read a command line")
        roles = [role for role, settings in known.items() if key in settings]
        if not roles:
            raise ConfigError(f"--set {key}: no role knows this key{_hint(key, known)}")
        for role in roles:
            arguments[role] += ["--set", f"{key}={value}"]
    return arguments


def _hint(key: str, known: Mapping[str, Printed]) -> str:
    names = {name for settings in known.values() for name in settings} - _OWNED
    close = difflib.get_close_matches(key, names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
