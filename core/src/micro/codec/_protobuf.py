"""Protobuf messages: their bytes, and what they are in JSON.

protobuf is no dependency: it is imported where a class of its messages is, so it is there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from micro.codec._base import MAX_DEPTH, MAX_ITEMS, is_protobuf
from micro.errors import DecodeError, InvalidArgument, UnsupportedContentType

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor, FieldDescriptor
    from google.protobuf.message import Message

#: Types that JSON holds in a form of their own; protobuf checks those itself.
_WELL_KNOWN = "google.protobuf."
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]*={0,2}")
_NUMBER = re.compile(r"[-+.0-9eE]+|-?Infinity|NaN|true|false")


class Protobuf:
    """Generated protobuf messages.

    Refused are more than 64 levels of messages, 100,000 fields and elements, text that is not
    UTF-8. As the format has it, unknown fields are kept, and of a field that is there twice the
    last one counts. Without a type (``Any``) a message is its bytes.
    """

    content_type = "application/protobuf"

    def encode(self, value: object) -> bytes:
        if value is None:
            return b""
        if not is_protobuf(type(value)):
            text = f"{self.content_type} holds protobuf messages, not {type(value).__name__}"
            raise InvalidArgument(text)
        from google.protobuf.message import EncodeError

        message: Message = value  # type: ignore[assignment]
        try:
            return message.SerializeToString(deterministic=True)
        except (EncodeError, ValueError, RecursionError) as exc:
            raise InvalidArgument(f"not a protobuf message: {exc}") from exc

    def decoder(self, shape: Any) -> Callable[[bytes], Any]:
        if shape is Any:
            return bytes
        if not is_protobuf(shape):
            text = f"{self.content_type} gives protobuf messages, not {shape}; send JSON"
            raise UnsupportedContentType(text)
        from google.protobuf.message import DecodeError as Malformed

        nests = _can_be_deep(shape.DESCRIPTOR)

        def strict(body: bytes) -> Any:
            message = shape()
            try:
                message.ParseFromString(body)
            except (Malformed, ValueError, RecursionError) as exc:
                raise DecodeError(f"not a {shape.__name__} in protobuf: {exc}") from None
            # A level takes two bytes, a value one: shorter messages are within the limits.
            if len(body) > MAX_ITEMS or (nests and len(body) >= 2 * MAX_DEPTH):
                _refuse_large(message)
            return message

        return strict


def _can_be_deep(descriptor: Descriptor) -> bool:
    level = {descriptor.full_name: descriptor}
    for _ in range(MAX_DEPTH):
        fields = [field for one in level.values() for field in one.fields]
        inner = [field.message_type for field in fields if field.message_type is not None]
        level = {one.full_name: one for one in inner}
    return bool(level)


def _refuse_large(message: Message) -> None:
    level, items = [message], 0
    for _ in range(MAX_DEPTH):
        inner: list[Message] = []
        for one in level:
            for _, value in one.ListFields():
                values, count = _elements(value)
                items += count
                if items > MAX_ITEMS:
                    raise DecodeError(f"the protobuf has more than {MAX_ITEMS:,} values")
                inner += [item for item in values if _is_message(item)]
        level = inner
        if not level:
            return
    raise DecodeError(f"the protobuf has more than {MAX_DEPTH} levels")


def _elements(value: Any) -> tuple[Any, int]:
    """The values of a field, and how many they are."""
    if _is_message(value) or isinstance(value, str | bytes) or not hasattr(value, "__len__"):
        return (value,), 1
    # What is a map's is made only when it is not too much.
    return (value.values() if hasattr(value, "values") else value), len(value)


def _is_message(value: object) -> bool:
    return is_protobuf(type(value))


# -- as JSON -----------------------------------------------------------------------------------


def message_to_builtins(message: Any) -> Any:
    """What JSON holds for a message, after protobuf's own mapping: camelCase, int64 as text.

    Raises:
        ValueError: it has no form in JSON.
    """
    from google.protobuf import json_format

    try:
        return json_format.MessageToDict(message)
    except json_format.Error as exc:
        raise ValueError(str(exc)) from None


def message_from_builtins(shape: Any, value: Any) -> Any:
    """The message that JSON holds; names are taken in camelCase and as the .proto has them.

    Raises:
        TypeError, ValueError: it does not fit.
    """
    from google.protobuf import json_format

    _refuse_misfit(value, shape.DESCRIPTOR)
    try:
        return json_format.ParseDict(value, shape(), ignore_unknown_fields=True)
    except Exception as exc:  # protobuf lets out whatever its conversions raise
        raise ValueError(f"not a {shape.__name__}: {exc}") from None


def _refuse_misfit(value: Any, descriptor: Descriptor) -> None:
    """What protobuf takes for an empty message since unknown fields are ignored, and names twice.

    A list and a text have none of the fields; a field has two names.
    """
    if descriptor.full_name.startswith(_WELL_KNOWN):
        return
    if not isinstance(value, dict):
        raise TypeError(f"Expected `object` for {descriptor.name}, got `{type(value).__name__}`")
    names = {field.json_name: field for field in descriptor.fields}
    seen: set[int] = set()
    for name, inner in value.items():
        field = names.get(name) or descriptor.fields_by_name.get(name)
        if field is None:
            continue
        if field.number in seen:
            raise ValueError(f"the field {field.name} of {descriptor.name} is there twice")
        seen.add(field.number)
        _refuse_inner(inner, field)


def _refuse_inner(value: Any, field: FieldDescriptor) -> None:
    inner = field.message_type
    values: Iterable[Any] = (
        value if isinstance(value, list) and not field.has_presence else (value,)
    )
    if inner is not None and inner.GetOptions().map_entry:
        field = inner.fields_by_name["value"]
        values = value.values() if isinstance(value, dict) else ()
    for one in values:
        if one is not None and field.message_type is not None:
            _refuse_misfit(one, field.message_type)
        elif isinstance(one, str):
            _refuse_text(one, field)


def _refuse_text(text: str, field: FieldDescriptor) -> None:
    """What protobuf reads more freely than its specification: base64 and numbers in text."""
    if field.type in (field.TYPE_STRING, field.TYPE_ENUM):
        return
    kind, allowed = ("base64", _BASE64) if field.type == field.TYPE_BYTES else ("number", _NUMBER)
    if not allowed.fullmatch(text):
        raise ValueError(f"the text of the field {field.name} is no {kind}")
