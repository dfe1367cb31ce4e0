"""What the fixtures of these tests are."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

Serve = Callable[..., AbstractAsyncContextManager[str]]
"""``serve(implementations by service, **server options)`` → the address, while the context lasts."""
Unexpected = list[tuple[str, BaseException]]
"""(method, exception) as servers reported them to their error hook."""
