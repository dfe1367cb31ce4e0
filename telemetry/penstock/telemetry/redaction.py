"""What never reaches a log: prompt or output text, token ids, credentials.

The rule goes by name, so that it holds for every caller: a field whose name is one of `FORBIDDEN`, or ends
in one after an underscore (`prompt_text`, `client_api_key`), is dropped, at any depth of nested mappings.
Its name stays, under `redacted`, so that the mistake is seen.
"""

from collections.abc import Mapping

FORBIDDEN = frozenset(
    {"prompt", "text", "ids", "token_ids", "output", "api_key", "authorization", "key", "keys", "secret"}
)
_SUFFIXES = tuple(f"_{name}" for name in FORBIDDEN)


def is_forbidden(name: str) -> bool:
    """Whether a log field of this name is dropped; letter case and `-` for `_` make no difference."""
    plain = name.lower().replace("-", "_")
    return plain in FORBIDDEN or plain.endswith(_SUFFIXES)


def redact(fields: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """The fields that may be logged, and the dotted names of those that were dropped."""
    kept: dict[str, object] = {}
    dropped: list[str] = []
    for name, value in fields.items():
        if is_forbidden(str(name)):
            dropped.append(str(name))
        elif isinstance(value, Mapping):
            kept[name], below = redact(value)
            dropped += [f"{name}.{inner}" for inner in below]
        else:
            kept[name] = value
    return kept, dropped
