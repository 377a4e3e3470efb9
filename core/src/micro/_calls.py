"""What one call of a client is made of: its form, its options, its streams to and from bytes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any, Generic, TypeVar

import msgspec

from micro.call import INHERITED, Call, Kind, Reply
from micro.codec import codec_for
from micro.errors import ConfigError, DeadlineExceeded
from micro.selector import Selector

M = TypeVar("M")


class Stream(AsyncIterator[M], Generic[M]):
    """The replies of a stream, as they come; ``async for`` ends with the server's last.

    ``metadata`` came with the server's acceptance, and is there with the first reply; ``trailer``
    is there after the last.
    """

    def __init__(self, replies: AsyncGenerator[M, None], reply: Reply) -> None:
        self._replies = replies
        self._reply = reply

    @property
    def metadata(self) -> Mapping[str, str]:
        return self._reply.metadata

    @property
    def trailer(self) -> Mapping[str, str]:
        return self._reply.trailer

    def __aiter__(self) -> AsyncIterator[M]:  # noqa: PYI034 - spares a layer each message
        return self._replies

    async def __anext__(self) -> M:
        return await anext(self._replies)


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What holds for one call, or by ``using`` for all calls of one typed client."""

    timeout: float | None = None
    metadata: Mapping[str, str] = msgspec.field(default_factory=dict)
    address: str = ""
    selector: Selector | None = None


class Form:
    """One endpoint as it is called: everything that its calls need, made once."""

    __slots__ = ("content_type", "decode", "encode", "endpoint", "idempotent", "kind", "timeout")

    def __init__(
        self,
        endpoint: str,
        kind: Kind,
        content_type: str,
        returns: Any,
        *,
        timeout: float | None = None,
        idempotent: bool = False,
    ) -> None:
        codec = codec_for(content_type)
        self.endpoint = endpoint
        self.kind: Kind = kind
        self.content_type = codec.content_type
        self.timeout = timeout
        self.idempotent = idempotent
        self.encode = codec.encode
        void = returns is type(None)
        try:
            decode = codec.decoder(Any if void else returns)
        except TypeError as exc:
            raise ConfigError(f"returns={returns!r} is no type of a message: {exc}") from exc
        self.decode: Callable[[bytes], Any] = _nothing(decode) if void else decode


def inherit(call: Call, handled: Call) -> None:
    """Take over the deadline of the call that is being handled, and what traces it."""
    deadline = handled.deadline
    if deadline is not None and (call.deadline is None or deadline < call.deadline):
        call.deadline = deadline
    for name in INHERITED:
        if name in handled.metadata and name not in call.metadata:
            call.metadata[name] = handled.metadata[name]


def late(call: Call, began: float) -> DeadlineExceeded:
    took = (call.deadline or began) - began
    return DeadlineExceeded(f"{call.service} {call.endpoint}: no reply in {took:.3g} s")


def _nothing(decode: Callable[[bytes], Any]) -> Callable[[bytes], None]:
    def nothing(body: bytes) -> None:
        decode(body)

    return nothing


async def once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body


async def encoded(
    requests: AsyncIterator[Any], encode: Callable[[object], bytes]
) -> AsyncGenerator[bytes, None]:
    try:
        async for request in requests:
            yield encode(request)
    finally:
        if isinstance(requests, AsyncGenerator):
            await requests.aclose()


async def decoded(
    body: AsyncIterator[bytes], decode: Callable[[bytes], Any]
) -> AsyncGenerator[Any, None]:
    async for message in body:
        yield decode(message)
