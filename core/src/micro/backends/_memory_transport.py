"""Both sides of a call within one process: listeners, the links to them, the calls on a link."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import math
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial

import msgspec

from micro.call import (
    Body,
    Call,
    Handler,
    Reply,
    checked_metadata,
    decode_error,
    encode_error,
)
from micro.deadline import Alarm, Deadlines
from micro.errors import (
    Cancelled,
    Closed,
    DeadlineExceeded,
    Internal,
    MicroError,
    ResourceExhausted,
    TooLarge,
    Unavailable,
)
from micro.transport import STOPPED, Channel, Limits, Listener

_log = logging.getLogger("micro.memory")

#: What one direction of a stream holds unread: so many messages, of so many bytes together.
_MESSAGES = 64
_WINDOW = 256 * 1024
#: Seconds that cancelled handlers have to end when their listener closes.
_LAST_WAIT = 0.3


class Ports:
    """Who listens where."""

    def __init__(self) -> None:
        self.open: dict[str, MemoryListener] = {}
        self._numbers = itertools.cycle(range(1, 65536))

    def free(self) -> str:
        ports = (f"memory:{number}" for number in self._numbers)
        return next(port for port in ports if port not in self.open)


class MemoryListener(Listener):
    """A handler at an address of this process."""

    def __init__(self, ports: Ports, address: str, handler: Handler, limits: Limits) -> None:
        self.address = address
        self.handler = handler
        self.limits = limits
        self._ports = ports
        self._links: set[_Link] = set()
        ports.open[address] = self

    def accept(self) -> _Link:
        if len(self._links) >= self.limits.connections:
            text = f"{self.address}: it has {len(self._links)} connections and takes no more"
            raise Unavailable(text, sent=False)
        link = _Link(self, self._links.discard)
        self._links.add(link)
        return link

    async def drain(self, grace: float) -> None:
        if self._ports.open.get(self.address) is self:
            del self._ports.open[self.address]
        await _end(self._links, grace)

    async def aclose(self) -> None:
        await self.drain(0)
        running = {task for link in self._links for task in link.running}
        for link in tuple(self._links):
            link.close(Unavailable(f"{self.address}: {STOPPED}", remote=True))
        if running:  # a handler that ignores its cancellation must not hold the process
            await asyncio.wait(running, timeout=_LAST_WAIT)


class MemoryChannel(Channel):
    """Calls to whoever listens at ``address`` when they are made."""

    def __init__(self, ports: Ports, address: str, limits: Limits) -> None:
        self._ports = ports
        self._address = address
        self._limits = limits
        self._deadlines = Deadlines()
        self._links: dict[MemoryListener, _Link] = {}
        self._closed = False

    async def call(self, call: Call, body: bytes) -> Reply:
        link = self._link()
        async with link.room:
            answer = _Answer(self._limits)
            task = link.start(call, body, answer)
            try:
                outcome = await answer.outcome
            except asyncio.CancelledError:
                task.cancel()
                raise
        if isinstance(outcome, MicroError):
            raise outcome
        return outcome

    @asynccontextmanager
    async def stream(self, call: Call, body: AsyncIterator[bytes]) -> AsyncIterator[Reply]:
        link = self._link()
        stream = _Stream(self._limits)
        task = link.start(call, stream.said, stream)

        def give_up(error: Exception) -> None:
            stream.heard.end(error, now=True)
            stream.said.end(Cancelled("the caller has gone"), now=True)
            task.cancel()

        saying = asyncio.create_task(_say(body, stream.said, link.limits, give_up))
        text = f"{call.service} {call.endpoint}: the stream did not end within its deadline"
        when = math.inf if call.deadline is None else call.deadline
        alarm = Alarm(when, partial(give_up, DeadlineExceeded(text)))
        self._deadlines.add(alarm)
        try:
            yield stream.reply
        finally:
            self._deadlines.discard(alarm)
            give_up(Closed("a stream's messages are read inside its context"))
            saying.cancel()
            await asyncio.wait({saying})

    async def aclose(self, *, grace: float = 0) -> None:
        self._closed = True
        await _end(self._links.values(), grace)
        for link in self._links.values():
            link.close(Unavailable(f"{self._address}: the channel was closed during the call"))
        self._deadlines.close()

    def _link(self) -> _Link:
        if self._closed:
            raise Closed(f"channel to {self._address}: used after it was closed")
        listener = self._ports.open.get(self._address)
        if listener is None:
            raise Unavailable(f"{self._address}: nobody listens there in this process", sent=False)
        link = self._links.get(listener)
        if link is None:
            self._links = {other: link for other, link in self._links.items() if link.running}
            link = self._links[listener] = listener.accept()
        return link


class _Link:
    """What connects one channel with one listener, and the calls that run on it."""

    def __init__(self, listener: MemoryListener, lost: Callable[[_Link], None]) -> None:
        self.limits = listener.limits
        #: Of calls; who comes when there is none waits.
        self.room = asyncio.Semaphore(listener.limits.calls)
        self.running: dict[asyncio.Task[None], _Answer | _Stream] = {}
        self.open = True
        self._listener = listener
        self._lost = lost
        self._numbers = itertools.count(1)

    def start(self, call: Call, body: Body, answer: _Answer | _Stream) -> asyncio.Task[None]:
        """Have the call handled, in a task that is the server's own."""
        if not self.open:
            raise Unavailable(f"{self._listener.address}: it takes no more calls", sent=False)
        self._check(call, body)
        got = msgspec.structs.replace(
            call,
            kind="unary" if isinstance(body, bytes) else "bidi",
            metadata=checked_metadata(call.metadata) if call.metadata else {},
            id=str(next(self._numbers)),
            peer="memory",
            identity="",
            reply_metadata=None,
        )
        work = _serve(self._listener.handler, got, body, answer)
        task = asyncio.create_task(work, context=contextvars.Context())
        self.running[task] = answer
        task.add_done_callback(self.running.pop)
        return task

    def close(self, error: MicroError) -> None:
        """End what runs."""
        self.open = False
        self._lost(self)
        for task, answer in tuple(self.running.items()):
            answer.end(error, now=True)
            task.cancel()

    def _check(self, call: Call, body: Body) -> None:
        _check_head(call.metadata, self.limits, call.service, call.endpoint)
        if isinstance(body, bytes):
            _check_size(body, self.limits)
        elif sum(isinstance(one, _Stream) for one in self.running.values()) >= self.limits.streams:
            text = f"{self.limits.streams} streams run on the connection, and it takes no more"
            raise ResourceExhausted(text, sent=False)


