"""What all codecs share: their interface, their limits, and messages that msgspec does not know."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any, Protocol

from micro.errors import DecodeError

#: Most levels of one message.
MAX_DEPTH = 64
#: Most values in one message: the elements of all its lists and objects.
MAX_ITEMS = 100_000
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789", b"0" * 9)
_LONG_INTEGER = b"0" * 19
_TWO_PATHS = re.compile(r" - at `\$([^`]*)` - at `([^`]*)`$")


class Codec(Protocol):
    """One form of messages on the wire."""

    content_type: str

    def encode(self, value: object) -> bytes:
        """The bytes of ``value``; the same bytes for the same message.

        Raises:
            InvalidArgument: a type that this form cannot hold.
        """
        ...

    def decoder(self, shape: Any) -> Callable[[bytes], Any]:
        """A function from bytes to ``shape``, made once and used for every message.

        The function raises DecodeError, and nothing else, for bytes that do not fit.

        Raises:
            UnsupportedContentType: this form never holds a ``shape``.
        """
        ...


def is_protobuf(shape: Any) -> bool:
    """Whether it is the class of a protobuf message; protobuf is not imported to find out."""
    module = sys.modules.get("google.protobuf.message")
    return module is not None and isinstance(shape, type) and issubclass(shape, module.Message)


def is_pydantic(shape: Any) -> bool:
    """Whether it is a class of pydantic 2's models; pydantic is not imported to find out."""
    module = sys.modules.get("pydantic.main")
    models = getattr(module, "BaseModel", None)  # None while it is being imported
    if models is None or not hasattr(models, "model_validate_json"):
        return False
    return isinstance(shape, type) and issubclass(shape, models)


def to_builtins(value: object) -> Any:
    """The hook of msgspec for values of types that it does not know."""
    if is_protobuf(type(value)):
        from micro.codec._protobuf import message_to_builtins

        return message_to_builtins(value)
    if is_pydantic(type(value)):
        from micro.codec._pydantic import model_to_builtins

        return model_to_builtins(value)
    raise TypeError(f"Encoding objects of type {type(value).__name__} is unsupported")


def from_builtins(shape: Any, value: Any) -> Any:
    """The hook of msgspec for fields of types that it does not know.

    What it raises may end with a path inside of the value; ``joined`` is for that.
    """
    if is_protobuf(shape):
        from micro.codec._protobuf import message_from_builtins

        return message_from_builtins(shape, value)
    if is_pydantic(shape):
        from micro.codec._pydantic import model_from_builtins

        return model_from_builtins(shape, value)
    raise TypeError(f"{shape.__name__} is no type of a message")


def joined(text: str) -> str:
    """The text of an error of msgspec: the path inside of a field put behind that of the field."""
    return _TWO_PATHS.sub(r" - at `\2\1`", text)


def has_long_integer(body: bytes) -> bool:
    """Whether 19 digits of JSON follow one another: less fits 64 bits for sure."""
    return len(body) > 18 and bool(body.translate(_DIGITS_TO_ZERO).partition(_LONG_INTEGER)[1])


def refuse_deep(tree: Any, form: str) -> None:
    """What a decoder without a type gave must have no more than 64 levels."""
    level: list[Any] = [[tree]]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for inner in level
            for item in (inner.values() if type(inner) is dict else inner)
            if type(item) is dict or type(item) is list
        ]
        if not level:
            return
    raise DecodeError(f"the {form} has more than {MAX_DEPTH} levels")
