"""gRPC server reflection: tools learn what a process serves, without the proto file.

Served as v1 and v1alpha, which are the same: grpcio has only v1alpha, and tools are dropping it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf import descriptor_pool, text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection, reflection_pb2

from overlay.calls.reception import Reception, on_threads_of

V1ALPHA = reflection.SERVICE_NAME
V1 = V1ALPHA.replace("v1alpha", "v1")


def serve(reception: Reception, threads: ThreadPoolExecutor, services: Sequence[str]) -> None:
    """Adds reflection of itself and of `services`, given by their full names."""
    names = (*services, V1ALPHA, V1)
    servicer = reflection.ReflectionServicer(names, _pool_of(services))
    method = grpc.stream_stream_rpc_method_handler(
        on_threads_of(threads, servicer.ServerReflectionInfo),
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for name in (V1ALPHA, V1):
        reception.add_registered_method_handlers(name, {"ServerReflectionInfo": method})


def _pool_of(services: Sequence[str]) -> descriptor_pool.DescriptorPool:
    """A pool of its own, as another library may add v1 to the default pool one day."""
    pool = descriptor_pool.DescriptorPool()
    for name in (*services, V1ALPHA):
        _add(pool, descriptor_pool.Default().FindFileContainingSymbol(name))
    v1alpha = FileDescriptorProto.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)
    text = text_format.MessageToString(v1alpha).replace("v1alpha", "v1")
    v1 = text_format.Parse(text, FileDescriptorProto())
    pool.AddSerializedFile(v1.SerializeToString())
    return pool


def _add(pool: descriptor_pool.DescriptorPool, file: Any) -> None:
    for needed in file.dependencies:
        _add(pool, needed)
    pool.AddSerializedFile(file.serialized_pb)
