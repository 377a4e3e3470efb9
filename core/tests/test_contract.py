"""Contracts and handlers: the public methods of a class as endpoints."""

# Most methods here are only read.
# mypy: disable-error-code="empty-body"

from __future__ import annotations

import abc
import asyncio
import functools
import re
import types
import typing
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any, Generic, Protocol, TypedDict, TypeVar

import msgspec
import pydantic
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

import micro
from micro.contract import Method, read_contract, read_handler
from micro.errors import ConfigError
from micro.registry import Endpoint, Value
from micro.server import Server
from micro.settings import Settings

T = TypeVar("T")
Handler = Callable[..., Any]


class Colour(Enum):
    RED = "red"


@dataclass
class Request:
    name: str


class Response(msgspec.Struct):
    message: str


class Point(TypedDict):
    x: int
    y: int


class Custom:
    """No message can hold it."""


@dataclass
class Holds:
    custom: Custom


@dataclass
class Nested:
    inner: Holds


class Greeter:
    async def say_hello(self, request: Request) -> Response:
        """Greet a person.

        Kindly.
        """
        return Response(message=f"Hello {request.name}")


def handled(**methods: Any) -> list[Method]:
    """The endpoints of a handler of class ``Handler`` with these methods."""
    return read_handler(type("Handler", (), methods)(), None)


def problems(read: Callable[[], object]) -> list[str]:
    """Every problem that a refusal lists."""
    with pytest.raises(ConfigError) as caught:
        read()
    head, *listed = str(caught.value).split("\n  - ")
    assert head.endswith("cannot be used:")
    return listed


def problem(method: Handler) -> str:
    """The one problem of a handler with this method."""
    (listed,) = problems(lambda: handled(**{method.__name__: method}))
    return listed


# -- names -------------------------------------------------------------------------------------


def test_method_of_a_class_is_an_endpoint_in_camel_case() -> None:
    (method,) = read_handler(Greeter(), None)
    assert (method.endpoint, method.attribute) == ("Greeter.SayHello", "say_hello")


@pytest.mark.parametrize(
    ("name", "endpoint"),
    [("call", "Call"), ("get_url", "GetUrl"), ("a1", "A1"), ("getURL", "GetURL"), ("x_", "X")],
)
def test_name_of_a_method_becomes_camel_case(name: str, endpoint: str) -> None:
    async def method(self: object) -> None: ...

    method.__name__ = name
    assert [one.endpoint for one in handled(**{name: method})] == [f"Handler.{endpoint}"]


def test_name_stands_for_the_name_of_the_class() -> None:
    assert [one.endpoint for one in read_handler(Greeter(), "Hello")] == ["Hello.SayHello"]
    assert [one.endpoint for one in read_contract(Greeter, "Hello")] == ["Hello.SayHello"]


def test_endpoint_gives_a_method_a_name_of_its_own() -> None:
    class Named:
        @micro.endpoint(name="Greeter.GetURL")
        async def get_url(self, request: Request) -> Response: ...

    for read in (read_handler(Named(), None), read_contract(Named, "Other")):
        (method,) = read
        assert (method.endpoint, method.attribute) == ("Greeter.GetURL", "get_url")


def test_endpoint_leaves_the_method_as_it_is() -> None:
    async def method() -> None: ...

    assert micro.endpoint(name="A.B")(method) is method


def test_endpoint_without_a_name_leaves_the_name() -> None:
    class Marked:
        @micro.endpoint(idempotent=True, timeout=2)
        async def get_url(self, request: Request) -> Response: ...

        @micro.endpoint()
        async def plain(self) -> None: ...

    for read in (read_handler(Marked(), None), read_contract(Marked, None)):
        marked, plain = read
        assert (marked.endpoint, marked.idempotent, marked.timeout) == ("Marked.GetUrl", True, 2)
        assert (plain.endpoint, plain.idempotent, plain.timeout) == ("Marked.Plain", False, None)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_endpoint_timeout_that_is_no_time_is_refused(timeout: float) -> None:
    with pytest.raises(ConfigError, match=r"endpoint timeout .*: write seconds, more than 0"):
        micro.endpoint(timeout=timeout)


