"""Contracts: the public methods of a class, read as the endpoints of a service.

Client and server read them alike, so that one class can be shared by both sides.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, Protocol, TypeVar, get_origin, get_type_hints, is_typeddict

import msgspec

from micro.codec import is_protobuf
from micro.errors import ConfigError
from micro.registry import Endpoint, Value

T = TypeVar("T", bound=Callable[..., Any])

#: Handler.Method
ENDPOINT = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w*", re.ASCII)
_NOT_CONTRACT = (object, Protocol, Generic)
#: How deep the fields of messages are described, as in Go Micro.
_DEPTH = 3
_INNER = ("item_type", "key_type", "value_type")


def content_type_of(shape: Any) -> str:
    """What messages of this type travel as by themselves."""
    if isinstance(shape, type) and issubclass(shape, bytes):
        return "application/octet-stream"
    return "application/protobuf" if is_protobuf(shape) else "application/json"


def endpoint(*, name: str) -> Callable[[T], T]:
    """Give a method an endpoint name of its own: ``@micro.endpoint(name="Greeter.GetURL")``.

    Raises:
        ConfigError: the name is not ``Handler.Method``.
    """
    if not ENDPOINT.fullmatch(name):
        raise ConfigError(f"endpoint name {name!r}: write Handler.Method, with one dot")

    def mark(function: T) -> T:
        function.__micro_endpoint__ = name  # type: ignore[attr-defined]
        return function

    return mark


class Method(msgspec.Struct, frozen=True, kw_only=True):
    """One method as an endpoint.

    ``request`` is the type of its message: that of its one message parameter, or a Struct of all
    its parameters, whose names are then in ``fields``.
    """

    attribute: str
    endpoint: str
    signature: inspect.Signature
    request: Any
    fields: tuple[str, ...] | None
    response: Any
    is_async: bool
    doc: str

    def pack(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The request message of a call with these arguments.

        Raises:
            TypeError: they do not fit the method.
        """
        if self.fields is None and len(args) == 1 and not kwargs:
            return args[0]
        bound = self.signature.bind(*args, **kwargs)
        if self.fields is None:
            return next(iter(bound.arguments.values()))
        return bound.arguments

    @property
    def content_type(self) -> str:
        """What its messages travel as: bytes and protobuf as they are, everything else as JSON."""
        return content_type_of(self.request)

    def describe(self) -> Endpoint:
        """What the registry tells of it."""
        return Endpoint(
            name=self.endpoint,
            request=_describe(self.request),
            response=_describe(self.response),
            metadata={"description": self.doc} if self.doc else {},
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
        elif not inspect.iscoroutinefunction(value) and not _streams(value):
            problems.append(f"{attribute} is public and no RPC: write async def, or _{attribute}")
        else:
            methods += _method(attribute, value, name or contract.__name__, problems)
    return _checked(methods, problems, f"contract {contract.__qualname__}")


def read_handler(handler: object, name: str | None) -> list[Method]:
    """The methods of what a server runs: every public method, ``async def`` or ``def``.

    Raises:
        ConfigError: a method cannot be an endpoint; the text lists every problem at once.
    """
    problems: list[str] = []
    methods: list[Method] = []
    for attribute, value in _public(type(handler)):
        if inspect.isfunction(value):
            methods += _method(attribute, value, name or type(handler).__name__, problems)
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


def _method(
    where: str, function: Callable[..., Any], owner: str, problems: list[str]
) -> list[Method]:
    """The method as an endpoint; nothing, and the problems told, when it cannot be one."""
    before = len(problems)
    try:
        hints = get_type_hints(function)
    except Exception as exc:  # whatever an annotation raises, the user must see it with the others
        problems.append(f"{where}: an annotation cannot be resolved: {exc}")
        return []
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[1:]
    for parameter in parameters:
        _check_parameter(parameter, hints, where, problems)
    if "return" not in hints:
        problems.append(f"{where}: no return annotation; write -> Response, or -> None")
    if len(problems) > before:
        return []
    try:
        request, fields = _request(where, parameters, hints)
    except (TypeError, ValueError) as exc:
        problems.append(f"{where}: its parameters make no message: {exc}")
        return []
    response = hints["return"]
    for shape in (request, response):
        problems += [f"{where}: {problem}" for problem in _unusable(shape)]
    if (request is bytes) != (response is bytes):
        problems.append(f"{where}: bytes travel both ways or not at all")
    if is_protobuf(request) and not (is_protobuf(response) or response is type(None)):
        problems.append(f"{where}: a protobuf request needs a protobuf response, or None")
    return [
        Method(
            attribute=where,
            endpoint=getattr(function, "__micro_endpoint__", f"{owner}.{_camel(where)}"),
            signature=signature.replace(parameters=parameters),
            request=request,
            fields=fields,
            response=response,
            is_async=inspect.iscoroutinefunction(function),
            doc=(inspect.getdoc(function) or "").partition("\n")[0],
        )
    ]


def _check_parameter(
    parameter: inspect.Parameter, hints: dict[str, Any], where: str, problems: list[str]
) -> None:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        problems.append(f"{where}: {parameter} has no fixed fields; name each parameter")
    elif parameter.kind is parameter.POSITIONAL_ONLY:
        problems.append(f"{where}: {parameter.name} is positional-only; fields have names")
    elif parameter.name not in hints:
        problems.append(f"{where}: parameter {parameter.name!r} has no annotation")


def _request(
    where: str, parameters: list[inspect.Parameter], hints: dict[str, Any]
) -> tuple[Any, tuple[str, ...] | None]:
    """The type of the request and, when it is made of all parameters, their names."""
    shapes = [hints[parameter.name] for parameter in parameters]
    if len(shapes) == 1 and (_is_message(shapes[0]) or _is_stream(shapes[0])):
        return shapes[0], None
    fields = [
        (parameter.name, hints[parameter.name])
        if parameter.default is parameter.empty
        else (parameter.name, hints[parameter.name], parameter.default)
        for parameter in parameters
    ]
    struct = msgspec.defstruct(_camel(where) + "Request", fields, kw_only=True)
    return struct, tuple(parameter.name for parameter in parameters)


def _is_message(shape: Any) -> bool:
    if shape is bytes or is_protobuf(shape):
        return True
    struct = isinstance(shape, type) and issubclass(shape, msgspec.Struct)
    return struct or hasattr(shape, "__dataclass_fields__") or is_typeddict(shape)


def _is_stream(shape: Any) -> bool:
    origin = get_origin(shape) or shape
    return isinstance(origin, type) and issubclass(origin, AsyncIterator)


def _streams(function: Callable[..., Any]) -> bool:
    return "AsyncIterator" in str(function.__annotations__.get("return", ""))


def _unusable(shape: Any) -> list[str]:
    """Why no message can have this type."""
    if _is_stream(shape):
        return ["streams (AsyncIterator) are not supported yet by this version"]
    from msgspec.inspect import type_info

    try:
        told = type_info(shape)
    except TypeError as exc:
        return [str(exc)]
    hint = "use a dataclass, a msgspec.Struct, a TypedDict or plain parameters"
    return [f"{name} is no message type; {hint}" for name in sorted(_custom(told, set()))]


def _custom(told: Any, seen: set[int]) -> set[str]:
    """The names of all types, however deep inside, that no message can hold."""
    if id(told) in seen:
        return set()
    seen.add(id(told))
    if type(told).__name__ == "CustomType":
        return set() if is_protobuf(told.cls) else {told.cls.__qualname__}
    inner = [field.type for field in getattr(told, "fields", ())]
    inner += [getattr(told, name) for name in _INNER if hasattr(told, name)]
    for name in ("types", "item_types"):
        inner += getattr(told, name, ())
    return set().union(*(_custom(one, seen) for one in inner))


def _camel(name: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))


