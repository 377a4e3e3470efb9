"""Contracts: the public methods of a class, read as the endpoints of a service.

Client and server read them alike, so that one class can be shared by both sides.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterator
from types import NoneType
from typing import Any, Generic, Protocol, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from micro._messages import describe, is_message, unusable
from micro.call import Kind
from micro.codec import is_protobuf
from micro.errors import ConfigError
from micro.registry import Endpoint

T = TypeVar("T", bound=Callable[..., Any])

#: Handler.Method
ENDPOINT = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w*", re.ASCII)
_NOT_CONTRACT = (object, Protocol, Generic)
#: By whether the request is a stream, and whether the response is.
_KINDS: dict[tuple[bool, bool], Kind] = {
    (False, False): "unary",
    (False, True): "server",
    (True, False): "client",
    (True, True): "bidi",
}
#: How a stream is written as a parameter, and as what is returned.
_TAKEN = (AsyncIterator, AsyncIterable)
_GIVEN = (*_TAKEN, AsyncGenerator)
_NONE = (None, NoneType)


def content_type_of(shape: Any) -> str:
    """What messages of this type travel as by themselves."""
    if isinstance(shape, type) and issubclass(shape, bytes):
        return "application/octet-stream"
    return "application/protobuf" if is_protobuf(shape) else "application/json"


class _Marks(msgspec.Struct, frozen=True):
    """What ``endpoint`` says of a method."""

    name: str | None = None
    idempotent: bool = False
    timeout: float | None = None


def endpoint(
    name: str | None = None, *, idempotent: bool = False, timeout: float | None = None
) -> Callable[[T], T]:
    """Say more of a method: ``@micro.endpoint(name="Greeter.GetURL", timeout=2)``.

    ``name`` is the endpoint's; ``timeout``, in seconds, is what its calls have when they say
    nothing; an ``idempotent`` one may be executed twice without harm.

    Raises:
        ConfigError: the name is not ``Handler.Method``, or the timeout is not more than 0.
    """
    if name is not None and not ENDPOINT.fullmatch(str(name)):
        raise ConfigError(f"endpoint name {name!r}: write Handler.Method, with one dot")
    if timeout is not None and not 0 < timeout < float("inf"):
        raise ConfigError(f"endpoint timeout {timeout!r}: write seconds, more than 0")
    marks = _Marks(name, idempotent, timeout)

    def mark(function: T) -> T:
        function.__micro_endpoint__ = marks  # type: ignore[attr-defined]
        return function

    return mark


class Method(msgspec.Struct, frozen=True, kw_only=True):
    """One method as an endpoint.

    ``request`` and ``response`` are the types of its messages, of a stream those of each. A request
    is the one message parameter, or a Struct of all parameters, whose names are then in ``fields``.
    The first ``places`` parameters may be given without their names. ``is_async`` is False for a
    plain function, which needs a thread.
    """

    attribute: str
    endpoint: str
    kind: Kind
    signature: inspect.Signature
    request: Any
    fields: tuple[str, ...] | None
    places: int
    response: Any
    is_async: bool
    idempotent: bool
    timeout: float | None
    doc: str

    def pack(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The request of a call with these arguments: its message, or the stream of messages.

        Raises:
            TypeError: they do not fit the method.
        """
        if self.fields is not None:
            count = len(args)
            if count <= self.places and kwargs.keys() == set(self.fields[count:]):
                return {**dict(zip(self.fields, args, strict=False)), **kwargs}
            return self.signature.bind(*args, **kwargs).arguments
        if len(args) == 1 and not kwargs:
            request = args[0]
        else:
            bound = self.signature.bind(*args, **kwargs)
            bound.apply_defaults()
            (request,) = bound.arguments.values()
        return aiter(request) if self.kind in ("client", "bidi") else request

    @property
    def content_type(self) -> str:
        """What its messages travel as: bytes and protobuf as they are, everything else as JSON."""
        return content_type_of(self.request)

    def describe(self) -> Endpoint:
        """What the registry tells of it; a stream is marked as Go Micro marks it."""
        metadata = {
            "description": self.doc,
            "stream": "" if self.kind == "unary" else "true",
            "idempotent": "true" if self.idempotent else "",
        }
        return Endpoint(
            name=self.endpoint,
            request=describe(self.request),
            response=describe(self.response),
            metadata={name: value for name, value in metadata.items() if value},
        )