def test_endpoint_without_parentheses_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"write Handler\.Method"):

        @micro.endpoint  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        async def method() -> None: ...


@pytest.mark.parametrize(
    "name", ["", "Greeter", "A.B.C", ".A", "A.", "A B.C", "1.A", "A.B\n", "A/B", "A.É"]
)
def test_endpoint_name_that_is_not_handler_dot_method_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"write Handler\.Method"):
        micro.endpoint(name=name)


def test_two_methods_with_one_name_are_refused() -> None:
    class Twice:
        @micro.endpoint(name="Twice.B")
        async def a(self) -> None: ...

        async def b(self) -> None: ...

    assert problems(lambda: read_handler(Twice(), None)) == ["two methods are Twice.B"]
    assert problems(lambda: read_contract(Twice, None)) == ["two methods are Twice.B"]


def test_method_under_a_second_name_is_an_endpoint_of_that_name() -> None:
    class Alias:
        async def _greet(self, request: Request) -> Response: ...

        call = _greet

    (method,) = read_handler(Alias(), None)
    assert (method.endpoint, method.attribute) == ("Alias.Call", "call")


def test_endpoint_that_another_handler_serves_is_refused_with_its_owner() -> None:
    server = Server("x")
    server.handle(Greeter())
    with pytest.raises(
        ConfigError, match=r"Greeter\.SayHello is already served by Greeter\.say_hello"
    ):
        server.handle(Greeter())
    server.handle(Greeter(), name="Other")


# -- which methods -----------------------------------------------------------------------------


def test_private_methods_are_no_endpoints() -> None:
    class Private(Greeter):
        async def _helper(self, anything): ...  # type: ignore[no-untyped-def]

        async def __call__(self, anything): ...  # type: ignore[no-untyped-def]

    assert [one.attribute for one in read_handler(Private(), None)] == ["say_hello"]


def test_inherited_methods_are_endpoints_of_the_class() -> None:
    class Base:
        async def ping(self) -> None: ...

    class Both(Greeter, Base):
        async def own(self) -> None: ...

    for read in (read_handler(Both(), None), read_contract(Both, None)):
        assert {one.endpoint for one in read} == {"Both.SayHello", "Both.Ping", "Both.Own"}


def test_method_of_the_class_stands_for_the_inherited_one() -> None:
    class Louder(Greeter):
        async def say_hello(self, request: Request) -> bytes: ...  # type: ignore[override]

    (listed,) = problems(lambda: read_handler(Louder(), None))
    assert "say_hello" in listed


def test_handler_may_have_plain_methods_and_a_contract_not() -> None:
    class Plain:
        def add(self, a: int, b: int) -> int:
            return a + b

    (method,) = read_handler(Plain(), None)
    assert not method.is_async
    assert problems(lambda: read_contract(Plain, None)) == [
        "add: no RPC; write async def, or -> AsyncIterator[Message], or name it _add"
    ]


def test_handler_may_have_public_attributes_and_properties() -> None:
    class Stateful(Greeter):
        limit: int = 5
        count = 0

        @property
        def state(self) -> str:
            raise AssertionError("it is not asked")

    assert [one.attribute for one in read_handler(Stateful(), None)] == ["say_hello"]


class Bad(Protocol):
    limit: int
    count = 0  # type: ignore[misc]

    @property
    def state(self) -> str: ...

    @staticmethod
    def fixed() -> None: ...

    @classmethod
    def made(cls) -> None: ...

    def add(self, a: int) -> int: ...

    class Inner: ...

    async def good(self, request: Request) -> Response: ...


def test_everything_public_of_a_contract_that_is_no_rpc_is_named() -> None:
    listed = problems(lambda: read_contract(Bad, None))
    assert sorted(re.split("[ :]", text)[0] for text in listed) == sorted(
        ["limit", "count", "state", "fixed", "made", "add", "Inner"]
    )
    assert "limit is public and no method; begin its name with _" in listed


class GreeterProtocol(Protocol):
    async def say_hello(self, request: Request) -> Response: ...


class GreeterABC(abc.ABC):
    @abc.abstractmethod
    async def say_hello(self, request: Request) -> Response: ...


