"""What the type of messages says of all of them, so that it need not be looked for in each."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple, TypeAlias

from micro.codec._base import MAX_DEPTH

Count: TypeAlias = Callable[[Any], int]
Read: TypeAlias = Callable[[Any], "Shape"]
#: What a class may do with its fields once they are there.
_AFTERWARDS = ("__post_init__", "__attrs_post_init__", "__attrs_pre_init__")


class Shape(NamedTuple):
    """Of each message of a type, once it has been decoded.

    ``names`` of it, and those that ``more`` finds in its lists and maps, have been there for sure:
    fields without a default, and the entries of maps. There may have been others.
    """

    names: int = 0
    more: Count | None = None
    #: How many levels it has at most; more than the limit where the type sets none.
    depth: int = 0
    #: Whether it may hold numbers; whether timestamps.
    numbers: bool = False
    times: bool = False
    #: Only what has a name may be passed over unread.
    closed: bool = True
    #: It usually has no other names, and no colon in what it holds.
    exact: bool = True

    @property
    def is_bound(self) -> bool:
        """Whether no message can have too many levels."""
        return self.depth <= MAX_DEPTH

    @property
    def is_flat(self) -> bool:
        """One object, and nothing in it that has an inside."""
        return self.names > 0 and self.depth == 1


_ANY = Shape(depth=MAX_DEPTH + 1, numbers=True, times=True, exact=False)
#: Raw, what goes to hooks of ours, and arrays that may be longer than their type says.
_OPAQUE = _ANY._replace(closed=False)


def shape_of(message: Any) -> Shape:
    """What a type that msgspec can decode says of its messages."""
    if message is Any:
        return _ANY
    from msgspec.inspect import type_info

    return _read(type_info(message), ())


def _read(told: Any, above: tuple[Any, ...]) -> Shape:
    kind = type(told).__name__
    if kind in _SIMPLE:
        return _SIMPLE[kind]
    if any(told is one for one in above):
        return _ANY  # it may hold itself
    read = _INSIDE.get(kind)
    return read(told, lambda inner: _read(inner, (*above, told))) if read else _OPAQUE


def _around(*inner: Shape) -> Shape:
    """What has these inside; no name of theirs is counted."""
    return Shape(
        depth=1 + max((one.depth for one in inner), default=0),
        numbers=any(one.numbers for one in inner),
        times=any(one.times for one in inner),
        closed=all(one.closed for one in inner),
        exact=all(one.exact for one in inner),
    )


def _list(told: Any, read: Read) -> Shape:
    one = read(told.item_type)
    return _around(one)._replace(more=_of_each(one.names, one.more))


def _map(told: Any, read: Read) -> Shape:
    one = read(told.value_type)
    names, more = 1 + one.names, one.more

    def count(value: Any) -> int:
        return names * len(value) + (sum(map(more, value.values())) if more else 0)

    return _around(read(told.key_type), one)._replace(more=count)


def _tuple(told: Any, read: Read) -> Shape:
    return _around(*map(read, told.item_types))


def _object(told: Any, read: Read) -> Shape:
    if getattr(told, "array_like", False):
        return _OPAQUE
    fields = [(field, read(field.type)) for field in told.fields]
    required = [(field.name, inner) for field, inner in fields if field.required]
    others = len(required) < len(fields) or bool(getattr(told, "tag_field", None))
    around = _around(*(inner for _, inner in fields))
    shape = around._replace(names=len(required), exact=around.exact and not others)
    if any(hasattr(told.cls, name) for name in _AFTERWARDS):
        return shape._replace(exact=False)  # it may have put others in the place of its values
    getter = itemgetter if type(told).__name__ == "TypedDictType" else attrgetter
    return shape._replace(
        names=shape.names + sum(inner.names for _, inner in required),
        more=_of_all([(getter(name), inner.more) for name, inner in required if inner.more]),
    )


def _union(told: Any, read: Read) -> Shape:
    inner = [read(one) for one in told.types if type(one).__name__ != "NoneType"]
    around = _around(*inner)
    shape = around._replace(depth=around.depth - 1)
    if not any(one.names or one.more for one in inner):
        return shape
    if len(inner) > 1:
        return shape._replace(exact=False)  # which it is would have to be found out
    count = _of_each(inner[0].names, inner[0].more)
    return shape._replace(more=lambda value: 0 if value is None or not count else count((value,)))


def _of_each(names: int, more: Count | None) -> Count | None:
    if more:
        return lambda values: names * len(values) + sum(map(more, values))
    return (lambda values: names * len(values)) if names else None


def _of_all(parts: list[tuple[Callable[[Any], Any], Count]]) -> Count | None:
    def count(value: Any) -> int:
        found = 0
        for get, more in parts:
            found += more(get(value))
        return found

    return count if parts else None


#: By the names that msgspec.inspect has for types.
_SIMPLE: dict[str, Shape] = {
    **dict.fromkeys(("NoneType", "BoolType", "StrType", "EnumType", "LiteralType"), Shape()),
    **dict.fromkeys(("BytesType", "ByteArrayType", "MemoryViewType", "UUIDType"), Shape()),
    **dict.fromkeys(("DateType", "TimeDeltaType"), Shape()),
    **dict.fromkeys(("IntType", "FloatType", "DecimalType"), Shape(numbers=True)),
    **dict.fromkeys(("DateTimeType", "TimeType"), Shape(times=True, exact=False)),
    "AnyType": _ANY,
}
_INSIDE: dict[str, Callable[[Any, Read], Shape]] = {
    **dict.fromkeys(("ListType", "SetType", "FrozenSetType", "VarTupleType"), _list),
    "TupleType": _tuple,
    "DictType": _map,
    "UnionType": _union,
    **dict.fromkeys(("StructType", "DataclassType", "TypedDictType"), _object),
    "Metadata": lambda told, read: read(told.type),
}