def read_contract(contract: type, name: str | None) -> list[Method]:
    """The methods of what a client calls: every public name must be an RPC.

    Raises:
        ConfigError: something public is not; the text lists every problem at once.
    """
    problems: list[str] = []
    methods: list[Method] = []
    for attribute, value in _public(contract):
        if not inspect.isfunction(value):
            problems.append(f"{attribute} is public and no method; begin its name with _")
        else:
            methods += _method(attribute, value, name or contract.__name__, problems, called=True)
    return _checked(methods, problems, f"contract {contract.__qualname__}")


def read_handler(handler: object, name: str | None) -> list[Method]:
    """The methods of what a server runs: every public method, ``async def`` or ``def``.

    Raises:
        ConfigError: a method cannot be an endpoint; the text lists every problem at once.
    """
    problems: list[str] = []
    methods: list[Method] = []
    owner = name or type(handler).__name__
    for attribute, value in _public(type(handler)):
        if inspect.isfunction(value):
            methods += _method(attribute, value, owner, problems, called=False)
    return _checked(methods, problems, f"handler {type(handler).__qualname__}")


def _checked(methods: list[Method], problems: list[str], what: str) -> list[Method]:
    names = [method.endpoint for method in methods]
    problems += [f"two methods are {twice}" for twice in {n for n in names if names.count(n) > 1}]
    if not methods and not problems:
        problems.append("it has no public method")
    if problems:
        raise ConfigError("\n  - ".join([f"{what} cannot be used:", *problems]))
    return methods


def _public(contract: type) -> list[tuple[str, Any]]:
    found: dict[str, Any] = {}
    for cls in reversed(contract.__mro__):
        if cls not in _NOT_CONTRACT and cls.__module__ != "abc":
            found |= dict.fromkeys(inspect.get_annotations(cls))
            found |= vars(cls)
    return [(name, value) for name, value in found.items() if not name.startswith("_")]


class _Problems(Exception):
    """Why a method cannot be an endpoint: one text or several."""


def _method(
    where: str, function: Callable[..., Any], owner: str, problems: list[str], *, called: bool
) -> list[Method]:
    """The method as an endpoint; nothing, and the problems told, when it cannot be one.

    ``called`` says that a client reads it.
    """
    try:
        return [_read(where, function, owner, called=called)]
    except _Problems as exc:
        problems += [f"{where}: {problem}" for problem in exc.args]
        return []


def _read(where: str, function: Callable[..., Any], owner: str, *, called: bool) -> Method:
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[1:]
    hints = _hints(function, parameters)
    request, fields = _request(where, parameters, hints)
    response = hints["return"]
    kind = _KINDS[_is_stream(request), _is_stream(response)]
    request, response = _item(request), _item(response)
    _refuse([*_misformed(where, function, kind, called=called), *_unfit(request, response)])
    marks = getattr(function, "__micro_endpoint__", _Marks())
    return Method(
        attribute=where,
        endpoint=marks.name or f"{owner}.{_camel(where)}",
        kind=kind,
        signature=signature.replace(parameters=parameters),
        request=request,
        fields=fields,
        places=sum(one.kind is one.POSITIONAL_OR_KEYWORD for one in parameters),
        response=response,
        is_async=kind in ("server", "bidi") or inspect.iscoroutinefunction(function),
        idempotent=marks.idempotent,
        timeout=marks.timeout,
        doc=(inspect.getdoc(function) or "").partition("\n")[0],
    )


def _refuse(problems: list[str]) -> None:
    if problems:
        raise _Problems(*problems)


