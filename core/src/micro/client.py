"""The client's side of a call, and typed clients."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import lru_cache
from typing import Any, TypeVar, cast, overload

from micro._calls import Form, Options, Stream, decoded, encoded, inherit, late, once
from micro.call import Call, Kind, Middleware, Reply, checked_metadata, compose, current
from micro.contract import ENDPOINT, Method, content_type_of, read_contract
from micro.deadline import Deadlines, Limit
from micro.errors import InvalidArgument
from micro.follow import Watch
from micro.registry import Registry, check_service
from micro.routes import STACK, Counts, Means, Routes
from micro.selector import Selector

T = TypeVar("T")

_NO_METADATA: Mapping[str, str] = {}


class Client:
    """Calls services by name.

    It watches each service that it calls, so that no call asks the registry; picks a node; keeps
    channels to nodes as long as they are registered. ``means`` raises Closed while the service that
    owns the client is not open.
    """

    def __init__(
        self, means: Callable[[], Means], *, middleware: Iterable[Middleware] = ()
    ) -> None:
        self._means = means
        self._routes = Routes(means)
        self._send = compose(middleware, self._routes.send)
        self._deadlines = Deadlines()
        self._form = lru_cache(maxsize=1024)(Form)

    def wrap(self, middleware: Middleware) -> None:
        """Put ``middleware`` around the calls, outside of what is around them already."""
        self._send = middleware(self._send)

    def __call__(self, service: str, contract: Callable[..., T], *, name: str | None = None) -> T:
        """A typed client: an object with the methods of ``contract``, each a call of ``service``.

        ``contract`` is a Protocol, an ABC or a class; ``name`` stands for its own name in the names
        of endpoints. No I/O happens before the first call.

        Raises:
            ConfigError: something public in the contract is no RPC; the text lists all of it.
            InvalidArgument: not the name of a service.
        """
        methods = read_contract(cast("type", contract), name)
        namespace = {method.attribute: _stub_method(method) for method in methods}
        stub = type(f"{getattr(contract, '__name__', 'Client')}Stub", (_Stub,), namespace)
        return cast("T", stub(self, check_service(service), Options()))

    @overload
    async def call(
        self,
        service: str,
        endpoint: str,
        request: object = None,
        *,
        returns: type[T],
        timeout: float | None = None,
        metadata: Mapping[str, str] = ...,
        content_type: str | None = None,
        idempotent: bool = False,
        address: str = "",
        selector: Selector | None = None,
    ) -> T: ...

    @overload
    async def call(
        self,
        service: str,
        endpoint: str,
        request: object = None,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] = ...,
        content_type: str | None = None,
        idempotent: bool = False,
        address: str = "",
        selector: Selector | None = None,
    ) -> Any: ...

    async def call(
        self,
        service: str,
        endpoint: str,
        request: object = None,
        *,
        returns: Any = Any,
        timeout: float | None = None,
        metadata: Mapping[str, str] = _NO_METADATA,
        content_type: str | None = None,
        idempotent: bool = False,
        address: str = "",
        selector: Selector | None = None,
    ) -> Any:
        """Call ``endpoint`` (``Handler.Method``) of ``service``; the reply is a ``returns``.

        An AsyncIterator as ``request`` is sent message by message, for an endpoint that takes a
        stream and gives one reply. ``timeout`` is in seconds, the service's ``request_timeout`` by
        default; inside a handler never longer than the handler's own. ``bytes`` and protobuf
        messages travel as they are, other requests as JSON, unless ``content_type`` says otherwise;
        the reply travels alike. An ``idempotent`` call may be executed twice. ``address`` is that
        of a node, ``host:port``: it is called without asking the registry. ``selector`` chooses
        among the nodes; make one for many calls.

        Raises:
            ServiceNotFound: no node is registered; names similar ones that are.
            EndpointNotFound: the node has no such endpoint.
            DeadlineExceeded: there was no reply in time; it may have been executed.
            Unavailable: the node, or the registry, cannot be reached.
            DecodeError: the reply is not what ``returns`` says.
            InvalidArgument: the endpoint, the metadata or the request cannot be sent.
            UnsupportedContentType: not known, or none that holds a ``returns``.
            MicroError: whatever else the handler raised.
        """
        options = Options(timeout=timeout, metadata=metadata, address=address, selector=selector)
        if isinstance(request, AsyncIterator):
            form = self._form_of(endpoint, "client", request, returns, content_type)
            return await self._collect(form, service, request, options)
        form = self._form_of(endpoint, "unary", request, returns, content_type)
        return await self._unary(form, service, request, options, idempotent=idempotent)

    @overload
    def stream(
        self,
        service: str,
        endpoint: str,
        request: object = None,
        *,
        returns: type[T],
        timeout: float | None = None,
        metadata: Mapping[str, str] = ...,
        content_type: str | None = None,
        address: str = "",
        selector: Selector | None = None,
    ) -> AbstractAsyncContextManager[Stream[T]]: ...

    @overload
    def stream(
        self,
        service: str,
        endpoint: str,
        request: object = None,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] = ...,
        content_type: str | None = None,
        address: str = "",
        selector: Selector | None = None,
    ) -> AbstractAsyncContextManager[Stream[Any]]: ...

    def stream(
        self,
        service: str,
        endpoint: str,
        request: object = None,
        *,
        returns: Any = Any,
        timeout: float | None = None,
        metadata: Mapping[str, str] = _NO_METADATA,
        content_type: str | None = None,
        address: str = "",
        selector: Selector | None = None,
    ) -> AbstractAsyncContextManager[Stream[Any]]:
        """Open a stream of replies; ``request`` is one message, or an AsyncIterator of many.

        Use it as ``async with client.stream(...) as replies: async for reply in replies: ...``;
        leaving the block before the last reply cancels the call at the server. The end of
        ``request`` is told to the server, which may go on. A stream may run for as long as it
        likes, unless ``timeout`` says how long, in seconds, or a handler's own deadline does.
        The rest is as with ``call``, also what is raised: where the replies are read.
        """
        kind: Kind = "bidi" if isinstance(request, AsyncIterator) else "server"
        form = self._form_of(endpoint, kind, request, returns, content_type)
        options = Options(timeout=timeout, metadata=metadata, address=address, selector=selector)
        return self._stream(form, service, request, options)

    @asynccontextmanager
    async def watch(self, service: str | None) -> AsyncIterator[Watch]:
        """A live view of the nodes of ``service`` (None: of all); see Watch.

        Raises:
            Unavailable: the registry cannot be reached.
        """
        view = await self._routes.hold(service)
        try:
            async with view.watch() as watch:
                yield watch
        finally:
            await self._routes.release(service)

    @property
    def counts(self) -> Counts:
        """What it decided about calls: repetitions, ejections, calls held back."""
        return self._routes.counts

    async def registered(self) -> Registry:
        """The registry, connected: for one question, where a watch would be too much."""
        return await self._means().registry()

    async def aclose(self) -> None:
        """End watches and channels; calls that run fail. A second call does nothing."""
        await self._routes.aclose()
        self._deadlines.close()

    # one call

    def _form_of(
        self, endpoint: str, kind: Kind, request: object, returns: Any, content_type: str | None
    ) -> Form:
        if not ENDPOINT.fullmatch(endpoint):
            raise InvalidArgument(f"endpoint {endpoint[:80]!r}: write Handler.Method")
        if content_type is None:
            streams = kind in ("client", "bidi")
            content_type = content_type_of(returns if streams else type(request))
        return self._form(endpoint, kind, content_type, returns)

    async def _unary(
        self, form: Form, service: str, request: Any, options: Options, *, idempotent: bool
    ) -> Any:
        body = form.encode(request)
        began = time.monotonic()
        call = self._call(form, service, options, began, idempotent=idempotent)
        limit = Limit(self._deadlines, call.deadline or math.inf)
        try:
            with limit:
                reply = await self._send(call, body)
        except TimeoutError:
            if not limit.expired:
                raise
            raise late(call, began) from None
        return form.decode(reply.body)  # type: ignore[arg-type] # of a unary call it is bytes

    async def _collect(
        self, form: Form, service: str, requests: AsyncIterator[Any], options: Options
    ) -> Any:
        """A stream of requests, one reply."""
        began = time.monotonic()
        call = self._call(form, service, options, began, idempotent=False)
        limit = Limit(self._deadlines, cast("float", call.deadline))
        try:
            with limit:
                async with self._opened(call, encoded(requests, form.encode)) as reply:
                    return form.decode(cast("bytes", reply.body))
        except TimeoutError:
            if not limit.expired:
                raise
            raise late(call, began) from None

    @asynccontextmanager
    async def _stream(
        self, form: Form, service: str, request: Any, options: Options
    ) -> AsyncIterator[Stream[Any]]:
        encode = form.encode
        body = encoded(request, encode) if form.kind == "bidi" else once(encode(request))
        call = self._call(form, service, options, time.monotonic(), idempotent=False)
        async with self._opened(call, body) as reply:
            replies = decoded(cast("AsyncIterator[bytes]", reply.body), form.decode)
            try:
                yield Stream(replies, reply)
            finally:
                await replies.aclose()

    async def _replies(
        self, form: Form, service: str, request: Any, options: Options
    ) -> AsyncGenerator[Any, None]:
        """The replies alone; closing it leaves the stream."""
        async with self._stream(form, service, request, options) as replies:
            async for reply in replies:
                yield reply

    @asynccontextmanager
    async def _opened(self, call: Call, body: AsyncGenerator[bytes, None]) -> AsyncIterator[Reply]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(body.aclose)
            before = STACK.set(stack)
            try:
                reply = await self._send(call, body)
            finally:
                STACK.reset(before)
            yield reply

    def _call(
        self, form: Form, service: str, options: Options, began: float, *, idempotent: bool
    ) -> Call:
        timeout = form.timeout if options.timeout is None else options.timeout
        if timeout is None:
            unary = form.kind in ("unary", "client")
            timeout = self._means().request_timeout if unary else math.inf
        call = Call(
            service=service,
            endpoint=form.endpoint,
            kind=form.kind,
            content_type=form.content_type,
            metadata={**options.metadata} if options.metadata else {},
            deadline=began + timeout,
            idempotent=idempotent or form.idempotent,
            address=options.address,
            selector=options.selector,
        )
        handled = current()
        if handled is not None:
            inherit(call, handled)
        if call.deadline == math.inf:
            call.deadline = None
        return call


class _Stub:
    """A typed client; its methods are added by the contract."""

    def __init__(self, client: Client, service: str, options: Options) -> None:
        self._micro = (client, service, options)


def _stub_method(method: Method) -> Callable[..., Any]:
    form = Form(
        method.endpoint,
        method.kind,
        method.content_type,
        method.response,
        timeout=method.timeout,
        idempotent=method.idempotent,
    )
    one_message = method.fields is None
    # Neither is a coroutine function: what the client's own method returns is awaited, or read.
    if method.kind in ("server", "bidi"):

        def invoke(self: _Stub, /, *args: Any, **kwargs: Any) -> Any:
            client, service, options = self._micro
            return client._replies(form, service, method.pack(args, kwargs), options)

    elif method.kind == "client":

        def invoke(self: _Stub, /, *args: Any, **kwargs: Any) -> Any:
            client, service, options = self._micro
            return client._collect(form, service, method.pack(args, kwargs), options)

    else:

        def invoke(self: _Stub, /, *args: Any, **kwargs: Any) -> Any:
            client, service, options = self._micro
            simple = one_message and len(args) == 1 and not kwargs
            request = args[0] if simple else method.pack(args, kwargs)
            return client._unary(form, service, request, options, idempotent=False)

    invoke.__name__ = method.attribute
    invoke.__doc__ = method.doc
    return invoke


def using(
    client: T,
    *,
    timeout: float | None = None,
    metadata: Mapping[str, str] | None = None,
    address: str = "",
    selector: Selector | None = None,
) -> T:
    """A typed client like ``client``, whose calls have this timeout (seconds) and this metadata.

    ``address`` is that of the one node to call, ``host:port``; ``selector`` chooses among all. What
    is not given stays; metadata is added to what is there. ``client`` itself does not change.

    Raises:
        TypeError: not a typed client.
    """
    if not isinstance(client, _Stub):
        raise TypeError(f"micro.using() takes a typed client, not {type(client).__name__}")
    inner, service, options = client._micro
    merged = Options(
        timeout=options.timeout if timeout is None else timeout,
        metadata={**options.metadata, **checked_metadata(metadata or {})},
        address=address or options.address,
        selector=selector or options.selector,
    )
    return cast("T", type(client)(inner, service, merged))
