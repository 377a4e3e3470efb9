"""The one port of a server, and the protocols that share it."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar, cast

from micro.call import Handler
from micro.errors import ConfigError
from micro.transport import UNIX, Limits, Listener, Transport, split_address

if TYPE_CHECKING:
    from ssl import SSLContext

#: Most bytes that a protocol needs to know its own.
_HEAD = 24
#: Seconds between two looks at the connections of a port.
_SWEEP = 0.5
#: Seconds that cancelled handlers have to end when their port closes, and peers to hear of it.
_LAST_WAIT = 0.3


class SocketTransport(Transport):
    """A transport whose server reads bytes of a connection: it can share a port with others."""

    #: Its name in the negotiation of TLS (ALPN); "" takes clients that negotiate none.
    alpn: ClassVar[str] = ""
    #: Whether it takes what nobody knows, to say what is wrong: it is asked after all others.
    takes_the_rest: ClassVar[bool] = False

    @abstractmethod
    def claims(self, head: bytes) -> bool | None:
        """Whether a connection that begins with ``head`` is its own; None: it needs more to know.

        It knows with 24 bytes.
        """

    @abstractmethod
    def accept(self, handler: Handler, limits: Limits) -> Session:
        """The server's side of one connection; also a Protocol or a BufferedProtocol, never both.

        The port hands it the connection, then the bytes that were read already.
        """

    async def listen(
        self, address: str, handler: Handler, limits: Limits, *, tls: SSLContext | None = None
    ) -> Listener:
        return await open_port(address, (self,), handler, limits, tls=tls)


class Session(asyncio.BaseProtocol, ABC):
    """The server's side of one accepted connection, from its first bytes to its end."""

    #: The moment of ``time.monotonic()`` at which its port calls ``expire``.
    expires: float
    #: Who wants to know of its end; set before the connection is made.
    port: _Port

    def __init__(self) -> None:
        self.expires = math.inf

    def connection_lost(self, exc: Exception | None) -> None:
        """Whoever overrides it calls this too."""
        self.port.lost(self)

    @abstractmethod
    def drain(self) -> None:
        """Announce the end, take no new call, finish what runs, then close."""

    def stop(self) -> None:
        """Tell who still waits that the server has stopped, and close; ``abort`` follows soon."""
        self.abort()

    @abstractmethod
    def expire(self) -> None:
        """The peer is too slow, or silent for too long; may set ``expires`` anew."""

    @abstractmethod
    def abort(self) -> None:
        """Close at once."""

    @abstractmethod
    def running(self) -> Collection[asyncio.Task[None]]:
        """The tasks of its handlers; the port cancels them when the connection is lost."""


async def open_port(
    address: str,
    transports: Sequence[SocketTransport],
    handler: Handler,
    limits: Limits,
    *,
    tls: SSLContext | None = None,
) -> Listener:
    """One port for all of ``transports``; the first that claims a connection gets it.

    Those that take the rest are asked last, in whatever order they are given.

    A client speaks first; one whose protocol is not known after ``limits.head_timeout`` is closed.
    Under TLS the negotiated protocol decides (ALPN), where there is one.

    Raises:
        ConfigError: the address cannot be listened at; the text says why and what to do.
    """
    port = _Port(transports, handler, limits)
    try:
        await port.open(*split_address(address), tls)
    except OSError as exc:
        why = exc.strerror or str(exc) if address.startswith(UNIX) else _why(exc)
        raise ConfigError(f"cannot listen at {address}: {why}") from exc
    return port


