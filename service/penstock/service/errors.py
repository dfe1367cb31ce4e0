"""The failures that the service itself tells of, each with its reason."""

from typing import Final

from penstock.rpc import errors
from penstock.rpc.errors import RpcError
from penstock.service.violations import Violations
from penstock.v1 import ErrorReason

RETRY_SECONDS: Final = 1.0
SOON_SECONDS: Final = 0.2


def invalid(violations: Violations) -> RpcError:
    """INVALID_ARGUMENT with every bad field."""
    return errors.invalid(violations.listed())


def no_scheduler() -> RpcError:
    """UNAVAILABLE: no scheduler serves the model now."""
    return errors.unavailable(ErrorReason.NO_SCHEDULER, "no scheduler serves the model at the moment", RETRY_SECONDS)


def scheduler_lost() -> RpcError:
    """UNAVAILABLE: the scheduler went away with the attempt."""
    return errors.unavailable(
        ErrorReason.SCHEDULER_LOST, "the scheduler was lost while it served the request", RETRY_SECONDS
    )


def draining() -> RpcError:
    """UNAVAILABLE: this process is shutting down."""
    return errors.unavailable(ErrorReason.DRAINING, "the service is shutting down", RETRY_SECONDS)


def queue_full() -> RpcError:
    """RESOURCE_EXHAUSTED: every scheduler's queue is full."""
    return errors.exhausted(ErrorReason.QUEUE_FULL, "the waiting queue is full", SOON_SECONDS)


def service_busy() -> RpcError:
    """RESOURCE_EXHAUSTED: this process serves as many requests as it may."""
    return errors.exhausted(ErrorReason.SERVICE_BUSY, "the service is busy", SOON_SECONDS)


def model_not_found() -> RpcError:
    """NOT_FOUND."""
    return errors.not_found(ErrorReason.MODEL_NOT_FOUND, "no such model")


def adapter_not_found() -> RpcError:
    """NOT_FOUND."""
    return errors.not_found(ErrorReason.ADAPTER_NOT_FOUND, "no such adapter")