class GreeterGeneric(Greeter, Generic[T]): ...


@pytest.mark.parametrize("contract", [Greeter, GreeterProtocol, GreeterABC, GreeterGeneric])
def test_contract_may_be_a_class_a_protocol_or_an_abc(contract: type) -> None:
    (method,) = read_contract(contract, "Greeter")
    assert (method.endpoint, method.request, method.response) == (
        "Greeter.SayHello",
        Request,
        Response,
    )


def test_client_and_server_read_one_class_alike() -> None:
    served = read_handler(Greeter(), None)
    called = read_contract(Greeter, None)
    assert [one.endpoint for one in served] == [one.endpoint for one in called]
    assert [one.describe() for one in served] == [one.describe() for one in called]


@pytest.mark.parametrize(
    "read", [lambda cls: read_handler(cls(), None), lambda cls: read_contract(cls, None)]
)
def test_class_without_public_methods_is_refused(read: Callable[[type], object]) -> None:
    assert problems(lambda: read(Custom)) == ["it has no public method"]


# -- the message of a method -------------------------------------------------------------------


@pytest.mark.parametrize("shape", [Request, Response, Point, bytes])
def test_one_parameter_of_a_message_type_is_the_request(shape: Any) -> None:
    async def method(self: object, request: Any) -> Any: ...

    method.__annotations__ = {"request": shape, "return": shape}
    (read,) = handled(method=method)
    assert (read.request, read.fields) == (shape, None)


@pytest.mark.parametrize("shape", [int, str, list[Request], dict[str, int], Request | None])
def test_one_parameter_of_another_type_is_a_field(shape: Any) -> None:
    async def method(self: object, value: Any) -> None: ...

    method.__annotations__ = {"value": shape, "return": None}
    (read,) = handled(method=method)
    assert read.fields == ("value",)


def test_several_parameters_are_the_fields_of_a_request() -> None:
    async def add_to(self: object, a: int, request: Request, *, by: float = 1.5) -> int: ...

    (read,) = handled(add_to=add_to)
    assert read.fields == ("a", "request", "by")
    decoded = msgspec.json.decode(b'{"a":1,"request":{"name":"x"}}', type=read.request)
    assert (decoded.a, decoded.request, decoded.by) == (1, Request("x"), 1.5)
    assert type(decoded).__name__ == "AddToRequest"


def test_field_without_a_default_is_required_and_one_with_it_is_not() -> None:
    async def find(self: object, name: str, limit: int = 10) -> None: ...

    (read,) = handled(find=find)
    assert msgspec.json.decode(b'{"name":"x"}', type=read.request).limit == 10
    with pytest.raises(msgspec.ValidationError, match="`name`"):
        msgspec.json.decode(b'{"limit":1}', type=read.request)


def test_field_with_a_default_may_come_before_one_without() -> None:
    async def find(self: object, *, limit: int = 10, name: str) -> None: ...

    (read,) = handled(find=find)
    assert msgspec.json.decode(b'{"name":"x"}', type=read.request).limit == 10


def test_default_of_an_empty_list_is_not_shared_between_calls() -> None:
    async def find(self: object, name: str, tags: list[str] = []) -> None: ...  # noqa: B006

    (read,) = handled(find=find)
    one, other = (msgspec.json.decode(b'{"name":"x"}', type=read.request) for _ in range(2))
    assert one.tags is not other.tags


def test_method_without_parameters_takes_an_empty_message() -> None:
    async def ping(self: object) -> None: ...

    (read,) = handled(ping=ping)
    assert read.fields == ()
    assert msgspec.json.decode(b"{}", type=read.request)


def test_bytes_both_ways_travel_as_they_are() -> None:
    async def raw(self: object, data: bytes) -> bytes: ...

    (read,) = handled(raw=raw)
    assert read.content_type == "application/octet-stream"


def test_other_messages_travel_as_json() -> None:
    (read,) = read_handler(Greeter(), None)
    assert read.content_type == "application/json"


