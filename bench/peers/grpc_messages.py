"""The messages of grpc.aio's side: real protobuf messages, made without generated code."""

from importlib import import_module
from typing import Any

# By name: peers are not installed where types are checked.
_pb2: Any = import_module("google.protobuf.descriptor_pb2")
_pool: Any = import_module("google.protobuf.descriptor_pool")
_factory: Any = import_module("google.protobuf.message_factory")

SERVICE = "bench.Helloworld"
METHOD = "Call"


def _messages() -> tuple[Any, Any]:
    file = _pb2.FileDescriptorProto(name="bench.proto", package="bench", syntax="proto3")
    for name, field in (("Request", "name"), ("Response", "message")):
        kind = _pb2.FieldDescriptorProto
        file.message_type.add(name=name).field.add(
            name=field, number=1, type=kind.TYPE_STRING, label=kind.LABEL_OPTIONAL
        )
    pool = _pool.DescriptorPool()
    pool.Add(file)
    request, response = map(pool.FindMessageTypeByName, ("bench.Request", "bench.Response"))
    return _factory.GetMessageClass(request), _factory.GetMessageClass(response)


Request, Response = _messages()
