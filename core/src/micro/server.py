"""The server's side of a call: endpoints, their decoding, their errors."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from micro._overload import Lateness, Shed, Turns
from micro._targets import Counts
from micro.call import (
    Body,
    Call,
    Handler,
    Middleware,
    Reply,
    checked_metadata,
    compose,
    enter,
)
from micro.codec import Codec, codec_for
from micro.contract import Method, read_handler
from micro.deadline import Deadlines, Limit
from micro.errors import (
    Closed,
    ConfigError,
    DeadlineExceeded,
    EndpointNotFound,
    Gap,
    Internal,
    InvalidArgument,
    MicroError,
    Unavailable,
)
from micro.registry import Endpoint
from micro.stats import Stats
from micro.transport import Limits

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from micro.debug import Debug

_log = logging.getLogger("micro.server")

#: Threads for handlers that are plain functions.
_THREADS = 32
#: Errors of this process, which never leave it.
_LOCAL = (ConfigError, Closed, Gap)


class Server:
    """Endpoints behind one middleware chain: what a transport hands its calls to.

    ``ready`` is what ``/readyz`` tells; ``/livez`` answers as long as the process does.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        #: Those of the client beside it, to be told of.
        self.counts: Counts = Counts()
        self._turns = Turns(Limits().in_flight, "calls")
        self._free = Turns(_THREADS, "plain functions")
        self._lateness = Lateness()
        self.ready: bool = False
        #: Why it is not, without what may be a secret: anybody may ask.
        self.why_not: str = "it is starting"
        self._endpoints: dict[str, _Endpoint] = {}
        self._unknown = Stats()
        self._deadlines = Deadlines()
        self._debug: Debug | None = None
        self._threads: ThreadPoolExecutor | None = None

    def tell(self, why_not: str) -> None:
        """What ``/readyz`` answers from now on: why it is not ready, "" when it is."""
        self.ready, self.why_not = not why_not, why_not

    def handle(self, handler: object, *, name: str | None = None) -> None:
        """Serve the public methods of ``handler``; ``name`` stands for its class's name.

        Raises:
            ConfigError: a method cannot be an endpoint, or the endpoint is already served.
        """
        methods = read_handler(handler, name)
        twice = [method.endpoint for method in methods if method.endpoint in self._endpoints]
        if twice:
            owner = self._endpoints[twice[0]].owner
            raise ConfigError(
                f"endpoint {twice[0]} is already served by {owner}; "
                f"give one of them another name: handle(handler, name=...)"
            )
        for method in methods:
            self._endpoints[method.endpoint] = _Endpoint(self, handler, method)

    def endpoints(self) -> tuple[Endpoint, ...]:
        """What the registry tells of it, by name."""
        return tuple(self._endpoints[name].method.describe() for name in sorted(self._endpoints))

    def stats(self) -> dict[str, Stats]:
        """What the calls of each endpoint were, by its name."""
        return {name: endpoint.stats for name, endpoint in self._endpoints.items()}

    def handler(self, middleware: Iterable[Middleware], limits: Limits | None = None) -> Handler:
        """The whole server as one handler; made once, at start."""
        self._turns = Turns((limits or Limits()).in_flight, "calls")
        self._lateness = Lateness()
        endpoints = {**self._built_in(), **self._endpoints}
        unknown, deadlines, clock = self._unknown, self._deadlines, time.monotonic
        turns, lateness = self._turns, self._lateness

        def dispatch(call: Call, body: Body) -> Awaitable[Reply]:
            endpoint = endpoints.get(call.endpoint)
            if endpoint is None:
                raise self._not_found(call.endpoint)
            return endpoint.run(call, body)

        inner = compose(middleware, dispatch)

        async def answer(call: Call, body: Body) -> Reply:
            endpoint = endpoints.get(call.endpoint)
            spared = False
            if endpoint is not None:
                call.kind = endpoint.method.kind
                stats, spared = endpoint.stats, endpoint.spared
            elif call.endpoint.startswith("/"):
                return self._health(call.endpoint)
            else:
                stats = unknown
            stats.running += 1
            turns.running += 1
            began = clock()
            if not (stats.calls + stats.running) & lateness.seldom:
                lateness.look(began)
            limit = Limit(deadlines, math.inf if call.deadline is None else call.deadline)
            enter(call)
            try:
                with limit:
                    if (turns.running > turns.most or began > lateness.too_late) and not spared:
                        await self._admit(began)
                    reply = await inner(call, body) if began < limit.when else _expired(call)
                if call.reply_metadata:
                    reply.metadata |= checked_metadata(call.reply_metadata)
                return reply
            except Exception as exc:  # what a handler raises must not leak to the caller
                stats.errors += 1
                raise self._told(call, exc, late=limit.expired) from None
            finally:
                stats.running -= 1
                turns.running -= 1
                if turns.waiting:
                    turns.next()
                stats.add(clock() - began)

        return answer

    async def _admit(self, began: float) -> None:
        """Let a call begin, perhaps a little later.

        Raises:
            ResourceExhausted: the server has too much to do.
        """
        if began > self._lateness.too_late and self._lateness.is_behind():
            raise self._lateness.refuse()
        if self._turns.running <= self._turns.most:
            return
        self._turns.running -= 1  # it has counted itself already
        try:
            await self._turns.take()
        except BaseException:
            self._turns.running += 1
            raise

    async def run_in_thread(self, function: Callable[[], Any]) -> Any:
        """Run a plain function in the bounded pool, with this task's context.

        Raises:
            ResourceExhausted: no thread was free in time.
        """
        if self._threads is None:
            from concurrent.futures import ThreadPoolExecutor

            self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"micro-{self.name}")
        run = contextvars.copy_context().run
        await self._free.take()
        running = self._threads.submit(run, function)
        running.add_done_callback(partial(_end_in, asyncio.get_running_loop(), self._free))
        return await asyncio.wrap_future(running)

    def close(self) -> None:
        """Give the threads back; a function that still runs in one is not waited for."""
        self._deadlines.close()
        if self._debug is not None:
            self._debug.__exit__()
            self._debug = None
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None

    def _told(self, call: Call, exc: Exception, *, late: bool = False) -> MicroError:
        """The error that a caller gets: one that is not for him tells only where the log has it."""
        if late and isinstance(exc, TimeoutError):
            return DeadlineExceeded(f"{call.endpoint}: not done within its deadline")
        if isinstance(exc, MicroError) and not isinstance(exc, _LOCAL):
            if exc.final:  # middleware made a call of its own: that says nothing of this one
                exc.sent = None
            return exc
        incident = os.urandom(4).hex()
        _log.error("%s failed, incident %s", call.endpoint, incident, exc_info=exc)
        return Internal(f"internal error; the service's log has it as incident {incident}")

    def _built_in(self) -> dict[str, _Endpoint]:
        """What every server answers; a handler of the program's with the same name stands first."""
        from micro.debug import Debug

        debug = self._debug = Debug(self.stats, self._counters)
        debug.__enter__()
        built_in = [_Endpoint(self, debug, method) for method in read_handler(debug, None)]
        for endpoint in built_in:
            endpoint.spared = True
        return {endpoint.method.endpoint: endpoint for endpoint in built_in}

    def _counters(self) -> dict[str, int]:
        """What this process decided about calls: as a server, and as a client of others."""
        refused = self._turns.refused + self._free.refused
        own = {"shed_busy": refused, "shed_late": self._lateness.refused}
        return own | msgspec.structs.asdict(self.counts)

    def _not_found(self, name: str) -> EndpointNotFound:
        from difflib import get_close_matches

        known = sorted(self._endpoints)
        near = get_close_matches(name, known, n=3, cutoff=0.5)
        hint = (
            f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known[:20])}"
        )
        return EndpointNotFound(f"there is no endpoint {name[:80]!r}; {hint}")

    def _health(self, path: str) -> Reply:
        if path == "/livez" or (path == "/readyz" and self.ready):
            return Reply(body=b'{"status":"ok"}')
        if path == "/readyz":
            raise Unavailable(f"{self.name} is not ready: {self.why_not}")
        raise EndpointNotFound(f"{path[:80]!r} is not one of /livez, /readyz")