def test_protobuf_message_is_a_message() -> None:
    async def call(self: object, request: Timestamp) -> Duration: ...
    async def maybe(self: object, requests: list[Timestamp]) -> Timestamp | None: ...

    taken, listed = handled(call=call, maybe=maybe)
    assert (taken.request, taken.fields, taken.content_type) == (
        Timestamp,
        None,
        "application/protobuf",
    )
    assert (listed.fields, listed.content_type) == (("requests",), "application/json")
    described = taken.describe().request
    assert described is not None
    assert described.type == "Timestamp"


class Model(pydantic.BaseModel):
    name: str
    many: list[Model] = pydantic.Field(default=[], alias="others")
    where: pydantic.AnyUrl | None = None
    either: list[int] | set[str] = []


def test_model_of_pydantic_is_a_message() -> None:
    async def call(self: object, request: Model) -> Model: ...
    def chat(self: object, said: AsyncIterator[Model]) -> AsyncIterator[Model]: ...
    async def maybe(self: object, requests: list[Model]) -> Model | None: ...

    taken, stream, listed = handled(call=call, chat=chat, maybe=maybe)
    assert (taken.request, taken.fields, taken.content_type) == (Model, None, "application/json")
    assert (stream.kind, stream.request, stream.response) == ("bidi", Model, Model)
    assert listed.fields == ("requests",)


def test_model_of_pydantic_is_described_by_its_fields() -> None:
    told = described(Model)
    name, many, where, either = told.values
    assert either.type == "any"
    assert (told.type, name, where.type) == ("Model", Value(name="name", type="string"), "AnyUrl")
    assert (many.name, many.type, many.values[0]) == ("others", "[]Model", name)


def test_protobuf_request_with_another_response_is_refused() -> None:
    async def call(self: object, request: Timestamp) -> Response: ...

    assert problem(call) == "call: a protobuf request needs a protobuf response, or None"

    async def void(self: object, request: Timestamp) -> None: ...

    assert handled(void=void)


def test_bytes_one_way_only_are_refused() -> None:
    async def out(self: object, request: Request) -> bytes: ...
    async def into(self: object, data: bytes) -> None: ...

    for method in (out, into):
        assert problem(method) == f"{method.__name__}: bytes travel both ways or not at all"


# -- arguments of a client ---------------------------------------------------------------------