def _hints(function: Callable[..., Any], parameters: list[inspect.Parameter]) -> dict[str, Any]:
    """The annotations; each parameter and the result have one that can be read."""
    try:
        hints = get_type_hints(function)
    except Exception as exc:  # whatever an annotation raises, the user must see it with the others
        raise _Problems(f"an annotation cannot be resolved: {exc}") from exc
    problems = [text for parameter in parameters for text in _unnamed(parameter, hints)]
    if "return" not in hints:
        problems.append("no return annotation; write -> Response, or -> None")
    for name, shape in hints.items():
        problems += _miswritten(shape, _GIVEN if name == "return" else _TAKEN)
    _refuse(problems)
    return hints


def _unnamed(parameter: inspect.Parameter, hints: dict[str, Any]) -> Iterator[str]:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        yield f"{parameter} has no fixed fields; name each parameter"
    elif parameter.kind is parameter.POSITIONAL_ONLY:
        yield f"{parameter.name} is positional-only; fields have names"
    elif parameter.name not in hints:
        yield f"parameter {parameter.name!r} has no annotation"


def _miswritten(shape: Any, forms: tuple[type, ...]) -> Iterator[str]:
    if not _is_stream(shape):
        return
    # What a generator could be sent has no way to it over a wire.
    item, *sent = get_args(shape) or (None,)
    if get_origin(shape) not in forms or item in _NONE or any(one not in _NONE for one in sent):
        written = inspect.formatannotation(shape)
        yield f"a stream is written AsyncIterator[Message], not {written}"


def _request(
    where: str, parameters: list[inspect.Parameter], hints: dict[str, Any]
) -> tuple[Any, tuple[str, ...] | None]:
    """The type of the request and, when it is made of all parameters, their names."""
    shapes = [hints[parameter.name] for parameter in parameters]
    if len(shapes) == 1 and (is_message(shapes[0]) or _is_stream(shapes[0])):
        return shapes[0], None
    if any(map(_is_stream, shapes)):
        raise _Problems("a stream is the only parameter; the rest goes into its first message")
    fields = [
        (parameter.name, hints[parameter.name])
        if parameter.default is parameter.empty
        else (parameter.name, hints[parameter.name], parameter.default)
        for parameter in parameters
    ]
    try:
        struct = msgspec.defstruct(_camel(where) + "Request", fields, kw_only=True)
    except (TypeError, ValueError) as exc:
        raise _Problems(f"its parameters make no message: {exc}") from exc
    return struct, tuple(parameter.name for parameter in parameters)


def _item(shape: Any) -> Any:
    """The type of one message."""
    return get_args(shape)[0] if _is_stream(shape) else shape


def _is_stream(shape: Any) -> bool:
    origin = get_origin(shape) or shape
    return isinstance(origin, type) and issubclass(origin, AsyncIterable) and not is_message(shape)


def _misformed(
    where: str, function: Callable[..., Any], kind: Kind, *, called: bool
) -> Iterator[str]:
    """What of the function does not go with its kind of call."""
    is_awaited = inspect.iscoroutinefunction(function)
    if kind in ("server", "bidi"):
        if is_awaited:
            yield "it gives its stream only when it is awaited; write def, or async def with yield"
    elif inspect.isasyncgenfunction(function):
        yield "it yields; write -> AsyncIterator[Message]"
    elif not is_awaited and called:
        yield f"no RPC; write async def, or -> AsyncIterator[Message], or name it _{where}"
    elif not is_awaited and kind == "client":
        yield "a stream is read by an async def"


def _unfit(request: Any, response: Any) -> Iterator[str]:
    """Why messages of these types cannot travel, one way each."""
    yield from unusable(request)
    yield from unusable(response)
    if (request is bytes) != (response is bytes):
        yield "bytes travel both ways or not at all"
    if is_protobuf(request) and not (is_protobuf(response) or response is NoneType):
        yield "a protobuf request needs a protobuf response, or None"


def _camel(name: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))