class _Answer:
    """What a call of one message gets."""

    def __init__(self, limits: Limits) -> None:
        self.outcome: asyncio.Future[Reply | MicroError]
        self.outcome = asyncio.get_running_loop().create_future()
        self._limits = limits

    async def deliver(self, reply: Reply) -> None:
        if not isinstance(reply.body, bytes):
            raise Internal("the handler answered one message with a stream")
        _check_head(reply.metadata, self._limits)
        _check_size(reply.body, self._limits)
        if not self.outcome.done():
            self.outcome.set_result(Reply(body=reply.body, metadata=dict(reply.metadata)))

    def end(self, error: MicroError, *, now: bool = False) -> None:
        if not self.outcome.done():
            self.outcome.set_result(error)


class _Stream:
    """What is said to a handler, and what is heard of it."""

    def __init__(self, limits: Limits) -> None:
        self.said = _Pipe()
        self.heard = _Pipe()
        self.reply = Reply(body=self.heard)
        self._limits = limits

    async def deliver(self, reply: Reply) -> None:
        _check_head(reply.metadata, self._limits)
        self.reply.metadata.update(reply.metadata)
        if isinstance(reply.body, bytes):
            await self._put(reply.body)
        else:
            async with _closing(reply.body):
                async for message in reply.body:
                    await self._put(message)
        self.reply.trailer.update(reply.trailer)
        self.heard.end()

    def end(self, error: MicroError, *, now: bool = False) -> None:
        self.heard.end(error, now=now)

    async def _put(self, message: bytes) -> None:
        _check_size(message, self._limits)
        await self.heard.put(message)


class _Pipe(AsyncIterator[bytes]):
    """One direction of a stream; who writes waits as long as too much is unread."""

    def __init__(self) -> None:
        self._messages: deque[bytes] = deque()
        self._size = 0
        self._ended = False
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    async def put(self, message: bytes) -> None:
        while not self._ended and self._full(len(message)):
            await self._change()
        if self._ended:
            raise Cancelled("nobody reads the stream any more")
        self._messages.append(message)
        self._size += len(message)
        self._changed.set()

    def end(self, error: Exception | None = None, *, now: bool = False) -> None:
        """No message follows; the first end counts. ``now``: what is unread is dropped."""
        if self._ended:
            return
        self._ended, self._error = True, error
        if now:
            self._messages.clear()
        self._changed.set()

    async def __anext__(self) -> bytes:
        while not self._messages:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            await self._change()
        message = self._messages.popleft()
        self._size -= len(message)
        self._changed.set()
        return message

    def _full(self, more: int) -> bool:
        count = len(self._messages)  # a message that is larger than all of it passes alone
        return count >= _MESSAGES or (count > 0 and self._size + more > _WINDOW)

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


async def _serve(handler: Handler, call: Call, body: Body, answer: _Answer | _Stream) -> None:
    try:
        await answer.deliver(await handler(call, body))
    except MicroError as exc:
        told = decode_error(encode_error(exc, id=call.service))
        told.sent = exc.sent
        answer.end(told)
    except asyncio.CancelledError:
        answer.end(Cancelled("the server gave the call up", remote=True))
        raise
    except Exception:  # a fault of the handler must reach its caller, without what it tells
        _log.exception("answering %s failed", call.endpoint)
        answer.end(Internal("internal error", id=call.service, remote=True))


async def _say(
    body: AsyncIterator[bytes], said: _Pipe, limits: Limits, give_up: Callable[[Exception], None]
) -> None:
    try:
        async with _closing(body):
            async for message in body:
                _check_size(message, limits)
                await said.put(message)
        said.end()
    except asyncio.CancelledError:
        give_up(Cancelled("the body of the stream was cancelled"))
        raise
    except Exception as exc:  # whatever the caller's own iterator raises ends the stream
        give_up(exc)


@asynccontextmanager
async def _closing(messages: AsyncIterator[bytes]) -> AsyncIterator[None]:
    """Have a generator that is not read to its end clean up now, and not some time later."""
    try:
        yield
    finally:
        if isinstance(messages, AsyncGenerator):
            await messages.aclose()


async def _end(links: Iterable[_Link], grace: float) -> None:
    """Take no new call, and wait for those that run."""
    running: set[asyncio.Task[None]] = set()
    for link in links:
        link.open = False
        running |= link.running.keys()
    if running and grace:
        await asyncio.wait(running, timeout=grace)


def _check_head(metadata: Mapping[str, str], limits: Limits, *names: str) -> None:
    texts = [*names, *metadata.keys(), *metadata.values()]
    if len(metadata) > limits.fields or sum(len(text.encode()) for text in texts) > limits.headers:
        raise TooLarge(f"the metadata is over {limits.headers} bytes or {limits.fields} fields")


def _check_size(message: bytes, limits: Limits) -> None:
    if len(message) > limits.message:
        raise TooLarge(f"a message has {len(message)} bytes, {limits.message} at most")
