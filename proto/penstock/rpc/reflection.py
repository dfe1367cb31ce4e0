"""Server reflection, so that generic clients can list and call what a server serves.

Both names are answered: ``grpc.reflection.v1`` and the older ``v1alpha``. Their messages are the same on the wire;
grpcio brings the older ones only, and its servicer does the work for both.
"""

from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import aio as reflection_aio

from penstock.rpc.handlers import service_descriptor
from penstock.rpc.health import SERVICE as HEALTH_SERVICE
from penstock.rpc.server import Server

V1ALPHA = "grpc.reflection.v1alpha.ServerReflection"
V1 = "grpc.reflection.v1.ServerReflection"


def enable(server: Server) -> None:
    """Describe every service that was added to the server before, and reflection itself."""
    ours = [name for name in server.services if name != HEALTH_SERVICE]
    pool = _pool([service_descriptor(name).file for name in ours])
    servicer = reflection_aio.ReflectionServicer([*server.services, V1ALPHA, V1], pool=pool)
    for service in (V1ALPHA, V1):
        server.add_handler(service, _handler(service, servicer))


def _pool(files: list[FileDescriptor]) -> DescriptorPool:
    """A pool of its own: the generated one is private and is not to be added to."""
    pool = DescriptorPool()
    added: set[str] = set()
    for file in (*files, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
        _add(pool, file, added)
    pool.AddSerializedFile(_reflection_v1())
    return pool


def _add(pool: DescriptorPool, file: FileDescriptor, added: set[str]) -> None:
    """Add a file after what it imports."""
    if file.name in added:
        return
    added.add(file.name)
    for dependency in file.dependencies:
        _add(pool, dependency, added)
    pool.AddSerializedFile(file.serialized_pb)


def _reflection_v1() -> bytes:
    """The file of v1: that of v1alpha under its later name."""
    old, new = "grpc.reflection.v1alpha", "grpc.reflection.v1"
    file = FileDescriptorProto.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)
    file.name = "grpc/reflection/v1/reflection.proto"
    file.package = new
    for message in file.message_type:
        for field in (field for field in message.field if field.type_name):
            field.type_name = field.type_name.replace(old, new)
    for method in file.service[0].method:
        method.input_type = method.input_type.replace(old, new)
        method.output_type = method.output_type.replace(old, new)
    return file.SerializeToString()


def _handler(service: str, servicer: Any) -> grpc.GenericRpcHandler:
    return grpc.method_handlers_generic_handler(
        service,
        {
            "ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(
                servicer.ServerReflectionInfo,
                reflection_pb2.ServerReflectionRequest.FromString,
                reflection_pb2.ServerReflectionResponse.SerializeToString,
            )
        },
    )
