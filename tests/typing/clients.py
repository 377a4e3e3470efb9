"""Typed clients, used rightly and wrongly; never run.

check.py holds mypy and pyright to the marks: each marked line has just these errors, each other
line has none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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
