"""AdapterService: there are no adapters yet, and none can be loaded."""

from typing import Final

from penstock.rpc.errors import unsupported_method
from penstock.service.front import CallContext, Front
from penstock.v1 import (
    ListAdaptersRequest,
    ListAdaptersResponse,
    LoadAdapterRequest,
    LoadAdapterResponse,
    UnloadAdapterRequest,
    UnloadAdapterResponse,
)

SERVICE: Final = "penstock.v1.AdapterService"


class Adapters:
    """Answers for every model."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def list_adapters(self, request: ListAdaptersRequest, context: CallContext) -> ListAdaptersResponse:
        """None."""
        with self._front.call(f"{SERVICE}/ListAdapters", context):
            return ListAdaptersResponse()

    async def load_adapter(self, request: LoadAdapterRequest, context: CallContext) -> LoadAdapterResponse:
        """Raises UNIMPLEMENTED."""
        with self._front.call(f"{SERVICE}/LoadAdapter", context):
            raise unsupported_method(f"{SERVICE}/LoadAdapter")

    async def unload_adapter(self, request: UnloadAdapterRequest, context: CallContext) -> UnloadAdapterResponse:
        """Raises UNIMPLEMENTED."""
        with self._front.call(f"{SERVICE}/UnloadAdapter", context):
            raise unsupported_method(f"{SERVICE}/UnloadAdapter")