class _Port(Listener):
    """The open socket and its connections; one timer serves the time limits of all of them."""

    def __init__(
        self, transports: Sequence[SocketTransport], handler: Handler, limits: Limits
    ) -> None:
        self.address: str = ""
        self.transports: list[SocketTransport] = sorted(
            transports, key=lambda one: one.takes_the_rest
        )
        self.handler = handler
        self.limits = limits
        self._sessions: set[Session] = set()
        self._draining = False
        self._quiet = asyncio.Event()
        self._cancelled: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._path = ""

    async def open(self, host: str, port: int, tls: SSLContext | None) -> None:
        loop = asyncio.get_running_loop()
        within = None
        if tls is not None:
            tls.set_alpn_protocols([one.alpn for one in self.transports if one.alpn])
            within = self.limits.head_timeout
        # Not started by these, which lose the open socket when they are cancelled.
        if port < 0:
            self._path = host
            _remove_stale(host)
            self._server = await loop.create_unix_server(
                self._made,
                host,
                backlog=1024,
                ssl=tls,
                ssl_handshake_timeout=within,
                start_serving=False,
            )
            self.address = UNIX + host
        else:
            self._server = await loop.create_server(
                self._made,
                host,
                port,
                backlog=1024,
                ssl=tls,
                ssl_handshake_timeout=within,
                start_serving=False,
            )
            bound = self._server.sockets[0].getsockname()
            name = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
            self.address = f"{name}:{bound[1]}"
        try:
            await self._server.start_serving()
        except BaseException:
            self._stop_listening()
            raise
        self._sweep()

    async def drain(self, grace: float) -> None:
        self._stop_listening()
        for session in tuple(self._sessions):
            session.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._all_gone()

    async def aclose(self) -> None:
        self._stop_listening()
        if self._timer is not None:
            self._timer.cancel()
        for session in tuple(self._sessions):
            tasks = session.running()
            session.stop()
            for task in tasks:
                self.cancel(task)
        try:
            with suppress(TimeoutError):  # neither a peer nor a handler holds the process
                async with asyncio.timeout(_LAST_WAIT):
                    await self._all_gone()
                    if self._cancelled:
                        await asyncio.wait(self._cancelled)
        finally:
            for session in tuple(self._sessions):
                session.abort()
                self.lost(session)

    async def _all_gone(self) -> None:
        while self._sessions:
            self._quiet.clear()
            await self._quiet.wait()

    def admit(self, session: Session) -> bool:
        """Whether one more connection is taken."""
        if self._draining or len(self._sessions) >= self.limits.connections:
            return False
        self._sessions.add(session)
        return True

    def hand_over(
        self, before: Session, transport: asyncio.Transport, to: SocketTransport
    ) -> Session:
        """Make the session of a protocol the owner of a connection."""
        session = to.accept(self.handler, self.limits)
        session.port = self
        self._sessions.discard(before)
        self._sessions.add(session)
        # The loops look at the kind of a protocol when they begin to read.
        transport.pause_reading()
        transport.set_protocol(session)
        session.connection_made(transport)
        transport.resume_reading()
        return session

    def lost(self, session: Session) -> None:
        """A connection has ended: nobody waits for what still runs."""
        self._sessions.discard(session)
        self._quiet.set()
        for task in tuple(session.running()):
            self.cancel(task)

    def cancel(self, task: asyncio.Task[None]) -> None:
        """Cancel a handler for which nobody waits; once: its clean-up may wait for something."""
        if task not in self._cancelled:
            self._cancelled.add(task)
            task.add_done_callback(self._cancelled.discard)
            task.cancel()

    def _made(self) -> Session:
        session = _Undecided(self.limits.head_timeout)
        session.port = self
        return session

    def _stop_listening(self) -> None:
        if self._draining:
            return
        self._draining = True
        if self._path:  # first: once it is closed, the path may be another's
            _remove(self._path)
        self._server.close()

    def _sweep(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_SWEEP, self._sweep)
        now = time.monotonic()
        for session in tuple(self._sessions):
            if now > session.expires:
                session.expire()


class _Undecided(Session, asyncio.Protocol):
    """A connection until its first bytes tell its protocol."""

    def __init__(self, within: float) -> None:
        super().__init__()
        self.expires = time.monotonic() + within
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        if not self.port.admit(self):
            self._transport.abort()
            return
        secure = transport.get_extra_info("ssl_object")
        negotiated = secure.selected_alpn_protocol() if secure is not None else None
        for candidate in self.port.transports:
            if negotiated and candidate.alpn == negotiated:
                self.port.hand_over(self, self._transport, candidate)
                return

    def data_received(self, data: bytes) -> None:
        self._head += data
        head = self._head[:_HEAD]
        for candidate in self.port.transports:
            claimed = candidate.claims(head)
            if claimed:
                session = self.port.hand_over(self, self._transport, candidate)
                _feed(session, self._head)
                return
            if claimed is None and len(head) < _HEAD:
                return
        self.abort()

    def drain(self) -> None:
        self.abort()

    def expire(self) -> None:
        self.abort()

    def abort(self) -> None:
        self._transport.abort()

    def running(self) -> Collection[asyncio.Task[None]]:
        return ()


def _feed(session: Session, data: bytes) -> None:
    """Hand a session bytes that were read before it was there."""
    if isinstance(session, asyncio.Protocol):
        session.data_received(data)
        return
    assert isinstance(session, asyncio.BufferedProtocol)
    while data:
        buffer = memoryview(session.get_buffer(len(data)))
        count = min(len(buffer), len(data))
        buffer[:count] = data[:count]
        session.buffer_updated(count)
        data = data[count:]


def _remove_stale(path: str) -> None:
    """Remove the socket of a process that has gone; asyncio removes one that lives, too."""
    import socket
    import stat

    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EEXIST, "there is a file that is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)  # noqa: FBT003 - it has no name; a full backlog would block
            probe.connect(path)
    except ConnectionRefusedError:
        _remove(path)
    except FileNotFoundError:
        return
    except BlockingIOError:
        raise OSError(errno.EADDRINUSE, "another process listens there") from None
    else:
        raise OSError(errno.EADDRINUSE, "another process listens there")


def _remove(path: str) -> None:
    from pathlib import Path

    Path(path).unlink(missing_ok=True)


def _why(exc: OSError) -> str:
    if exc.errno == errno.EADDRINUSE:
        return "the port is in use; choose another, or port 0 for a free one"
    if exc.errno == errno.EADDRNOTAVAIL or "could not bind on any" in str(exc):  # 3.13
        return "this machine has no such address; 127.0.0.1 and 0.0.0.0 always exist"
    if exc.errno == errno.EACCES:
        return "permission denied; ports below 1024 need more rights"
    return exc.strerror or str(exc)
