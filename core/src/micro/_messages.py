"""Types of messages: which can be one, and what the registry is told of them."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterator
from typing import Any, is_typeddict

import msgspec

from micro.codec import is_protobuf, is_pydantic
from micro.registry import Value

#: How deep the fields of messages are described, as in Go Micro.
_DEPTH = 3
_INNER = ("item_type", "key_type", "value_type")
_GO_TYPES = {
    "AnyType": "any",
    "NoneType": "nil",
    "BoolType": "bool",
    "IntType": "int64",
    "FloatType": "float64",
    "StrType": "string",
    "BytesType": "bytes",
}


def is_message(shape: Any) -> bool:
    """Whether it is a message by itself; everything else can only be a field of one."""
    if shape is bytes or _is_foreign(shape):
        return True
    struct = isinstance(shape, type) and issubclass(shape, msgspec.Struct)
    return struct or hasattr(shape, "__dataclass_fields__") or is_typeddict(shape)


def unusable(shape: Any) -> list[str]:
    """Why nothing of this type can travel; empty when it can."""
    from msgspec.inspect import type_info

    try:
        custom = _custom(type_info(shape), set())
    except TypeError as exc:
        return [str(exc)]
    return [_advice(cls) for cls in sorted(custom, key=lambda cls: cls.__qualname__)]


def describe(shape: Any) -> Value:
    """What the registry is told of a message: names and types of its fields, as Go names them."""
    from msgspec.inspect import type_info

    told = type_info(shape)
    name = _type_name(told)
    return Value(name=name, type=name, values=_fields(told, _DEPTH))


def _is_foreign(shape: Any) -> bool:
    """Whether our codecs know it although msgspec does not."""
    return is_protobuf(shape) or is_pydantic(shape)


def _custom(told: Any, seen: set[int]) -> set[type]:
    """All types, however deep inside, that no message can hold."""
    if id(told) in seen:
        return set()
    seen.add(id(told))
    if type(told).__name__ == "CustomType":
        return set() if _is_foreign(told.cls) else {told.cls}
    inner = [field.type for field in getattr(told, "fields", ())]
    inner += [getattr(told, name) for name in _INNER if hasattr(told, name)]
    for name in ("types", "item_types"):
        inner += getattr(told, name, ())
    return set().union(*(_custom(one, seen) for one in inner))


def _advice(cls: type) -> str:
    hint = "use a dataclass, a msgspec.Struct, a TypedDict or plain parameters"
    if issubclass(cls, Iterator | AsyncIterable):
        hint = "a stream is AsyncIterator[Message], as the only parameter or as what is returned"
    return f"{cls.__qualname__} is no message type; {hint}"


def _fields(told: Any, depth: int) -> tuple[Value, ...]:
    if not depth:
        return ()
    return tuple(
        Value(name=name, type=_type_name(inner), values=_fields(inner, depth - 1))
        for name, inner in _named(_inner(told))
    )


def _named(told: Any) -> Iterator[tuple[str, Any]]:
    """The fields of a message, by their names on the wire."""
    if is_pydantic(getattr(told, "cls", None)):
        yield from _fields_of_model(told.cls)
    else:
        for field in getattr(told, "fields", ()):
            yield field.encode_name, field.type


def _fields_of_model(model: Any) -> Iterator[tuple[str, Any]]:
    from msgspec.inspect import type_info

    for name, field in model.model_fields.items():
        try:
            told = type_info(field.annotation)
        except TypeError:  # pydantic has types that msgspec has not
            told = type_info(Any)
        yield field.alias or name, told


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