def test_arguments_are_packed_by_place_and_by_name() -> None:
    async def add(self: object, a: int, b: int = 2) -> int: ...

    (read,) = handled(add=add)
    assert read.pack((1,), {}) == {"a": 1}
    assert read.pack((1, 5), {}) == read.pack((), {"b": 5, "a": 1}) == {"a": 1, "b": 5}


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((1, 2, 3, 4), {}),
        ((1, 2, 3), {}),
        ((1, 2), {}),
        ((1, 2), {"b": 2, "c": 3}),
        ((), {"a": 1, "b": 2}),
        ((), {"a": 1, "b": 2, "c": 3, "d": 4}),
    ],
)
def test_fields_that_do_not_fit_are_a_type_error(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    async def add(self: object, a: int, b: int = 2, *, c: int) -> int: ...

    (read,) = handled(add=add)
    assert (
        read.pack((1, 2), {"c": 3}) == read.pack((1,), {"c": 3, "b": 2}) == {"a": 1, "b": 2, "c": 3}
    )
    assert read.pack((1,), {"c": 3}) == {"a": 1, "c": 3}
    with pytest.raises(TypeError):
        read.pack(args, kwargs)


def test_message_is_packed_as_itself() -> None:
    (read,) = read_handler(Greeter(), None)
    request = Request("Bob")
    assert read.pack((request,), {}) is read.pack((), {"request": request}) is request


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1, 2), {}), ((), {"other": 1})])
def test_arguments_that_do_not_fit_are_a_type_error(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    (read,) = read_handler(Greeter(), None)
    with pytest.raises(TypeError):
        read.pack(args, kwargs)


def test_default_message_is_packed_when_nothing_is_given() -> None:
    default = Request("Nobody")

    async def greet(self: object, request: Request = default) -> None: ...

    (read,) = handled(greet=greet)
    assert read.pack((), {}) is default


# -- streams -----------------------------------------------------------------------------------


class Streams:
    """Each kind of call, as a handler that is its own contract."""

    async def call(self, request: Request) -> Response:
        return Response(message=request.name)

    async def watch(self, request: Request) -> AsyncIterator[Response]:
        yield Response(message=request.name)

    async def upload(self, parts: AsyncIterator[Request]) -> Response:
        return Response(message="".join([part.name async for part in parts]))

    async def chat(self, said: AsyncIterator[Request]) -> AsyncIterator[Response]:
        async for one in said:
            yield Response(message=one.name)

    def relay(self, said: AsyncIterator[Request]) -> AsyncIterator[Response]:
        return self.chat(said)


class StreamsProtocol(Protocol):
    async def call(self, request: Request) -> Response: ...
    def watch(self, request: Request) -> AsyncIterator[Response]: ...
    async def upload(self, parts: AsyncIterator[Request]) -> Response: ...
    def chat(self, said: AsyncIterator[Request]) -> AsyncIterator[Response]: ...
    def relay(self, said: AsyncIterator[Request]) -> AsyncIterator[Response]: ...


class StreamsABC(abc.ABC):
    @abc.abstractmethod
    async def call(self, request: Request) -> Response: ...

    @abc.abstractmethod
    def watch(self, request: Request) -> AsyncIterator[Response]: ...

    @abc.abstractmethod
    async def upload(self, parts: AsyncIterator[Request]) -> Response: ...

    @abc.abstractmethod
    def chat(self, said: AsyncIterator[Request]) -> AsyncIterator[Response]: ...

    @abc.abstractmethod
    def relay(self, said: AsyncIterator[Request]) -> AsyncIterator[Response]: ...


@pytest.mark.parametrize(
    "methods",
    [
        read_handler(Streams(), None),
        read_contract(Streams, None),
        read_contract(StreamsProtocol, "Streams"),
        read_contract(StreamsABC, "Streams"),
    ],
    ids=["handler", "class", "protocol", "abc"],
)
def test_kind_of_a_call_is_read_from_its_annotations(methods: list[Method]) -> None:
    assert {one.endpoint: one.kind for one in methods} == {
        "Streams.Call": "unary",
        "Streams.Watch": "server",
        "Streams.Upload": "client",
        "Streams.Chat": "bidi",
        "Streams.Relay": "bidi",
    }
    for one in methods:
        assert (one.request, one.fields, one.response) == (Request, None, Response)
        assert one.is_async


def test_server_stream_may_take_fields() -> None:
    async def count(self: object, start: int, *, by: int = 1) -> AsyncIterator[int]:
        yield start + by

    (read,) = handled(count=count)
    assert (read.kind, read.fields, read.response) == ("server", ("start", "by"), int)


@pytest.mark.parametrize(
    "shape",
    [
        AsyncIterator[Response],
        AsyncIterable[Response],
        AsyncGenerator[Response, None],
        typing.AsyncIterator[Response],
        typing.AsyncGenerator[Response, None],
    ],
)
def test_stream_that_is_returned_has_one_of_three_forms(shape: Any) -> None:
    def watch(self: object, request: Request) -> Any: ...

    watch.__annotations__["return"] = shape
    (read,) = handled(watch=watch)
    assert (read.kind, read.response) == ("server", Response)


@pytest.mark.parametrize("shape", [AsyncIterator[Request], AsyncIterable[Request]])
def test_stream_that_is_taken_has_one_of_two_forms(shape: Any) -> None:
    async def upload(self: object, parts: Any) -> None: ...

    upload.__annotations__["parts"] = shape
    (read,) = handled(upload=upload)
    assert (read.kind, read.request) == ("client", Request)


async def takes(self: object, parts: Any) -> None: ...
def gives(self: object) -> Any: ...


@pytest.mark.parametrize(
    ("method", "name", "shape", "written"),
    [
        (takes, "parts", AsyncGenerator[Request, None], "AsyncGenerator["),
        (takes, "parts", AsyncIterator, "collections.abc.AsyncIterator"),
        (takes, "parts", AsyncIterator[None], "AsyncIterator[None]"),
        (takes, "parts", asyncio.StreamReader, "asyncio.streams.StreamReader"),
        (gives, "return", AsyncGenerator[Response, int], "int]"),
        (gives, "return", AsyncIterator, "collections.abc.AsyncIterator"),
    ],
)
def test_stream_of_another_form_is_refused_with_how_it_is_written(
    method: Handler, name: str, shape: Any, written: str
) -> None:
    copy = types.FunctionType(method.__code__, {}, method.__name__)
    copy.__annotations__ = {**method.__annotations__, name: shape}
    _, _, told = problem(copy).partition(": a stream is written AsyncIterator[Message], not ")
    assert written in told


async def awaited(self: object, request: Request) -> AsyncIterator[Response]: ...
async def yields(self: object, request: Request) -> Any:
    yield Response(message="")


yields.__annotations__["return"] = Response


async def among(self: object, name: str, parts: AsyncIterator[Request]) -> None: ...
def blocking(self: object, parts: AsyncIterator[Request]) -> None: ...
def generates(self: object, request: Request) -> Iterator[Response]: ...
async def inside(self: object, request: Request) -> list[AsyncIterator[Response]]: ...
async def nested(self: object, parts: AsyncIterator[AsyncIterator[int]]) -> None: ...
async def mixed(self: object, parts: AsyncIterator[bytes]) -> Response: ...
async def unfit(self: object, parts: AsyncIterator[Custom]) -> None: ...
def protobufs(self: object, said: AsyncIterator[Timestamp]) -> AsyncIterator[Response]: ...


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (
            awaited,
            "it gives its stream only when it is awaited; write def, or async def with yield",
        ),
        (yields, "it yields; write -> AsyncIterator[Message]"),
        (among, "a stream is the only parameter; the rest goes into its first message"),
        (blocking, "a stream is read by an async def"),
        (generates, "Iterator is no message type; a stream is AsyncIterator[Message], "),
        (inside, "AsyncIterator is no message type; a stream is AsyncIterator[Message], "),
        (nested, "AsyncIterator is no message type; a stream is AsyncIterator[Message], "),
        (mixed, "bytes travel both ways or not at all"),
        (unfit, "Custom is no message type; use a dataclass, "),
        (protobufs, "a protobuf request needs a protobuf response, or None"),
    ],
)
def test_stream_that_cannot_be_called_is_refused_with_the_reason(
    method: Handler, text: str
) -> None:
    assert problem(method).startswith(f"{method.__name__}: {text}")


