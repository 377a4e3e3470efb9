"""Typed clients, used rightly and wrongly; never run.

check.py holds mypy and pyright to the marks: each marked line has just these errors, each other
line has none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol, assert_type

import micro


@dataclass
class Request:
    name: str


@dataclass
class Response:
    message: str


class Greeter(Protocol):
    async def call(self, request: Request) -> Response: ...

    async def say_hello(self, name: str, *, times: int = 1) -> Response: ...


class AbstractGreeter(ABC):
    @abstractmethod
    async def call(self, request: Request) -> Response: ...


class PlainGreeter:
    async def call(self, request: Request) -> Response:
        return Response(message=f"Hello {request.name}")


class Streams(Protocol):
    def watch(self, request: Request) -> AsyncIterator[Response]: ...

    async def upload(self, parts: AsyncIterator[Request]) -> Response: ...

    def chat(self, said: AsyncIterator[Request]) -> AsyncIterator[Response]: ...


class AbstractStreams(ABC):
    @abstractmethod
    def watch(self, request: Request) -> AsyncIterator[Response]: ...

    @abstractmethod
    async def upload(self, parts: AsyncIterator[Request]) -> Response: ...

    @abstractmethod
    def chat(self, said: AsyncIterator[Request]) -> AsyncIterator[Response]: ...


class PlainStreams:
    @micro.endpoint(idempotent=True, timeout=60)
    async def watch(self, request: Request) -> AsyncIterator[Response]:
        yield Response(message=f"Hello {request.name}")

    async def upload(self, parts: AsyncIterator[Request]) -> Response:
        return Response(message=" ".join([part.name async for part in parts]))

    async def chat(self, said: AsyncIterator[Request]) -> AsyncIterator[Response]:
        async for one in said:
            yield Response(message=f"Hello {one.name}")


async def requests() -> AsyncIterator[Request]:
    yield Request("Alice")


async def names() -> AsyncIterator[str]:
    yield "Alice"


async def a_protocol_is_a_contract(app: micro.Service) -> None:
    greeter = app.client("helloworld", Greeter, name="Helloworld")
    assert_type(greeter, Greeter)
    reply = await greeter.call(Request("Alice"))
    assert_type(reply, Response)
    assert_type(reply.message, str)


async def an_abstract_class_is_a_contract(app: micro.Service) -> None:
    greeter = app.client("helloworld", AbstractGreeter, name="Helloworld")
    assert_type(greeter, AbstractGreeter)
    assert_type(await greeter.call(Request("Alice")), Response)
    await greeter.call("Alice")  # E: mypy[arg-type] pyright[reportArgumentType]


async def a_plain_class_is_a_contract(app: micro.Service) -> None:
    greeter = app.client("helloworld", PlainGreeter, name="Helloworld")
    assert_type(greeter, PlainGreeter)
    assert_type(await greeter.call(Request("Alice")), Response)
    await greeter.call("Alice")  # E: mypy[arg-type] pyright[reportArgumentType]


async def arguments_are_checked(app: micro.Service) -> None:
    greeter = app.client("helloworld", Greeter)
    await greeter.call({"name": "Alice"})  # E: mypy[arg-type] pyright[reportArgumentType]
    await greeter.call()  # E: mypy[call-arg] pyright[reportCallIssue]
    await greeter.call(Request("Alice"), 3)  # E: mypy[call-arg] pyright[reportCallIssue]
    await greeter.say_hello("Alice", times=2)
    await greeter.say_hello("Alice", times="2")  # E: mypy[arg-type] pyright[reportArgumentType]
    await greeter.say_hello("Alice", often=2)  # E: mypy[call-arg] pyright[reportCallIssue]


async def methods_are_checked(app: micro.Service) -> None:
    greeter = app.client("helloworld", Greeter)
    await greeter.cal(Request("Alice"))  # E: mypy[attr-defined] pyright[reportAttributeAccessIssue]
    greeter.call(Request("Alice"))  # E: mypy[unused-coroutine] pyright[reportUnusedCoroutine]


async def replies_are_checked(app: micro.Service) -> None:
    reply = await app.client("helloworld", Greeter).call(Request("Alice"))
    print(reply.text)  # E: mypy[attr-defined] pyright[reportAttributeAccessIssue]
    count: int = reply.message  # E: mypy[assignment] pyright[reportAssignmentType]
    print(count)


async def using_keeps_the_type(app: micro.Service) -> None:
    greeter = micro.using(app.client("helloworld", Greeter), timeout=0.2, metadata={"tenant": "a"})
    assert_type(greeter, Greeter)
    await greeter.call("Alice")  # E: mypy[arg-type] pyright[reportArgumentType]
    micro.using(greeter, timeout="1s")  # E: mypy[arg-type] pyright[reportArgumentType]


async def returns_is_the_type_of_the_reply(app: micro.Service) -> None:
    reply = await app.call("helloworld", "Helloworld.Call", Request("Alice"), returns=Response)
    assert_type(reply, Response)
    print(reply.text)  # E: mypy[attr-defined] pyright[reportAttributeAccessIssue]


async def without_returns_the_reply_is_anything(app: micro.Service) -> None:
    raw = await app.call("helloworld", "Helloworld.Call", {"name": "Alice"})
    assert_type(raw, Any)
    print(raw["message"])


def a_contract_is_a_class(app: micro.Service) -> None:
    app.client("helloworld", "Greeter")  # E: mypy[arg-type] pyright[reportArgumentType]
    app.client("helloworld", Greeter, "x")  # E: mypy[call-arg] pyright[reportCallIssue]


# -- streams -----------------------------------------------------------------------------------


async def a_protocol_has_all_kinds_of_streams(app: micro.Service) -> None:
    streams = app.client("helloworld", Streams)
    assert_type(streams, Streams)
    async for reply in streams.watch(Request("Alice")):
        assert_type(reply, Response)
    assert_type(await streams.upload(requests()), Response)
    async for answer in streams.chat(requests()):
        assert_type(answer, Response)


async def an_abstract_class_has_all_kinds_of_streams(app: micro.Service) -> None:
    streams = app.client("helloworld", AbstractStreams)
    async for reply in streams.watch(Request("Alice")):
        assert_type(reply, Response)
    assert_type(await streams.upload(requests()), Response)
    async for answer in streams.chat(requests()):
        assert_type(answer, Response)


async def a_plain_class_has_all_kinds_of_streams(app: micro.Service) -> None:
    streams = app.client("helloworld", PlainStreams)
    async for reply in streams.watch(Request("Alice")):
        assert_type(reply, Response)
    assert_type(await streams.upload(requests()), Response)
    async for answer in streams.chat(requests()):
        assert_type(answer, Response)
        print(answer.text)  # E: mypy[attr-defined] pyright[reportAttributeAccessIssue]


async def server_streams_are_checked(app: micro.Service) -> None:
    streams = app.client("helloworld", Streams)
    await streams.watch(Request("Alice"))  # E: mypy[misc] pyright[reportGeneralTypeIssues]
    async for reply in streams.watch("Alice"):  # E: mypy[arg-type] pyright[reportArgumentType]
        print(reply.text)  # E: mypy[attr-defined] pyright[reportAttributeAccessIssue]
    async for one in streams.watch(requests()):  # E: mypy[arg-type] pyright[reportArgumentType]
        print(one)
    replies = streams.watch(Request("Alice"))
    for each in replies:  # E: mypy[attr-defined] pyright[reportGeneralTypeIssues]
        print(each)


async def client_streams_are_checked(app: micro.Service) -> None:
    streams = app.client("helloworld", Streams)
    await streams.upload(Request("Alice"))  # E: mypy[arg-type] pyright[reportArgumentType]
    await streams.upload([Request("Alice")])  # E: mypy[arg-type] pyright[reportArgumentType]
    await streams.upload(names())  # E: mypy[arg-type] pyright[reportArgumentType]
    await streams.upload(requests)  # E: mypy[arg-type] pyright[reportArgumentType]
    streams.upload(requests())  # E: mypy[unused-coroutine] pyright[reportUnusedCoroutine]
    reply = await streams.upload(requests())
    count: int = reply.message  # E: mypy[assignment] pyright[reportAssignmentType]
    print(count)


async def bidirectional_streams_are_checked(app: micro.Service) -> None:
    streams = app.client("helloworld", AbstractStreams)
    await streams.chat(requests())  # E: mypy[misc] pyright[reportGeneralTypeIssues]
    async for reply in streams.chat(names()):  # E: mypy[arg-type] pyright[reportArgumentType]
        count: int = reply.message  # E: mypy[assignment] pyright[reportAssignmentType]
        print(count)
    summary = streams.upload(requests())
    async for each in summary:  # E: mypy[attr-defined] pyright[reportGeneralTypeIssues]
        print(each)


async def using_keeps_the_type_of_streams(app: micro.Service) -> None:
    streams = micro.using(app.client("helloworld", PlainStreams), timeout=60)
    assert_type(streams, PlainStreams)
    async for reply in streams.chat(names()):  # E: mypy[arg-type] pyright[reportArgumentType]
        assert_type(reply, Response)


async def streams_without_a_contract_are_typed(app: micro.Service) -> None:
    stream = app.client.stream
    async with stream("helloworld", "Streams.Watch", Request("a"), returns=Response) as replies:
        assert_type(replies, micro.Stream[Response])
        async for reply in replies:
            assert_type(reply, Response)
            print(reply.text)  # E: mypy[attr-defined] pyright[reportAttributeAccessIssue]
    async with stream("helloworld", "Streams.Chat", requests()) as chat:
        async for answer in chat:
            assert_type(answer, Any)
    watched = stream("helloworld", "Streams.Watch")
    async for each in watched:  # E: mypy[attr-defined] pyright[reportGeneralTypeIssues]
        print(each)
    with watched as wrong:  # E: mypy[attr-defined] pyright[reportGeneralTypeIssues]
        print(wrong)
    stream("a", "A.B", timeout="1s")  # E: mypy[call-overload] pyright[reportArgumentType]
    summary = await app.call("helloworld", "Streams.Upload", requests(), returns=Response)
    assert_type(summary, Response)


def endpoints_are_marked() -> None:
    @micro.endpoint(name="Greeter.GetURL", idempotent=True, timeout=2)
    async def get_url(request: Request) -> Response:
        return Response(message=request.name)

    @micro.endpoint(timeout="2s")  # E: mypy[arg-type] pyright[reportArgumentType]
    async def slow(request: Request) -> Response:
        return Response(message=request.name)

    @micro.endpoint  # E: mypy[arg-type] pyright[reportArgumentType]
    async def bare(request: Request) -> Response:
        return Response(message=request.name)

    print(get_url, slow, bare)
