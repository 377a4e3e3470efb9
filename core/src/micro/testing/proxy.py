"""A TCP proxy that does to connections what networks and dying peers do to them."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections import deque
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Self, get_args

from micro.testing._proxy_connection import Connection, Faults

Way = Literal["up", "down", "both"]
Which = Literal["all", "open", "new"]


class FaultProxy:
    """Stands in front of ``upstream`` (``host:port``), and passes every byte on until told not to.

    A fault lasts until ``heal``, or until it is set anew, which replaces it. It concerns one
    ``direction`` (``up`` is towards the upstream) or both, and of the ``connections`` those that
    are ``open``, those that will be ``new``, or all. What is counted or timed is so for each
    connection and direction on its own: ``reset_after(9)`` resets each connection as it passes 9
    further bytes in one direction, also those that are made after that.

    All chance comes from ``seed``. What waits is bounded: who does not read stalls its peer. An
    upstream that is not there is a reset of the client. The kernel acknowledges for the proxy: who
    waits for bytes sees a fault, TCP itself does not. A wrong argument is a ValueError.

    Example::

        async with FaultProxy("127.0.0.1:2379", seed=7) as proxy:
            client = await connect(proxy.address)
            proxy.blackhole()
            with pytest.raises(micro.Unavailable):
                await client.get("key")
            proxy.heal()
            assert await client.get("key"), proxy.log
    """

    #: ``127.0.0.1`` and a free port, from entering on; it stays the same.
    address: str

    def __init__(self, upstream: str, *, seed: int = 0) -> None:
        host, _, port = upstream.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"FaultProxy: {upstream!r} is not host:port")
        self._upstream = (host.strip("[]"), int(port))
        self._seed = seed
        self._chance = random.Random(seed)
        self._name = f"FaultProxy({upstream!r}, seed={seed})"
        self._log: deque[str] = deque(maxlen=1000)
        self._faults = {"up": Faults(), "down": Faults()}
        self._connections: set[Connection] = set()
        self._accepted = 0

    def __repr__(self) -> str:
        return self._name

    @property
    def log(self) -> str:
        """The last 1,000 faults and what they did, a line each, with its ``time.monotonic()``."""
        return "\n".join((self._name, *self._log))

    async def __aenter__(self) -> Self:
        self._listener = _bound(0)
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._listen()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._unlisten()
        self.cut()
        tasks = [connection.task for connection in self._connections]
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):  # the proxy's own mistake has to fail the test
                raise result

    def latency(
        self,
        seconds: float,
        *,
        jitter: float = 0.0,
        direction: Way = "both",
        connections: Which = "all",
    ) -> None:
        """Bytes, and that a side closes, arrive ``seconds`` ± ``jitter`` later, in their order."""
        self._set("latency", direction, connections, delay=seconds, jitter=jitter)

    def bandwidth(
        self, rate: float, *, direction: Way = "both", connections: Which = "all"
    ) -> None:
        """At most ``rate`` bytes a second."""
        self._set("bandwidth", direction, connections, rate=rate)

    def slice(self, size: int, *, direction: Way = "both", connections: Which = "all") -> None:
        """Chunks of at most ``size`` bytes, each sent on its own."""
        self._set("slice", direction, connections, size=size)

    def dup_chunk(self, *, direction: Way = "both", connections: Which = "all") -> None:
        """The next chunk comes twice."""
        self._set("dup_chunk", direction, connections, twice=True)

    def flip_bit(self, n: int, *, direction: Way = "both", connections: Which = "all") -> None:
        """One bit of the ``n``th further byte is wrong (1: of the next); ``seed`` chooses it."""
        mask = 1 << self._chance.randrange(8)
        self._set("flip_bit", direction, connections, flip_in=n, flip=mask)

    def reset_after(self, n: int, *, direction: Way = "both", connections: Which = "all") -> None:
        """Both peers get an RST once ``n`` further bytes passed (0: instead of the next)."""
        self._set("reset_after", direction, connections, end_in=n, fin=False)

    def cut_after(self, n: int, *, direction: Way = "both", connections: Which = "all") -> None:
        """Both peers get a FIN once ``n`` further bytes passed (0: instead of the next)."""
        self._set("cut_after", direction, connections, end_in=n, fin=True)

    def blackhole(self, direction: Way = "both", *, connections: Which = "all") -> None:
        """A partition: bytes vanish, and that a side closes; connections stay open.

        ``heal`` resets those that lost something: the stream after a hole would be a wrong one.
        """
        self._set("blackhole", direction, connections, hole=True)

    def half_open(self, direction: Way = "both", *, connections: Which = "all") -> None:
        """Before ``heal``, nobody hears that the other side closed or reset; bytes pass."""
        self._set("half_open", direction, connections, deaf=True)

    def refuse(self) -> None:
        """Nobody listens, as if the server were dead; open connections go on.

        The port stays bound, so that nobody else gets it.
        """
        self._note("refuse")
        port = self._listener.getsockname()[1]
        self._unlisten()
        self._listener = _bound(port)

    def cut(self) -> None:
        """Reset every open connection, in the next turn of the loop."""
        self._note(f"cut {len(self._connections)} connections")
        for connection in self._connections:
            connection.task.cancel()

    def heal(self) -> None:
        """End all faults. A connection that lost bytes is reset, every other one goes on."""
        self._note("heal")
        self._faults = {"up": Faults(), "down": Faults()}
        for connection in self._connections:
            connection.heal()
        self._listen()

    def _set(self, fault: str, direction: Way, connections: Which, **changes: Any) -> None:
        if direction not in get_args(Way) or connections not in get_args(Which):
            raise ValueError(
                f"FaultProxy: {fault}: no {direction!r}, or no {connections!r} connections"
            )
        for way in self._faults if direction == "both" else (direction,):
            changed = replace(self._faults[way], **changes)
            if connections != "open":
                self._faults[way] = changed
            if connections != "new":
                for pump in [connection.pumps[way] for connection in self._connections]:
                    pump.set(replace(pump.faults, **changes))
        what = ", ".join(f"{name} {value}" for name, value in changes.items())
        self._note(f"{fault}: {what}; direction {direction}, connections {connections}")

    def _listen(self) -> None:
        self._listener.listen(1024)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _unlisten(self) -> None:
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        self._accepted += 1
        connection = Connection(
            client,
            self._upstream,
            self._faults,
            seed=f"{self._seed} {self._accepted}",
            note=partial(self._note, f"#{self._accepted}"),
        )
        self._connections.add(connection)
        connection.task.add_done_callback(lambda task: self._ended(connection, task))

    def _ended(self, connection: Connection, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is None:  # else __aexit__ raises it
            self._connections.discard(connection)

    def _note(self, *what: str) -> None:
        self._log.append(f"{time.monotonic():.3f} {' '.join(what)}")


def _bound(port: int) -> socket.socket:
    """A socket that owns the port. Who connects is refused until it listens."""
    sock = socket.socket()
    sock.settimeout(0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    return sock
