"""What an engine in this process raises, beside ValueError for a request that it cannot take."""

from penstock.executor.executor import ExecutorError

__all__ = ["EngineClosed", "ExecutorError"]


class EngineClosed(ExecutorError):
    """The engine was closed, and with it whatever it still ran."""
