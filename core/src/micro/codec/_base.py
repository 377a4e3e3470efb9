"""What all codecs share: their interface, their limits, and messages that msgspec does not know."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

#: Most levels of one message.
MAX_DEPTH = 64
#: Most values in one message: the elements of all its lists and objects.
MAX_ITEMS = 100_000


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


def to_builtins(value: object) -> Any:
    """The hook of msgspec for values of types that it does not know."""
    if is_protobuf(type(value)):
        from micro.codec._protobuf import message_to_builtins

        return message_to_builtins(value)
    raise TypeError(f"Encoding objects of type {type(value).__name__} is unsupported")


def from_builtins(shape: Any, value: Any) -> Any:
    """The hook of msgspec for fields of types that it does not know."""
    if is_protobuf(shape):
        from micro.codec._protobuf import message_from_builtins

        return message_from_builtins(shape, value)
    raise TypeError(f"{shape.__name__} is no type of a message")
