"""The server's side of a call: endpoints, their decoding, their errors."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

_log = logging.getLogger("micro.server")

#: Threads for handlers that are plain functions.
_THREADS = 32


class Server:
    """Endpoints behind one middleware chain: what a transport hands its calls to.

    ``ready`` is what ``/readyz`` tells; ``/livez`` answers as long as the process does.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.ready = False
        self._endpoints: dict[str, _Endpoint] = {}
        self._threads: ThreadPoolExecutor | None = None

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

    def handler(self, middleware: Iterable[Middleware]) -> Handler:
        """The whole server as one handler; made once, at start."""
        inner = compose(middleware, self._dispatch)

        async def answer(call: Call, body: Body) -> Reply:
            if call.endpoint.startswith("/"):
                return self._health(call.endpoint)
            return await self._answer(inner, call, body)

        return answer

    async def run_in_thread(self, function: Callable[[], Any]) -> Any:
        """Run a plain function in the bounded pool, with this task's context."""
        if self._threads is None:
            from concurrent.futures import ThreadPoolExecutor

            self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"micro-{self.name}")
        run = contextvars.copy_context().run
        return await asyncio.get_running_loop().run_in_executor(self._threads, run, function)

    def close(self) -> None:
        """Give the threads back; a function that still runs in one is not waited for."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None

    async def _answer(self, inner: Handler, call: Call, body: Body) -> Reply:
        context = enter(call)
        try:
            reply = await self._in_time(inner, call, body)
            if context.reply_metadata:
                reply.metadata |= checked_metadata(context.reply_metadata)
            return reply
        except (ConfigError, Closed, Gap) as exc:
            raise self._hidden(call, exc) from None
        except MicroError:
            raise
        except Exception as exc:  # what a handler raises must not leak to the caller
            raise self._hidden(call, exc) from None

    async def _in_time(self, inner: Handler, call: Call, body: Body) -> Reply:
        if call.deadline is None:
            return await inner(call, body)
        left = call.deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"{call.endpoint}: expired before it was executed", sent=False)
        timer = asyncio.timeout(left)
        try:
            async with timer:
                return await inner(call, body)
        except TimeoutError:
            if not timer.expired():
                raise
            raise DeadlineExceeded(f"{call.endpoint}: not done within its deadline") from None

    def _hidden(self, call: Call, exc: Exception) -> Internal:
        """An error that tells nothing but the id under which the log has it."""
        incident = os.urandom(4).hex()
        _log.error("%s failed, incident %s", call.endpoint, incident, exc_info=exc)
        return Internal(f"internal error; the service's log has it as incident {incident}")

    async def _dispatch(self, call: Call, body: Body) -> Reply:
        endpoint = self._endpoints.get(call.endpoint)
        if endpoint is None:
            raise self._not_found(call.endpoint)
        return await endpoint.run(call, body)

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
            raise Unavailable(f"{self.name} is starting or draining")
        raise EndpointNotFound(f"{path[:80]!r} is not one of /livez, /readyz")


class _Endpoint:
    """One method of a handler, with everything made that its calls need."""

    def __init__(self, server: Server, handler: object, method: Method) -> None:
        self.method = method
        self.owner = f"{type(handler).__qualname__}.{method.attribute}"
        self._forms: dict[str, tuple[Codec, Callable[[bytes], Any]]] = {}
        self._form(method.content_type)  # the usual one is ready before the first call
        function = getattr(handler, method.attribute)
        self._function: Callable[..., Awaitable[Any]] = (
            function if method.is_async else _threaded(server, function)
        )

    async def run(self, call: Call, body: Body) -> Reply:
        codec, decode = self._forms.get(call.content_type) or self._form(call.content_type)
        request = decode(body)
        fields = self.method.fields
        if fields is None:
            result = await self._function(request)
        else:
            result = await self._function(**{field: getattr(request, field) for field in fields})
        try:
            return Reply(body=codec.encode(result))
        except InvalidArgument as exc:
            raise TypeError(f"{self.owner} returned what cannot be sent: {exc}") from exc

    def _form(self, content_type: str) -> tuple[Codec, Callable[[bytes], Any]]:
        """Codec and decoder; kept by the codec's own name, of which there are few."""
        codec = codec_for(content_type)
        if codec.content_type not in self._forms:
            self._forms[codec.content_type] = (codec, codec.decoder(self.method.request))
        return self._forms[codec.content_type]


def _threaded(server: Server, function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    async def run(*args: Any, **kwargs: Any) -> Any:
        return await server.run_in_thread(partial(function, *args, **kwargs))

    return run