# -- what the registry tells -------------------------------------------------------------------

_GO_TYPES = {
    "AnyType": "any",
    "NoneType": "nil",
    "BoolType": "bool",
    "IntType": "int64",
    "FloatType": "float64",
    "StrType": "string",
    "BytesType": "bytes",
}


def _describe(shape: Any) -> Value:
    from msgspec.inspect import type_info

    told = type_info(shape)
    name = _type_name(told)
    return Value(name=name, type=name, values=_fields(told, _DEPTH))


def _fields(told: Any, depth: int) -> tuple[Value, ...]:
    inner = _inner(told)
    if not depth:
        return ()
    return tuple(
        Value(
            name=field.encode_name,
            type=_type_name(field.type),
            values=_fields(field.type, depth - 1),
        )
        for field in getattr(inner, "fields", ())
    )


def _inner(told: Any) -> Any:
    """The one type inside of a list or of an optional."""
    if hasattr(told, "item_type"):
        return _inner(told.item_type)
    if type(told).__name__ == "UnionType":
        rest = [kind for kind in told.types if type(kind).__name__ != "NoneType"]
        return _inner(rest[0]) if len(rest) == 1 else told
    return told


def _type_name(told: Any) -> str:
    kind = type(told).__name__
    if hasattr(told, "item_type"):
        return f"[]{_type_name(told.item_type)}"
    if kind == "UnionType":
        rest = [one for one in told.types if type(one).__name__ != "NoneType"]
        return "|".join(_type_name(one) for one in rest)
    if kind == "DictType":
        return f"map[{_type_name(told.key_type)}]{_type_name(told.value_type)}"
    if hasattr(told, "cls"):
        return str(told.cls.__name__)
    return _GO_TYPES.get(kind, kind.removesuffix("Type").lower())
