"""``micro.Service`` and a typed client of it.

Options: ``native`` or ``http``, the transport; ``everything``: three middlewares on each side and
metadata on each call; ``64-connections`` instead of one; ``large``: limits for large bodies;
``dataclasses`` instead of Structs for orders; ``uvloop``, on both sides.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import msgspec
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
from bench.peer import main

import micro
from micro.backend import Connections
from micro.registry import RegistryFeatures

T = TypeVar("T")

METADATA = {
    "tenant": "acme",
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "locale": "de-CH",
}
#: What a node says of itself with each of the two settings.
SPOKEN = {"native": {"transport": "http", "transports": "tcp,http"}, "http": {"transport": "http"}}
SETTING = {"native": "tcp,http", "http": "http"}


@dataclass
class Request:
    name: str


@dataclass
class Response:
    message: str


@dataclass
class Many:
    name: str
    count: int


class Line(msgspec.Struct):
    item: int
    sku: str
    price: float
    tags: list[str]


class Order(msgspec.Struct):
    lines: list[Line]


@dataclass
class PlainLine:
    item: int
    sku: str
    price: float
    tags: list[str]


@dataclass
class PlainOrder:
    lines: list[PlainLine]


class Helloworld:
    async def call(self, request: Request) -> Response:
        return Response(message=f"Hello {request.name}")

    async def pause(self, request: Request) -> Response:
        await asyncio.sleep(0)
        return Response(message=f"Hello {request.name}")

    async def order(self, request: Order) -> Order:
        return request

    async def plain_order(self, request: PlainOrder) -> PlainOrder:
        return request

    async def blob(self, request: bytes) -> bytes:
        return request


class Streams:
    async def watch(self, request: Many) -> AsyncIterator[Response]:
        for _ in range(request.count):
            yield Response(message=f"Hello {request.name}")

    async def chat(self, said: AsyncIterator[Request]) -> AsyncIterator[Response]:
        async for request in said:
            yield Response(message=f"Hello {request.name}")


def passing(handler: micro.Handler) -> micro.Handler:
    """A middleware that does nothing but await the next."""

    async def passed(call: micro.Call, body: micro.Body) -> micro.Reply:
        return await handler(call, body)

    return passed


def serve(port: int, options: list[str]) -> None:
    if "uvloop" not in options:
        cast("dict[str, Any]", sys.modules)["uvloop"] = None  # as if it were not installed
    service = micro.Service("bench", middleware=middleware(options), limits=limits(options))
    service.handle(Helloworld())
    service.handle(Streams())
    address = f"--server_address=127.0.0.1:{port}"
    service.run(
        [address, "--registry=memory", f"--transport={transport(options)}", "--log_level=warning"]
    )


def middleware(options: Sequence[str]) -> list[micro.Middleware]:
    return [passing] * 3 if "everything" in options else []


def limits(options: Sequence[str]) -> micro.Limits:
    return micro.Limits(message=BLOB_SIZE) if "large" in options else micro.Limits()


def transport(options: Sequence[str]) -> str:
    return SETTING["native" if "native" in options else "http"]


class OneNode(micro.Registry):
    """A registry that knows the server and nothing else.

    What is measured is a call, and no registry is on its path; mdns would add the network's mood.
    """

    features = RegistryFeatures(min_ttl=0, converge=0)

    def __init__(self, node: micro.Node) -> None:
        super().__init__(micro.URL(scheme="one"))
        self._node = node

    async def connect(self, connections: Connections) -> None:
        pass

    async def aclose(self) -> None:
        pass

    async def register(self, node: micro.Node, *, ttl: float) -> None:
        raise micro.Unsupported("one node is all there is")

    async def deregister(self, node: micro.Node) -> None:
        pass

    async def get(self, service: str) -> tuple[micro.Node, ...]:
        return (self._node,)

    async def services(self) -> tuple[str, ...]:
        return (self._node.service,)

    async def follow(
        self, service: str | None, mark: object
    ) -> AsyncGenerator[tuple[object, micro.Snapshot | micro.Change], None]:
        yield 1, micro.Snapshot(nodes=(self._node,))
        await asyncio.Event().wait()


async def call(job: Job) -> Point:
    async with AsyncExitStack() as stack:

        async def open_app() -> micro.Service:
            app = micro.Service(
                "bench-client",
                registry=OneNode(node(job)),
                transport=transport(job.options),
                client_middleware=middleware(job.options),
                limits=limits(job.options),
            )
            return await stack.enter_async_context(app)

        if job.kind == "idle":

            async def connect() -> None:
                greeter = (await open_app()).client("bench", Helloworld)
                assert is_greeting(await greeter.call(Request(NAME)))

            return await idle(job, connect)
        count = 64 if "64-connections" in job.options else 1
        apps = [await open_app() for _ in range(count)]
        return await (streams if job.kind in ("watch", "chat") else calls)(job, apps)


def node(job: Job) -> micro.Node:
    spoken = SPOKEN["native" if "native" in job.options else "http"]
    return micro.Node(service="bench", id="one", address=f"127.0.0.1:{job.port}", metadata=spoken)


def client(job: Job, app: micro.Service, contract: Callable[..., T]) -> T:
    """As a user has it, with what the options and the load ask for."""
    made = app.client("bench", contract)
    if "everything" in job.options:
        made = micro.using(made, metadata=METADATA)
    return micro.using(made, timeout=DEADLINE) if job.kind == "late" else made


async def calls(job: Job, apps: list[micro.Service]) -> Point:
    greeters = [client(job, app, Helloworld) for app in apps]
    greeter = greeters[0]
    if job.kind == "late":
        return await late(job, lambda: greeter.call(Request(NAME)), is_too_late)
    if job.kind == "pause":
        return await load(job, [lambda: greeter.pause(Request(NAME))], is_greeting)
    if job.kind == "order" and "dataclasses" in job.options:
        plain = PlainOrder([PlainLine(*line) for line in LINES])
        return await load(job, [lambda: greeter.plain_order(plain)], is_order)
    if job.kind == "order":
        order = Order([Line(*line) for line in LINES])
        return await load(job, [lambda: greeter.order(order)], is_order)
    if job.kind == "blob":
        blob = bytes(range(256)) * (BLOB_SIZE // 256)
        return await load(job, [lambda: greeter.blob(blob)], blob.__eq__)
    return await load(job, [caller(greeter) for greeter in greeters], is_greeting)


def caller(greeter: Helloworld) -> Callable[[], Awaitable[Response]]:
    return lambda: greeter.call(Request(NAME))


async def streams(job: Job, apps: list[micro.Service]) -> Point:
    greeter = client(job, apps[0], Streams)
    if job.kind == "watch":
        return await stream(job, lambda count: greeter.watch(Many(NAME, count)), is_greeting)
    return await stream(job, lambda count: greeter.chat(said(count)), is_greeting)


async def said(count: int) -> AsyncIterator[Request]:
    for _ in range(count):
        yield Request(NAME)


def is_too_late(exc: Exception) -> bool:
    return isinstance(exc, micro.DeadlineExceeded)


if __name__ == "__main__":
    main(serve, call)
