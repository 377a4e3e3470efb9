"""The multicast group of mDNS: two sockets, every network interface that is up."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import struct
from collections.abc import Callable

from micro.errors import Unavailable

_log = logging.getLogger("micro.mdns")

Source = tuple[str, int]

_GROUP = "224.0.0.251"
_PORT = 5353
_ANY = "0.0.0.0"  # noqa: S104 - a question of one interface or another is not for one address
#: As RFC 6762 has it, for all who are on the link; and the one that no host lets out.
_HOPS = 255
_HOPS_HERE = 0
#: What may come while the loop is busy; the kernel gives as much of it as it allows.
_BUFFER = 4 * 1024 * 1024
_HOSTS = 1024
_WAY_OUT = (
    "bring an interface up, or use another registry: "
    "--registry memory, or MICRO_REGISTRY=memory, works inside one process; "
    "etcd://host:2379, of micro-plugin-etcd, wherever an etcd is"
)


#: Gets a packet, where it is from, and whether it came to the port that questions are asked from.
Hear = Callable[[bytes, Source, bool], None]


class _Ear(asyncio.DatagramProtocol):
    def __init__(self, hear: Hear, *, asked: bool) -> None:
        self.closed = asyncio.get_running_loop().create_future()
        self.transport: asyncio.BaseTransport | None = None
        self._hear = hear
        self._asked = asked

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Source) -> None:
        self._hear(data, (addr[0], addr[1]), self._asked)

    def error_received(self, exc: Exception) -> None:
        _log.debug("mdns: %s", exc)

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            _log.error("mdns: a socket broke: %s", exc)
        if not self.closed.done():
            self.closed.set_result(None)


class Link:
    """Where packets come from and go to; ``hear`` gets each.

    Multicast to port 5353 reaches every socket there, but a packet to this host alone reaches only
    one of all processes. So questions are asked from a second socket, with a port of its own.
    """

    def __init__(self, hear: Hear) -> None:
        self._hear = hear
        self._sockets: list[socket.socket] = []
        self._ears: list[_Ear] = []
        self._interfaces: dict[int, bytes] = {}
        self._why = "there is none"
        self._alone = False
        self._local: dict[str, bool] = {}

    async def open(self) -> None:
        """Start to hear.

        Raises:
            Unavailable: there is no multicast here; the text says what to use instead.
        """
        try:
            self._sockets = [_socket() for _ in range(2)]
            self._bind()
            self.scan()
            self._check_reach()
            for sock in self._sockets:
                await self._listen(sock)
        except OSError as exc:
            await self.aclose()
            raise Unavailable(f"mdns: no multicast here ({exc}); {_WAY_OUT}") from exc
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Close both sockets, and wait until they are closed."""
        for ear in self._ears:
            if ear.transport is not None:
                ear.transport.close()
                await ear.closed
        for sock in self._sockets:
            sock.close()

    def scan(self) -> bool:
        """Join the group on every interface that takes it; True when one is new."""
        names = socket.if_nameindex()
        before = self._interfaces
        self._interfaces = {}
        self._local.clear()
        for index, name in names:
            try:
                self._interfaces[index] = self._join(index, name)
            except OSError as exc:
                self._why = f"{name}: {exc.strerror}"
        self._alone = all(name.startswith("lo") for i, name in names if i in self._interfaces)
        return bool(self._interfaces.keys() - before.keys())

    def ask(self, packet: bytes) -> None:
        """Send a question; the answers come back to this process alone.

        Raises:
            Unavailable: no interface took it.
        """
        self._send(self._sockets[1], packet, hops=_HOPS)

    def names(self) -> dict[int, str]:
        """The interfaces that take multicast: their names by their indexes."""
        return {i: name for i, name in socket.if_nameindex() if i in self._interfaces}

    def multicast(self, packet: bytes, *, only_here: bool, index: int | None = None) -> None:
        """Send to all who listen, or to those on this host; on the interface ``index``, or on all.

        Raises:
            Unavailable: no interface took it.
        """
        hops = _HOPS_HERE if only_here else _HOPS
        self._send(self._sockets[0], packet, hops=hops, index=index)

    def answer(self, packet: bytes, to: Source, *, only_here: bool) -> None:
        """Answer one who asked; who asks from the port of mDNS itself is answered before all."""
        try:
            if to[1] == _PORT:
                self.multicast(packet, only_here=only_here)
            else:
                # Not through a gateway: a forged question must not make us flood a far host.
                self._sockets[0].sendto(packet, socket.MSG_DONTROUTE, to)
        except (OSError, Unavailable) as exc:
            _log.debug("mdns: answer to %s: %s", to[0], exc)

    def is_own(self, source: Source) -> bool:
        """Whether this object sent a question from there."""
        return source[1] == self._asking and self.is_local(source[0])

    def is_local(self, host: str) -> bool:
        """Whether ``host`` is this host."""
        if self._alone:
            return True
        known = self._local.get(host)
        if known is None:
            if len(self._local) >= _HOSTS:
                self._local.clear()
            known = self._local[host] = host != _ANY and _can_bind(host)
        return known

    def _bind(self) -> None:
        self._sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._sockets[0].bind(("", _PORT))
        self._sockets[1].bind(("", 0))
        self._asking = self._sockets[1].getsockname()[1]

    async def _listen(self, sock: socket.socket) -> None:
        ear = _Ear(self._hear, asked=sock is self._sockets[1])
        self._ears.append(ear)
        loop = asyncio.get_running_loop()
        await loop.create_datagram_endpoint(lambda: ear, sock=sock)

    def _join(self, index: int, name: str) -> bytes:
        # Of its own, lo would send as 0.0.0.0 where it is the only interface.
        source = "127.0.0.1" if name.startswith("lo") else _ANY
        where = _membership(index, source)
        with _socket() as probe:
            probe.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, where)
            probe.connect((_GROUP, _PORT))
        try:
            self._sockets[0].setsockopt(
                socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, _membership(index, _ANY)
            )
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:  # that is: joined before
                raise
        return where

    def _send(
        self, sock: socket.socket, packet: bytes, *, hops: int, index: int | None = None
    ) -> None:
        sent = False
        for i, where in self._interfaces.items():
            if index not in (None, i):
                continue
            try:
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, where)
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, hops)
                sock.sendto(packet, (_GROUP, _PORT))
                sent = True
            except OSError as exc:
                self._why = str(exc.strerror)
        if not sent:
            raise Unavailable(f"mdns: nobody can be reached ({self._why}); {_WAY_OUT}")

    def _check_reach(self) -> None:
        if not self._interfaces:
            raise Unavailable(f"mdns: no interface takes multicast ({self._why}); {_WAY_OUT}")


def _socket() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)  # noqa: FBT003 - it takes no keyword
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
    return sock


def _membership(index: int, source: str) -> bytes:
    """The kernel's ``struct ip_mreqn``."""
    return struct.pack("@4s4si", socket.inet_aton(_GROUP), socket.inet_aton(source), index)


def _can_bind(host: str) -> bool:
    with _socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True
