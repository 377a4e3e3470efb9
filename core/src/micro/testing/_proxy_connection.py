"""One connection through the fault proxy: what befalls it, and the bytes of both directions."""

from __future__ import annotations

import asyncio
import math
import random
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

#: Bytes of one read, and how many reads may wait: at most 1 MiB a direction of a connection.
_CHUNK = 4096
_CHUNKS = 256
#: Seconds that the upstream has to accept, and that peers have to close once they are cut.
_DIAL = 5.0
_LINGER = 0.5
_RST_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, for 0 seconds
_NEVER = sys.maxsize
_LEAST = {"delay": 0, "jitter": 0, "rate": 1, "size": 1, "flip_in": 1, "end_in": 0}


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What befalls one direction of one connection; ``_in`` counts down to the byte concerned."""

    delay: float = 0.0
    jitter: float = 0.0
    rate: float = math.inf
    size: int = _CHUNK
    twice: bool = False
    flip_in: int = _NEVER
    flip: int = 0
    end_in: int = _NEVER
    fin: bool = False
    hole: bool = False
    deaf: bool = False

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                value = getattr(self, name)
                raise ValueError(f"FaultProxy: {name} is {value}, it has to be {least} or more")

    def piece(self) -> int:
        """Bytes to pass at once; a narrow band is a steady flow, not a chunk now and then."""
        return min(self.size, self.end_in, max(1, int(min(self.rate / 20, _CHUNK))))

    def spoil(self, piece: bytes) -> bytes:
        if self.flip_in <= len(piece):
            spoilt = bytearray(piece)
            spoilt[self.flip_in - 1] ^= self.flip
            piece = bytes(spoilt)
        return piece * 2 if self.twice else piece

    def after(self, passed: int) -> Faults:
        if self.flip_in == self.end_in == _NEVER and not self.twice:
            return self  # nothing counts; a copy for each byte would be most of what slices cost
        flip_in = self.flip_in - passed if self.flip_in > passed else _NEVER
        return replace(self, end_in=self.end_in - passed, flip_in=flip_in, twice=False)


class _Cut(Exception):
    """A fault ends the connection with a FIN to both peers."""


class Connection:
    """An accepted connection and the one made for it; its task owns both sockets.

    The task ends by itself when both peers have closed. Cancelled, it resets both.
    """

    def __init__(
        self,
        client: socket.socket,
        upstream: tuple[str, int],
        faults: Mapping[str, Faults],
        *,
        seed: str,
        note: Callable[..., None],
    ) -> None:
        self._upstream = upstream
        self._note = note
        self._reset = True
        server = socket.socket(socket.AF_INET6 if ":" in upstream[0] else socket.AF_INET)
        self._sockets = (client, server)
        for sock in self._sockets:
            sock.settimeout(0)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        up = _Pump(client, server, faults["up"], f"{seed} up", partial(note, "up:"))
        down = _Pump(server, client, faults["down"], f"{seed} down", partial(note, "down:"))
        up.back, down.back = down, up
        self.pumps = {"up": up, "down": down}
        self.task = asyncio.create_task(self._run(), name=f"micro.testing.proxy {seed}")
        # No finally of the task's: that does not run if it is cancelled before it began.
        self.task.add_done_callback(self._close)

    def heal(self) -> None:
        if any(pump.lost for pump in self.pumps.values()):
            self._note("reset, as bytes of it were lost")
            self.task.cancel()
        for pump in self.pumps.values():
            pump.set(Faults())

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_DIAL):
                await loop.sock_connect(self._sockets[1], self._upstream)
            async with asyncio.TaskGroup() as tasks:
                for pump in self.pumps.values():
                    tasks.create_task(pump.read())
                    tasks.create_task(pump.write())
            self._reset = False
        except* _Cut:
            self._note("FIN to both")
            self._reset = False
            await self._say_goodbye()
        except* OSError as group:
            self._note(f"RST to both: {group.exceptions[0]}")

    def _close(self, _: asyncio.Task[None]) -> None:
        for sock in self._sockets:
            if self._reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
            sock.close()

    async def _say_goodbye(self) -> None:
        """Send a FIN to both, and read on: to close with something unread would be an RST."""
        loop = asyncio.get_running_loop()
        for sock in self._sockets:
            _shutdown(sock)
        with suppress(OSError):
            async with asyncio.timeout(_LINGER):
                for sock in self._sockets:
                    while await loop.sock_recv(sock, _CHUNK):
                        pass


class _Pump:
    """One direction of one connection: ``read`` takes what comes, ``write`` passes it on.

    They are two, so that a delay holds each byte up as long, however many follow.
    """

    back: _Pump  # the other direction

    def __init__(
        self,
        source: socket.socket,
        sink: socket.socket,
        faults: Faults,
        seed: str,
        note: Callable[..., None],
    ) -> None:
        self.faults = faults
        self.lost = False
        self.ended = False
        self.broken: OSError | None = None  # what reading from the source, or sending to it, met
        self._source = source
        self._sink = sink
        self._chance = random.Random(seed)
        self._note = note
        self._changed = asyncio.Event()
        self._queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_CHUNKS)
        self._last = (0.0, 0)  # when a piece was passed on, and its size

    def set(self, faults: Faults) -> None:
        self.faults = faults
        self._changed.set()

    async def read(self) -> None:
        loop = asyncio.get_running_loop()
        data = b"something"
        while data:
            try:
                data = await loop.sock_recv(self._source, _CHUNK)
            except OSError as exc:
                self.broken, data = exc, b""
            await self._queue.put((time.monotonic(), data))

    async def write(self) -> None:
        data = b"something"
        while data:
            arrived, data = await self._queue.get()
            chance = self._chance.uniform(-1, 1)
            await self._until_due(arrived, chance)
            rest = data
            while rest:
                piece = rest[: self.faults.piece()]
                rest = rest[len(piece) :]
                await self._pass(piece)
                await self._until_due(arrived, chance)
        await self._end()

    async def _until_due(self, arrived: float, chance: float) -> None:
        while (left := self._due(arrived, chance) - time.monotonic()) > 0:
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._changed.wait()

    def _due(self, arrived: float, chance: float) -> float:
        last, size = self._last
        delay = max(0.0, self.faults.delay + chance * self.faults.jitter)
        return max(arrived + delay, last + size / self.faults.rate)

    async def _pass(self, piece: bytes) -> None:
        faults = self.faults
        self.faults = faults.after(len(piece))  # what is set meanwhile concerns what follows
        self._last = (time.monotonic(), len(piece))
        spoilt = faults.spoil(piece)
        if spoilt != piece:
            how = "with a wrong bit" if len(spoilt) == len(piece) else "twice"
            self._note(f"{len(piece)} bytes passed {how}")
        await self._send(spoilt)
        if not self.faults.end_in:
            raise _Cut if self.faults.fin else ConnectionResetError("as asked")
        await asyncio.sleep(0)  # a send that succeeds at once lets nobody else run

    async def _send(self, piece: bytes) -> None:
        if self.faults.hole:
            self._lose("vanished")
            return
        try:
            await asyncio.get_running_loop().sock_sendall(self._sink, piece)
        except OSError as exc:
            if self.back.ended:
                raise
            # What the receiver said before it went comes first, and a fault may withhold its end.
            self.back.broken = exc
            self._lose("found nobody")

    def _lose(self, how: str) -> None:
        if not self.lost:
            self.lost = True
            self._note(f"bytes {how}")

    async def _end(self) -> None:
        """Pass on that the source closed, or reset, once no fault withholds it."""
        while self.faults.hole or self.faults.deaf:
            if self.faults.hole:
                self._lose("and the end vanished")
            self._changed.clear()
            await self._changed.wait()
        self.ended = True
        if self.broken:
            raise self.broken
        _shutdown(self._sink)


def _shutdown(sock: socket.socket) -> None:
    with suppress(OSError):  # its peer has reset it
        sock.shutdown(socket.SHUT_WR)
