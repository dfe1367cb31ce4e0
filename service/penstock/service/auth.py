"""Who calls: a hook, and API keys as one way to fill it."""

import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, Protocol

from penstock.rpc.errors import unauthenticated

Metadata = Iterable[tuple[str, str | bytes]]

DEFAULT_TENANT: Final = "default"
MAX_KEY_CHARS: Final = 512
MAX_TENANT_CHARS: Final = 128


@dataclass(frozen=True, slots=True)
class Identity:
    """On whose behalf a request is served."""

    tenant: str
    priority_ceiling: int = 0
    """The highest priority that its requests get."""


class Authenticator(Protocol):
    """The hook: who is behind a call's metadata."""

    def authenticate(self, metadata: Metadata) -> Identity:
        """Raises UNAUTHENTICATED."""
        ...


class OpenAccess:
    """Everybody is the same tenant; for loopback."""

    def authenticate(self, metadata: Metadata) -> Identity:
        """See `Authenticator`."""
        return Identity(DEFAULT_TENANT)


class ApiKeys:
    """Keys in `authorization: Bearer …` or `x-api-key`.

    Only their digests are kept, keyed with a secret of this process: a dump of it gives no key away, and the
    comparison takes the same time for every wrong one. Raises `ValueError` for an empty key or one that is
    given twice.
    """

    __slots__ = ("_entries", "_secret")

    def __init__(self, entries: Iterable[str]) -> None:
        """`entries` are `KEY` or `TENANT:KEY`."""
        self._secret = secrets.token_bytes(32)
        self._entries: list[tuple[bytes, Identity]] = []
        for entry in entries:
            tenant, colon, key = entry.rpartition(":")
            self._add(key, Identity(tenant if colon else DEFAULT_TENANT))

    def authenticate(self, metadata: Metadata) -> Identity:
        """See `Authenticator`."""
        digest = self._digest(_presented(metadata))
        found: Identity | None = None
        for known, identity in self._entries:
            if hmac.compare_digest(known, digest):
                found = identity
        if found is None:
            raise unauthenticated("the API key is not known")
        return found

    def _add(self, key: str, identity: Identity) -> None:
        digest = self._digest(key)
        if not 0 < len(key) <= MAX_KEY_CHARS or not 0 < len(identity.tenant) <= MAX_TENANT_CHARS:
            raise ValueError("api_keys: an entry is KEY or TENANT:KEY; one of them is empty or too long")
        if any(known == digest for known, _ in self._entries):
            raise ValueError("api_keys: a key is given twice")
        self._entries.append((digest, identity))

    def _digest(self, key: str) -> bytes:
        return blake2b(key.encode(), key=self._secret, digest_size=32).digest()


def _presented(metadata: Metadata) -> str:
    """The one key of a call. Raises UNAUTHENTICATED if there is none, or several that differ."""
    keys = set()
    for name, value in metadata:
        if isinstance(value, bytes):
            continue
        if name == "x-api-key":
            keys.add(value)
        elif name == "authorization" and value[:7].lower() == "bearer ":
            keys.add(value[7:].strip())
    if len(keys) != 1 or len(key := keys.pop()) > MAX_KEY_CHARS:
        raise unauthenticated("an API key is needed: authorization: Bearer KEY, or x-api-key: KEY")
    return key