def test_stream_among_the_methods_of_a_contract_is_refused_when_it_must_be_awaited() -> None:
    contract = type("Contract", (), {"awaited": awaited})
    (listed,) = problems(lambda: read_contract(contract, None))
    assert listed.startswith("awaited: it gives its stream only when it is awaited; write def")


def test_streams_of_bytes_and_of_protobuf_travel_as_they_are() -> None:
    def echo(self: object, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]: ...
    def times(self: object, said: AsyncIterator[Timestamp]) -> AsyncIterator[Duration]: ...

    raw, protobuf = handled(echo=echo, times=times)
    assert (raw.content_type, protobuf.content_type) == (
        "application/octet-stream",
        "application/protobuf",
    )


def test_stream_is_packed_as_its_iterator() -> None:
    upload = next(one for one in read_contract(Streams, None) if one.kind == "client")

    async def parts() -> AsyncIterator[Request]:
        yield Request("a")

    stream = parts()
    assert upload.pack((stream,), {}) is upload.pack((), {"parts": stream}) is stream


def test_what_is_no_stream_cannot_be_packed_as_one() -> None:
    upload = next(one for one in read_contract(Streams, None) if one.kind == "client")
    with pytest.raises(TypeError, match="list"):
        upload.pack(([Request("a")],), {})


def test_registry_is_told_of_streams_as_by_go_micro_and_of_what_may_be_repeated() -> None:
    class Marked(Streams):
        @micro.endpoint(idempotent=True)
        async def get(self, request: Request) -> Response: ...

    told = {one.endpoint: one.describe() for one in read_handler(Marked(), None)}
    assert {name.partition(".")[2]: one.metadata for name, one in told.items()} == {
        "Call": {},
        "Watch": {"stream": "true"},
        "Upload": {"stream": "true"},
        "Chat": {"stream": "true"},
        "Relay": {"stream": "true"},
        "Get": {"idempotent": "true"},
    }
    watch = told["Marked.Watch"]
    assert (watch.request, watch.response) == (told["Marked.Call"].request, described(Response))


