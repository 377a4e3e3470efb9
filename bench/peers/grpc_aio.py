"""grpc.aio, stock; ``uvloop``: on uvloop instead of asyncio's loop, on both sides."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from importlib import import_module
from typing import Any

from bench.load import (
    BLOB_SIZE,
    DEADLINE,
    LINES,
    NAME,
    Job,
    Point,
    idle,
    is_greeting,
    is_order,
    late,
    load,
    stream,
)
from bench.peer import main, run

# By name: peers are not installed where types are checked.
grpc: Any = import_module("grpc")
_pb2: Any = import_module("google.protobuf.descriptor_pb2")
_pool: Any = import_module("google.protobuf.descriptor_pool")
_factory: Any = import_module("google.protobuf.message_factory")

SERVICE = "bench.Helloworld"
#: Room for the largest body, on both sides.
LARGE = [
    (f"grpc.max_{direction}_message_length", BLOB_SIZE + 65536) for direction in ("send", "receive")
]
#: Ours has a deadline on every call, of as many seconds.
TIMEOUT = 5.0
#: Real protobuf messages, made at run time instead of generated.
MESSAGES = {
    "Request": {"name": "STRING"},
    "Many": {"name": "STRING", "count": "INT64"},
    "Response": {"message": "STRING"},
    "Line": {"item": "INT64", "sku": "STRING", "price": "DOUBLE", "tags": "repeated STRING"},
    "Order": {"lines": "repeated Line"},
}


def _messages() -> list[Any]:
    file = _pb2.FileDescriptorProto(name="bench.proto", package="bench", syntax="proto3")
    kind = _pb2.FieldDescriptorProto
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, described) in enumerate(fields.items(), 1):
            label, _, of = described.rpartition(" ")
            made = message.field.add(name=field, number=number)
            made.label = kind.LABEL_REPEATED if label else kind.LABEL_OPTIONAL
            if of in MESSAGES:
                made.type, made.type_name = kind.TYPE_MESSAGE, f".bench.{of}"
            else:
                made.type = getattr(kind, f"TYPE_{of}")
    pool = _pool.DescriptorPool()
    pool.Add(file)
    found = [pool.FindMessageTypeByName(f"bench.{name}") for name in MESSAGES]
    return [_factory.GetMessageClass(message) for message in found]


Request, Many, Response, Line, Order = _messages()


class Helloworld:
    """The handlers. Messages without a class are bytes."""

    async def call(self, request: Any, _context: Any) -> Any:
        return Response(message=f"Hello {request.name}")

    async def order(self, request: Any, _context: Any) -> Any:
        return request

    async def blob(self, request: bytes, _context: Any) -> bytes:
        return request

    async def watch(self, request: Any, _context: Any) -> AsyncIterator[Any]:
        for _ in range(request.count):
            yield Response(message=f"Hello {request.name}")

    async def chat(self, said: AsyncIterator[Any], _context: Any) -> AsyncIterator[Any]:
        async for request in said:
            yield Response(message=f"Hello {request.name}")


#: How a method is called, and with which messages.
METHODS = {
    "call": ("unary_unary", Request, Response),
    "order": ("unary_unary", Order, Order),
    "blob": ("unary_unary", None, None),
    "watch": ("unary_stream", Many, Response),
    "chat": ("stream_stream", Request, Response),
}


async def listen(port: int) -> None:
    handlers = {
        name: getattr(grpc, f"{kind}_rpc_method_handler")(
            getattr(Helloworld(), name),
            request_deserializer=request and request.FromString,
            response_serializer=response and response.SerializeToString,
        )
        for name, (kind, request, response) in METHODS.items()
    }
    server = grpc.aio.server(options=LARGE)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


def serve(port: int, options: list[str]) -> None:
    run(listen(port), uvloop="uvloop" in options)


def method(channel: Any, name: str) -> Any:
    kind, request, response = METHODS[name]
    return getattr(channel, kind)(
        f"/{SERVICE}/{name}",
        request_serializer=request and request.SerializeToString,
        response_deserializer=response and response.FromString,
    )


async def call(job: Job) -> Point:
    async with AsyncExitStack() as stack:
        # A pool of its own, so that no two channels share a connection.
        alone = [*LARGE, ("grpc.use_local_subchannel_pool", 1)]

        async def open_channel() -> Any:
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{job.port}", options=alone)
            return await stack.enter_async_context(channel)

        if job.kind == "idle":

            async def connect() -> None:
                once = method(await open_channel(), "call")
                assert is_greeting(await once(Request(name=NAME), timeout=TIMEOUT))

            return await idle(job, connect)
        kind = "call" if job.kind == "late" else job.kind
        return await measure(job, method(await open_channel(), kind))


async def measure(job: Job, send: Any) -> Point:
    if job.kind == "late":
        return await late(job, lambda: send(Request(name=NAME), timeout=DEADLINE), is_too_late)
    if job.kind == "order":
        order = Order(lines=[Line(item=i, sku=s, price=p, tags=t) for i, s, p, t in LINES])
        return await load(job, [lambda: send(order, timeout=TIMEOUT)], is_order)
    if job.kind == "blob":
        blob = bytes(range(256)) * (BLOB_SIZE // 256)
        return await load(job, [lambda: send(blob, timeout=TIMEOUT)], blob.__eq__)
    if job.kind == "watch":
        return await stream(job, lambda count: send(Many(name=NAME, count=count)), is_greeting)
    if job.kind == "chat":
        return await stream(job, lambda count: send(said(count)), is_greeting)
    return await load(job, [lambda: send(Request(name=NAME), timeout=TIMEOUT)], is_greeting)


async def said(count: int) -> AsyncIterator[Any]:
    for _ in range(count):
        yield Request(name=NAME)


def is_too_late(exc: Exception) -> bool:
    code: Any = getattr(exc, "code", None)
    return code is not None and code() is grpc.StatusCode.DEADLINE_EXCEEDED


if __name__ == "__main__":
    main(serve, call)