class _Endpoint:
    """One method of a handler, with everything made that its calls need."""

    def __init__(self, server: Server, handler: object, method: Method) -> None:
        self.method = method
        self.owner = f"{type(handler).__qualname__}.{method.attribute}"
        self.stats = Stats()
        #: It is answered even when there is too much to do.
        self.spared: bool = False
        self._server = server
        self._forms: dict[str, tuple[Codec, Callable[[bytes], Any]]] = {}
        self._form(method.content_type)  # the usual one is ready before the first call
        function = getattr(handler, method.attribute)
        streams = method.kind in ("server", "bidi")
        self._function: Callable[..., Any] = (
            function if method.is_async or streams else _threaded(server, function)
        )
        kinds: dict[str, Handler] = {
            "unary": self._unary,
            "client": self._client_stream,
            "server": self._server_stream,
            "bidi": self._both_stream,
        }
        #: Decodes, calls the method, encodes.
        self.run: Handler = kinds[method.kind]

    async def _unary(self, call: Call, body: Body) -> Reply:
        codec, decode = self._forms.get(call.content_type) or self._form(call.content_type)
        request = decode(body if isinstance(body, bytes) else await self._only(body))
        fields = self.method.fields
        try:
            if fields is None:
                result = await self._function(request)
            else:
                given = {field: getattr(request, field) for field in fields}
                result = await self._function(**given)
        except MicroError as exc:
            raise _executed(exc) from None
        try:
            return Reply(body=codec.encode(result))
        except InvalidArgument as exc:
            raise self._unsendable(exc) from exc

    async def _client_stream(self, call: Call, body: Body) -> Reply:
        codec, decode = self._forms.get(call.content_type) or self._form(call.content_type)
        requests = _decoded(self._streamed(body), decode)
        try:
            result = await self._function(requests)
        except MicroError as exc:
            raise _executed(exc) from None
        try:
            return Reply(body=codec.encode(result))
        except InvalidArgument as exc:
            raise self._unsendable(exc) from exc

    async def _server_stream(self, call: Call, body: Body) -> Reply:
        codec, decode = self._forms.get(call.content_type) or self._form(call.content_type)
        request = decode(await self._only(self._streamed(body)))
        fields = self.method.fields
        if fields is None:
            result = self._function(request)
        else:
            result = self._function(**{field: getattr(request, field) for field in fields})
        return Reply(body=self._replies(call, codec, result))

    async def _both_stream(self, call: Call, body: Body) -> Reply:
        codec, decode = self._forms.get(call.content_type) or self._form(call.content_type)
        result = self._function(_decoded(self._streamed(body), decode))
        return Reply(body=self._replies(call, codec, result))

    async def _replies(
        self, call: Call, codec: Codec, messages: AsyncIterator[Any]
    ) -> AsyncIterator[bytes]:
        encode = codec.encode
        self.stats.running += 1
        try:
            async for message in messages:
                try:
                    yield encode(message)
                except InvalidArgument as exc:
                    raise self._unsendable(exc) from exc
        except Exception as exc:  # what a handler raises must not leak to the caller
            self.stats.errors += 1
            raise _executed(self._server._told(call, exc)) from None
        finally:
            self.stats.running -= 1
            if isinstance(messages, AsyncGenerator):
                await messages.aclose()

    def _unsendable(self, exc: InvalidArgument) -> TypeError:
        return TypeError(f"{self.owner} returned what cannot be sent: {exc}")

    def _streamed(self, body: Body) -> AsyncIterator[bytes]:
        if isinstance(body, bytes):
            name, kind = self.method.endpoint, self.method.kind
            raise InvalidArgument(f"{name} is a {kind} stream; call it as a stream", sent=False)
        return body

    async def _only(self, body: AsyncIterator[bytes]) -> bytes:
        """The one message of a stream that has no more."""
        async for message in body:
            return message
        raise InvalidArgument(f"{self.method.endpoint}: the stream ended without a request")

    def _form(self, content_type: str) -> tuple[Codec, Callable[[bytes], Any]]:
        """Codec and decoder; kept by the codec's own name, of which there are few."""
        codec = codec_for(content_type)
        if codec.content_type not in self._forms:
            self._forms[codec.content_type] = (codec, codec.decoder(self.method.request))
        return self._forms[codec.content_type]


async def _decoded(
    body: AsyncIterator[bytes], decode: Callable[[bytes], Any]
) -> AsyncIterator[Any]:
    async for message in body:
        yield decode(message)


def _executed(error: MicroError) -> MicroError:
    """An error of a handler; what another server did not execute, this one may have."""
    if not isinstance(error, Shed):  # there was no thread to begin it in
        error.sent = None
    return error


def _expired(call: Call) -> NoReturn:
    raise DeadlineExceeded(f"{call.endpoint}: expired before it was executed", sent=False)


def _end_in(loop: asyncio.AbstractEventLoop, turns: Turns, _: Future[Any]) -> None:
    """Give back the turn of a thread, in the loop's own thread, when the function has ended."""
    with suppress(RuntimeError):  # the loop is closed: a function was still running
        loop.call_soon_threadsafe(turns.end)


def _threaded(server: Server, function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    async def run(*args: Any, **kwargs: Any) -> Any:
        return await server.run_in_thread(partial(function, *args, **kwargs))

    return run