# -- what a handler cannot be ------------------------------------------------------------------


def test_handler_without_annotations_gets_all_its_problems_at_once() -> None:
    class Untyped:
        async def one(self, a, b): ...  # type: ignore[no-untyped-def]

        async def two(self, request: Request): ...  # type: ignore[no-untyped-def]

        def three(self, *args: int, **kwargs: int) -> None: ...

        async def four(self, a: int, /) -> None: ...

        async def five(self, request: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821

        async def six(self, request: Request) -> Custom: ...

    assert problems(lambda: read_handler(Untyped(), None)) == [
        "one: parameter 'a' has no annotation",
        "one: parameter 'b' has no annotation",
        "one: no return annotation; write -> Response, or -> None",
        "two: no return annotation; write -> Response, or -> None",
        "three: *args: 'int' has no fixed fields; name each parameter",
        "three: **kwargs: 'int' has no fixed fields; name each parameter",
        "four: a is positional-only; fields have names",
        "five: an annotation cannot be resolved: name 'Nowhere' is not defined",
        (
            "six: Custom is no message type; "
            "use a dataclass, a msgspec.Struct, a TypedDict or plain parameters"
        ),
    ]


def test_refusal_names_the_class() -> None:
    with pytest.raises(ConfigError, match=r"^handler Custom cannot be used:"):
        read_handler(Custom(), None)
    with pytest.raises(ConfigError, match=r"^contract Custom cannot be used:"):
        read_contract(Custom, None)


async def custom_field(self: object, a: int, b: Custom) -> None: ...
async def custom_in_message(self: object, request: Holds) -> None: ...
async def custom_deep(self: object, request: Nested) -> None: ...
async def custom_in_list(self: object, request: Request) -> list[Custom]: ...
async def custom_in_optional(self: object, a: int, b: Custom | None = None) -> None: ...
async def custom_in_values(self: object, a: dict[str, Custom]) -> None: ...


@pytest.mark.parametrize(
    "method",
    [
        custom_field,
        custom_in_message,
        custom_deep,
        custom_in_list,
        custom_in_optional,
        custom_in_values,
    ],
)
def test_type_that_no_message_can_hold_is_refused_wherever_it_stands(method: Handler) -> None:
    listed = problem(method)
    assert listed.startswith(f"{method.__name__}: ")
    assert "Custom" in listed


async def union(self: object, request: Request | Holds) -> None: ...
async def full_default(self: object, a: int, b: list[int] = [1]) -> None: ...  # noqa: B006


@pytest.mark.parametrize("method", [union, full_default])
def test_method_that_has_no_message_is_one_problem_among_the_others(method: Handler) -> None:
    async def also(self: object, request: Request) -> Custom: ...

    listed = problems(lambda: handled(**{method.__name__: method}, also=also))
    assert [text.partition(":")[0] for text in listed] == [method.__name__, "also"]


def test_whatever_an_annotation_raises_is_listed() -> None:
    async def method(self: object, a: int) -> None: ...

    method.__annotations__["a"] = "1 / 0"
    assert "division by zero" in problem(method)


# -- what the registry is told -----------------------------------------------------------------


@dataclass
class Leaf:
    number: int


@dataclass
class Middle:
    leaf: Leaf
    leaves: list[Leaf] | None


@dataclass
class Top:
    middle: Middle


@dataclass
class Root:
    top: Top


@dataclass
class Every:
    any: Any
    boolean: bool
    integer: int
    decimal: float
    text: str
    raw: bytes
    texts: list[str]
    by_name: dict[str, int]
    maybe: int | None
    message: Leaf
    colour: Colour
    moment: datetime
    either: int | str


def described(shape: Any) -> Value:
    """What the registry is told of a message."""

    async def method(self: object, request: Any) -> None: ...

    method.__annotations__ = {"request": shape, "return": None}
    (read,) = handled(method=method)
    request = read.describe().request
    assert request is not None
    return request


def test_endpoint_is_described_by_name_and_messages() -> None:
    (read,) = read_handler(Greeter(), None)
    assert read.describe() == Endpoint(
        name="Greeter.SayHello",
        request=Value(name="Request", type="Request", values=(Value(name="name", type="string"),)),
        response=Value(
            name="Response", type="Response", values=(Value(name="message", type="string"),)
        ),
        metadata={"description": "Greet a person."},
    )


def test_description_has_the_type_names_of_go() -> None:
    types = {value.name: value.type for value in described(Every).values}
    assert types == {
        "any": "any",
        "boolean": "bool",
        "integer": "int64",
        "decimal": "float64",
        "text": "string",
        "raw": "bytes",
        "texts": "[]string",
        "by_name": "map[string]int64",
        "maybe": "int64",
        "message": "Leaf",
        "colour": "Colour",
        "moment": "datetime",
        "either": "int64|string",
    }


def test_messages_are_described_to_the_third_level() -> None:
    (top,) = described(Root).values
    (middle,) = top.values
    leaf, leaves = middle.values
    assert (top.type, middle.type, leaf.type, leaves.type) == ("Top", "Middle", "Leaf", "[]Leaf")
    assert leaf.values == leaves.values == ()


def test_messages_inside_lists_and_optionals_are_described() -> None:
    leaf, leaves = described(Middle).values
    assert leaf.values == leaves.values == (Value(name="number", type="int64"),)


def test_message_that_holds_itself_is_described_to_the_third_level() -> None:
    (first,) = described(Tree).values
    (second,) = first.values
    (third,) = second.values
    assert (third.type, third.values) == ("[]Tree", ())


@dataclass
class Tree:
    trees: list[Tree] = field(default_factory=list)


def test_field_is_described_by_its_name_on_the_wire() -> None:
    class Renamed(msgspec.Struct, rename="camel"):
        first_name: str

    assert [value.name for value in described(Renamed).values] == ["firstName"]


def test_method_without_a_docstring_has_no_description() -> None:
    async def ping(self: object) -> None: ...

    (read,) = handled(ping=ping)
    assert read.describe().metadata == {}
    assert read.describe().response == Value(name="nil", type="nil")


# -- together ----------------------------------------------------------------------------------


class Calculator:
    async def add(self, a: int, b: int = 10) -> int:
        return a + b

    def multiply(self, a: int, b: int) -> int:
        return a * b

    async def reverse(self, data: bytes) -> bytes:
        return data[::-1]

    async def nothing(self) -> None: ...

    @micro.endpoint(name="Maths.GetPI")
    async def pi(self) -> float:
        return 3.14


class CalculatorContract(Protocol):
    async def add(self, a: int, b: int = 10) -> int: ...
    async def multiply(self, a: int, b: int) -> int: ...
    async def reverse(self, data: bytes) -> bytes: ...
    async def nothing(self) -> None: ...
    @micro.endpoint(name="Maths.GetPI")
    async def pi(self) -> float: ...


@pytest.mark.asyncio
async def test_contract_calls_what_the_handler_serves() -> None:
    service = micro.Service("calculator", registry="memory", transport="memory")
    service.handle(Calculator(), name="Calc")
    async with service.opened(Settings(environment={})):
        client = service.client("calculator", CalculatorContract, name="Calc")
        assert await client.add(1) == 11
        assert await client.add(1, b=2) == 3
        assert await client.multiply(3, 4) == 12
        assert await client.reverse(b"\x00\xff") == b"\xff\x00"
        await client.nothing()
        assert await client.pi() == 3.14
        assert await service.call("calculator", "Calc.Nothing") == {}


def test_decorated_method_with_wraps_is_read_as_the_method_inside() -> None:
    def decorated(function: Handler) -> Handler:
        @functools.wraps(function)
        async def run(*args: Any, **kwargs: Any) -> Any:
            return await function(*args, **kwargs)

        return run

    class Decorated:
        @decorated
        async def say_hello(self, request: Request) -> Response: ...

    (method,) = read_handler(Decorated(), None)
    assert (method.endpoint, method.request) == ("Decorated.SayHello", Request)
    assert method.is_async
