"""Calling: whom, how long, with what, and what a caller is told."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import msgspec
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

import micro
from micro.call import Body, Call, Handler, Reply
from micro.client import Client
from micro.registry import Node
from micro.settings import Settings
from micro.testing import eventually, serving

from .test_follow import ScriptedRegistry, create, snapshot


@dataclass
class Request:
    name: str


@dataclass
class Response:
    message: str


class Point(msgspec.Struct):
    x: int
    y: int = 0


class Movie(TypedDict):
    title: str


class Greeter:
    """What the tests call; also its own contract."""

    def __init__(self, node: str = "one") -> None:
        self._node = node

    async def call(self, request: Request) -> Response:
        return Response(message=f"Hello {request.name}")

    async def add(self, a: int, b: int = 2) -> int:
        return a + b

    async def mirror(self, point: Point) -> Point:
        return Point(x=point.y, y=point.x)

    async def rename(self, movie: Movie) -> Movie:
        return Movie(title=movie["title"].upper())

    async def reverse(self, data: bytes) -> bytes:
        return data[::-1]

    async def nothing(self) -> None:
        return None

    async def where(self) -> str:
        return self._node

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def seen(self) -> dict[str, str]:
        return dict(micro.context().metadata)

    async def left(self) -> float:
        deadline = micro.context().deadline
        assert deadline is not None
        return deadline - time.monotonic()


class Contract(Protocol):
    async def call(self, request: Request) -> Response: ...


class Abstract(ABC):
    @abstractmethod
    async def call(self, request: Request) -> Response: ...


@asynccontextmanager
async def fleet(*nodes: str, plugins: micro.Plugins | None = None) -> AsyncIterator[micro.Service]:
    """Several nodes of the service ``greeter``, and one more service that calls them."""
    plugins = plugins or micro.Plugins()
    shared: dict[str, Any] = {
        "registry": "memory://fleet",
        "transport": "memory://fleet",
        "plugins": plugins,
    }
    async with _all([_serving(micro.Service("greeter", **shared), node) for node in nodes]):
        async with micro.Service("web", **shared).opened(Settings(environment={})) as web:
            yield web


@asynccontextmanager
async def _serving(service: micro.Service, node: str) -> AsyncIterator[None]:
    service.handle(Greeter(node))
    async with service.opened(Settings(environment={"MICRO_SERVER_ID": node})):
        yield


@asynccontextmanager
async def _all(managers: list[Any]) -> AsyncIterator[None]:
    from contextlib import AsyncExitStack

    async with AsyncExitStack() as stack:
        for manager in managers:
            await stack.enter_async_context(manager)
        yield


@pytest.mark.asyncio
@pytest.mark.parametrize("contract", [Contract, Abstract, Greeter])
async def test_contract_can_be_a_protocol_an_abc_or_a_class(
    contract: Callable[..., Contract],
) -> None:
    async with fleet("a") as web:
        greeter = web.client("greeter", contract, name="Greeter")
        assert await greeter.call(Request("Alice")) == Response("Hello Alice")


@pytest.mark.asyncio
async def test_every_kind_of_message_travels_typed() -> None:
    async with fleet("a") as web:
        greeter = web.client("greeter", Greeter)
        assert await greeter.call(Request(name="Bob")) == Response("Hello Bob")
        assert await greeter.call(request=Request("Bob")) == Response("Hello Bob")
        assert await greeter.add(1) == 3
        assert await greeter.add(1, b=5) == 6
        assert await greeter.mirror(Point(1, 2)) == Point(2, 1)
        assert await greeter.rename({"title": "alien"}) == {"title": "ALIEN"}
        assert await greeter.reverse(b"\x00\xff") == b"\xff\x00"
        assert await greeter.nothing() is None  # type: ignore[func-returns-value]


@pytest.mark.asyncio
async def test_wrong_arguments_are_a_type_error_before_anything_is_sent() -> None:
    async with fleet("a") as web:
        with pytest.raises(TypeError, match="missing a required argument"):
            await web.client("greeter", Greeter).add()  # type: ignore[call-arg]


@pytest.mark.asyncio
async def test_untyped_call_gives_plain_data_and_returns_makes_it_typed() -> None:
    async with fleet("a") as web:
        raw = await web.call("greeter", "Greeter.Call", {"name": "Alice"})
        assert raw == {"message": "Hello Alice"}
        typed = await web.call("greeter", "Greeter.Call", Request("Alice"), returns=Response)
        assert typed == Response("Hello Alice")


@pytest.mark.asyncio
async def test_reply_that_is_not_what_returns_says_is_a_decode_error() -> None:
    async with fleet("a") as web:
        with pytest.raises(micro.DecodeError, match="`x`"):
            await web.call("greeter", "Greeter.Call", Request("Alice"), returns=Point)


@pytest.mark.asyncio
async def test_calls_are_spread_over_all_nodes() -> None:
    async with fleet("a", "b", "c") as web:
        greeter = web.client("greeter", Greeter)
        counted = Counter([await greeter.where() for _ in range(300)])
        assert set(counted) == {"a", "b", "c"}
        assert min(counted.values()) > 50


@pytest.mark.asyncio
async def test_new_node_is_called_and_a_gone_one_is_not() -> None:
    plugins = micro.Plugins()
    async with fleet("a", plugins=plugins) as web:
        greeter = web.client("greeter", Greeter)
        assert await greeter.where() == "a"
        late = micro.Service(
            "greeter", registry="memory://fleet", transport="memory://fleet", plugins=plugins
        )
        async with _serving(late, "late"):

            async def is_late() -> bool:
                return await greeter.where() == "late"

            await eventually(is_late)
        assert {await greeter.where() for _ in range(50)} == {"a"}


@pytest.mark.asyncio
async def test_registry_is_not_on_the_path_of_a_call() -> None:
    """Once it is watched, an outage of the registry fails no call."""
    async with _one_node() as (web, registry, greeter):
        assert await greeter.where() == "one"
        registry.consistent = micro.Unavailable("down")
        registry.say(*[micro.Unavailable("down")] * 3)
        async with web.client.watch("greeter") as watch:
            await eventually(lambda: watch.state == "stale")
            for _ in range(50):
                assert await greeter.where() == "one"
        assert registry.reads == 0


@asynccontextmanager
async def _one_node() -> AsyncIterator[tuple[micro.Service, ScriptedRegistry, Greeter]]:
    registry = ScriptedRegistry()
    plugins = micro.Plugins()
    server = micro.Service("greeter", registry="memory", transport="memory://x", plugins=plugins)
    web = micro.Service("web", registry=registry, transport="memory://x", plugins=plugins)
    async with _serving(server, "one"), web.opened(Settings(environment={})):
        address = "memory:1"
        registry.say(snapshot(Node(service="greeter", id="one", address=address)))
        yield web, registry, web.client("greeter", Greeter)


@pytest.mark.asyncio
async def test_nodes_that_speak_another_wire_are_not_called() -> None:
    async with _one_node() as (_, registry, greeter):
        for number, metadata in enumerate(({"transport": "nats"}, {"protocol": "grpc"})):
            node = Node(service="greeter", id=f"n{number}", address="memory:9", metadata=metadata)
            registry.say(create(node))
        for _ in range(50):
            assert await greeter.where() == "one"


@pytest.mark.asyncio
async def test_no_node_that_speaks_our_wire_is_said() -> None:
    registry = ScriptedRegistry()
    node = Node(service="s", id="n", address="h:1", metadata={"transport": "nats"})
    registry.say(snapshot(node))
    registry.consistent = (node,)
    web = micro.Service("web", registry=registry, transport="memory")
    async with web.opened(Settings(environment={})):
        with pytest.raises(micro.Unavailable, match="no node of 's' speaks memory") as caught:
            await web.call("s", "X.Y")
        assert caught.value.sent is False


@pytest.mark.asyncio
async def test_unknown_service_names_similar_ones() -> None:
    async with fleet("a") as web:
        with pytest.raises(micro.ServiceNotFound, match="did you mean greeter"):
            await web.call("greter", "Greeter.Call")


@pytest.mark.asyncio
async def test_unknown_service_names_what_is_registered() -> None:
    async with fleet("a") as web:
        with pytest.raises(micro.ServiceNotFound, match="registered are greeter"):
            await web.call("zzz", "Greeter.Call")


@pytest.mark.asyncio
async def test_unknown_service_in_an_empty_registry_asks_whether_it_runs() -> None:
    async with fleet() as web:
        with pytest.raises(micro.ServiceNotFound, match="nothing is registered, is it running"):
            await web.call("greeter", "Greeter.Call")


@pytest.mark.asyncio
async def test_unknown_names_leave_no_watch_behind() -> None:
    async with fleet("a") as web:
        for number in range(20):
            with pytest.raises(micro.ServiceNotFound):
                await web.call(f"nobody-{number}", "X.Y")
        assert not web.client._routes._views


@pytest.mark.asyncio
async def test_service_that_starts_later_is_found() -> None:
    plugins = micro.Plugins()
    async with fleet(plugins=plugins) as web:
        with pytest.raises(micro.ServiceNotFound):
            await web.call("greeter", "Greeter.Where")
        server = micro.Service(
            "greeter", registry="memory://fleet", transport="memory://fleet", plugins=plugins
        )
        async with _serving(server, "a"):
            assert await web.call("greeter", "Greeter.Where") == "a"


@pytest.mark.asyncio
async def test_unknown_endpoint_names_those_that_exist() -> None:
    async with fleet("a") as web:
        with pytest.raises(micro.EndpointNotFound, match=r"did you mean Greeter\.Call") as caught:
            await web.call("greeter", "Greeter.Cal")
        assert caught.value.remote


@pytest.mark.asyncio
async def test_wrong_field_type_says_path_and_expected_type() -> None:
    async with fleet("a") as web:
        with pytest.raises(micro.DecodeError, match=r"Expected `str`, got `int` - at `\$\.name`"):
            await web.call("greeter", "Greeter.Call", {"name": 5})


class Clock:
    async def later(self, at: Timestamp) -> Timestamp:
        return Timestamp(seconds=at.seconds + 1)

    async def stop(self, at: Timestamp) -> None: ...


@asynccontextmanager
async def clock(seen: list[str]) -> AsyncIterator[Client]:
    """A client of a service with messages of protobuf; ``seen`` gets each content type."""

    def watching(handler: Handler) -> Handler:
        async def handle(call: Call, body: Body) -> Reply:
            seen.append(call.content_type)
            return await handler(call, body)

        return handle

    service = micro.Service("clock")
    service.wrap_handler(watching)
    service.handle(Clock())
    async with serving(service) as client:
        yield client


@pytest.mark.asyncio
async def test_protobuf_message_travels_as_protobuf_by_itself() -> None:
    seen: list[str] = []
    async with clock(seen) as client:
        at = Timestamp(seconds=5)
        assert await client("clock", Clock).later(at) == Timestamp(seconds=6)
        await client("clock", Clock).stop(at)
        got = await client.call("clock", "Clock.Later", at, returns=Timestamp)
        assert (got, seen) == (Timestamp(seconds=6), ["application/protobuf"] * 3)


@pytest.mark.asyncio
@pytest.mark.parametrize("content_type", ["application/json", "application/msgpack"])
async def test_protobuf_message_travels_as_the_caller_says(content_type: str) -> None:
    seen: list[str] = []
    async with clock(seen) as client:
        got = await client.call(
            "clock",
            "Clock.Later",
            Timestamp(seconds=5),
            returns=Timestamp,
            content_type=content_type,
        )
        assert (got, seen) == (Timestamp(seconds=6), [content_type])


@pytest.mark.asyncio
async def test_reply_that_the_content_type_cannot_hold_is_refused_before_the_call() -> None:
    seen: list[str] = []
    async with clock(seen) as client:
        with pytest.raises(micro.UnsupportedContentType, match="send JSON"):
            await client.call("clock", "Clock.Later", Timestamp(), returns=dict[str, int])
        assert seen == []


@pytest.mark.asyncio
async def test_bad_name_of_a_service_is_refused() -> None:
    async with fleet("a") as web:
        with pytest.raises(micro.InvalidArgument, match="labels"):
            await web.call("a/b", "X.Y")
        with pytest.raises(micro.InvalidArgument, match="labels"):
            web.client("a/b", Contract)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "endpoint", ["", "Call", "a.b.c", "X.Y\r\nEvil: 1", "X.Y ", "/livez", "X.ü"]
)
async def test_bad_name_of_an_endpoint_is_refused(endpoint: str) -> None:
    async with fleet("a") as web:
        with pytest.raises(micro.InvalidArgument, match=r"Handler\.Method"):
            await web.call("greeter", endpoint)


@pytest.mark.asyncio
async def test_call_ends_at_its_timeout_and_the_handler_is_cancelled() -> None:
    async with fleet("a") as web:
        began = time.monotonic()
        with pytest.raises(micro.DeadlineExceeded, match=r"no reply in 0\.1 s"):
            await web.call("greeter", "Greeter.Sleep", {"seconds": 30}, timeout=0.1)
        assert 0.1 <= time.monotonic() - began < 0.1 + 0.05 + 2.0


@pytest.mark.asyncio
async def test_remaining_time_travels() -> None:
    async with fleet("a") as web:
        greeter = web.client("greeter", Greeter)
        assert 4.0 < await greeter.left() <= 5.0
        assert 1.0 < await micro.using(greeter, timeout=2).left() <= 2.0


@pytest.mark.asyncio
async def test_using_changes_a_copy_and_adds_up() -> None:
    async with fleet("a") as web:
        greeter = web.client("greeter", Greeter)
        tenant = micro.using(greeter, metadata={"Tenant": "acme"})
        both = micro.using(micro.using(tenant, metadata={"zone": "eu"}), timeout=1)
        assert await greeter.seen() == {}
        assert await tenant.seen() == {"tenant": "acme"}
        assert await both.seen() == {"tenant": "acme", "zone": "eu"}


@pytest.mark.asyncio
async def test_using_anything_but_a_typed_client_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="typed client"):
        micro.using(object(), timeout=1)


class Relay:
    """Calls on from inside a handler."""

    def __init__(self, service: micro.Service) -> None:
        self._greeter = service.client("greeter", Greeter)

    async def seen(self) -> dict[str, str]:
        return await self._greeter.seen()

    async def left(self) -> float:
        return await micro.using(self._greeter, timeout=60).left()


@pytest.mark.asyncio
async def test_call_inside_a_handler_inherits_deadline_and_trace_but_no_credentials() -> None:
    plugins = micro.Plugins()
    relay = micro.Service(
        "relay", registry="memory://fleet", transport="memory://fleet", plugins=plugins
    )
    relay.handle(Relay(relay))
    async with fleet("a", plugins=plugins) as web, relay.opened(Settings(environment={})):
        sent = {"traceparent": "00-1", "baggage": "b=1", "authorization": "Bearer x", "tenant": "a"}
        seen = await web.call("relay", "Relay.Seen", metadata=sent)
        assert seen == {"traceparent": "00-1", "baggage": "b=1"}
        assert 0.0 < await web.call("relay", "Relay.Left", timeout=1.0) <= 1.0


@pytest.mark.asyncio
async def test_first_client_middleware_is_outermost() -> None:
    order: list[str] = []

    def note(name: str) -> micro.Middleware:
        def wrap(handler: micro.Handler) -> micro.Handler:
            async def run(call: micro.Call, body: micro.Body) -> micro.Reply:
                order.append(f"{name} {call.endpoint}")
                reply = await handler(call, body)
                order.append(f"{name} done")
                return reply

            return run

        return wrap

    service = micro.Service("greeter", client_middleware=[note("outer"), note("inner")])
    service.handle(Greeter())
    async with serving(service) as client:
        await client.call("greeter", "Greeter.Where")
    assert order == ["outer Greeter.Where", "inner Greeter.Where", "inner done", "outer done"]


@pytest.mark.asyncio
async def test_failed_dial_is_tried_again_though_nobody_waited_for_its_end() -> None:
    async with _one_node() as (web, _registry, _):
        (transport,) = await web.client._means().transports()
        dial, entered, fail = transport.dial, asyncio.Event(), asyncio.Event()

        async def failing(*_: object, **__: object) -> Any:
            entered.set()
            await fail.wait()
            raise micro.Unavailable("no route")

        transport.dial = failing  # type: ignore[method-assign]
        calling = asyncio.create_task(web.call("greeter", "Greeter.Where"))
        await entered.wait()
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)
        fail.set()
        transport.dial = dial  # type: ignore[method-assign]
        await eventually(lambda: not web.client._routes._channels)
        assert await web.call("greeter", "Greeter.Where") == "one"


@pytest.mark.asyncio
async def test_first_calls_at_once_share_one_watch() -> None:
    async with fleet("a") as web:
        greeter = web.client("greeter", Greeter)
        await asyncio.gather(*(greeter.where() for _ in range(100)))
        assert len(web.client._routes._views) == 1
        assert web.client._routes._views["greeter"][1] == 1


@pytest.mark.asyncio
async def test_watch_shows_nodes_come_and_go() -> None:
    plugins = micro.Plugins()
    async with fleet(plugins=plugins) as web, web.client.watch("greeter") as watch:
        assert watch.nodes == ()
        server = micro.Service(
            "greeter", registry="memory://fleet", transport="memory://fleet", plugins=plugins
        )
        async with _serving(server, "a"):
            assert (await anext(watch)).kind == "create"
        assert (await anext(watch)).kind == "delete"


@pytest.mark.asyncio
async def test_call_before_the_service_is_open_says_so() -> None:
    service = micro.Service("web")
    greeter = service.client("greeter", Greeter)
    with pytest.raises(micro.Closed, match="async with service"):
        await greeter.where()


@pytest.mark.asyncio
async def test_closing_leaves_no_task_behind() -> None:
    before = asyncio.all_tasks()
    async with fleet("a", "b") as web:
        greeter = web.client("greeter", Greeter)
        await asyncio.gather(*(greeter.where() for _ in range(20)))
    await eventually(lambda: asyncio.all_tasks() == before)
