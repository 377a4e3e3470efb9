"""A registry server that is only imagined, with faults that befall it: memory's, behind gates."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from typing import ClassVar, TypeVar

from tests.faults.faults import Fault, Where

from micro.backend import Connections
from micro.backends.memory import MemoryRegistry
from micro.errors import Closed, Gap, ServiceNotFound, Unavailable
from micro.registry import Change, Node, Registry, RegistryFeatures, Snapshot
from micro.url import URL

T = TypeVar("T")

#: Seconds after which a call, and a stream, give up a server that says nothing.
TIMEOUT = 5.0
SILENCE = 4.0
#: Seconds that an answer takes at most.
_LATENCY = 0.01


class Gate:
    """Lets through, refuses or says nothing; so may a server, and the link of a client to it."""

    def __init__(self) -> None:
        self.refuses = False
        self.silent = False
        self._cuts = 0
        self._heard = asyncio.Event()
        self._streams: set[_Stream] = set()
        self._silence: asyncio.TimerHandle | None = None

    @property
    def known_silent(self) -> float | None:
        """When streams give it up, if it is silent."""
        return None if self._silence is None else self._silence.when()

    @property
    def cuts(self) -> int:
        """How often what was open has been reset."""
        return self._cuts

    def refuse(self) -> None:
        self.refuses = True
        self.cut()

    def be_silent(self) -> None:
        self.silent = True
        self._heard.clear()
        self._silence = asyncio.get_running_loop().call_later(SILENCE, self._end_streams)

    def cut(self) -> None:
        self._cuts += 1
        self._end_streams()
        self._speak()

    def heal(self, *, cut: bool) -> None:
        """What waits goes on, or is reset."""
        self.refuses = self.silent = False
        if cut:
            self.cut()
        self._speak()

    async def passes(self, *, until: float | None = None) -> None:
        """Wait for it, ``until`` a moment of the loop's time.

        Raises:
            Unavailable: it refuses, says nothing for too long, or resets.
        """
        cuts = self._cuts
        if self.silent:
            until = until or asyncio.get_running_loop().time() + TIMEOUT
            try:
                async with asyncio.timeout_at(until):
                    await self._heard.wait()
            except TimeoutError:
                raise Unavailable("no answer") from None
        if self.refuses or self._cuts != cuts:
            raise Unavailable("refused or reset")

    def enter(self, stream: _Stream) -> None:
        self._streams.add(stream)

    def leave(self, stream: _Stream) -> None:
        self._streams.discard(stream)

    def _speak(self) -> None:
        self._heard.set()
        if self._silence is not None:
            self._silence.cancel()

    def _end_streams(self) -> None:
        for stream in tuple(self._streams):
            stream.end()


class _Stream(MemoryRegistry):
    """Follows once, until somebody ends it."""

    def end(self) -> None:
        nodes, self._state = self._state, None
        if nodes is not None:
            nodes.wake()


class Imagined:
    """The server. It keeps its data while it is dead, and its nodes' times to live run on."""

    def __init__(self, chance: random.Random, ttl: float) -> None:
        self.gate = Gate()
        self.links: dict[Where, Gate] = {"nodes": Gate(), "callers": Gate()}
        self.steady = Gate()
        self.chance = chance
        #: What tells one server's data from those of another that took its place.
        self.epoch = 0
        self._ttl = ttl
        self._data = Connections()
        self.inside: MemoryRegistry

    async def start(self) -> None:
        self.inside = await self._connected(MemoryRegistry)

    async def aclose(self) -> None:
        await self.inside.aclose()
        await self._data.aclose()

    def registry(self, where: Where) -> ImaginedRegistry:
        """A client's; one of ``server`` has a link without faults."""
        return ImaginedRegistry(self, self.links.get(where, self.steady))

    async def nodes(self) -> list[Node]:
        """All that it has, behind the gates."""
        return [
            node
            for service in await self.inside.services()
            for node in await self.inside.get(service)
        ]

    async def stream(self) -> _Stream:
        return await self._connected(_Stream)

    async def befall(self, fault: Fault) -> None:
        if fault.where == "server":
            await _OF_SERVER[fault.kind](self, fault.seconds)
        else:
            await _OF_LINK[fault.kind](self.links[fault.where], fault.seconds)

    async def _replace(self, nodes: Sequence[Node]) -> None:
        """Have no other data than ``nodes``."""
        await self.aclose()
        self._data = Connections()
        self.epoch += 1
        await self.start()
        for node in nodes:
            await self.inside.register(node, ttl=self._ttl)

    async def _connected(self, kind: type[M]) -> M:
        registry = kind(URL.parse("memory"))
        await registry.connect(self._data)
        return registry

    # -- faults; each is over when it returns

    async def _kill(self, seconds: float) -> None:
        self.gate.refuse()
        await asyncio.sleep(seconds)
        self.gate.heal(cut=False)

    async def _lose_data(self, seconds: float) -> None:
        self.gate.refuse()
        await asyncio.sleep(seconds)
        await self._replace([])
        self.gate.heal(cut=False)

    async def _go_back(self, seconds: float) -> None:
        backup = await self.nodes()
        await asyncio.sleep(seconds)
        self.gate.refuse()
        await self._replace(backup)
        await asyncio.sleep(_LATENCY)
        self.gate.heal(cut=False)

    async def _pause(self, seconds: float) -> None:
        self.gate.be_silent()
        await asyncio.sleep(seconds)
        self.gate.heal(cut=False)

    async def _compact(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        nodes = self.inside._state
        assert nodes is not None
        nodes.changes.clear()


M = TypeVar("M", bound=MemoryRegistry)


async def _refuse(link: Gate, seconds: float) -> None:
    link.refuse()
    await asyncio.sleep(seconds)
    link.heal(cut=False)


async def _blackhole(link: Gate, seconds: float) -> None:
    link.be_silent()
    await asyncio.sleep(seconds)
    link.heal(cut=True)


async def _cut(link: Gate, seconds: float) -> None:
    for _ in range(max(1, round(seconds / 0.2))):
        link.cut()
        await asyncio.sleep(0.2)


_OF_SERVER: dict[str, Callable[[Imagined, float], Awaitable[None]]] = {
    "kill": Imagined._kill,
    "lose data": Imagined._lose_data,
    "go back": Imagined._go_back,
    "pause": Imagined._pause,
    "compact": Imagined._compact,
}
_OF_LINK: dict[str, Callable[[Gate, float], Awaitable[None]]] = {
    "refuse": _refuse,
    "blackhole": _blackhole,
    "cut": _cut,
}


class ImaginedRegistry(Registry):
    """A client of the server, by a link."""

    schemes: ClassVar[tuple[str, ...]] = ("memory",)
    features: RegistryFeatures = MemoryRegistry.features

    def __init__(self, server: Imagined, link: Gate) -> None:
        super().__init__(URL.parse("memory://imagined"))
        self._server = server
        self._link = link

    async def connect(self, connections: Connections) -> None:
        await self._passes()

    async def aclose(self) -> None:
        pass

    async def register(self, node: Node, *, ttl: float) -> None:
        await self._ask(lambda: self._server.inside.register(node, ttl=ttl))

    async def deregister(self, node: Node) -> None:
        await self._ask(lambda: self._server.inside.deregister(node))

    async def get(self, service: str) -> tuple[Node, ...]:
        return await self._ask(lambda: self._server.inside.get(service))

    async def services(self) -> tuple[str, ...]:
        return await self._ask(lambda: self._server.inside.services())  # noqa: PLW0108 - which may be another by then

    async def follow(
        self, service: str | None, mark: object
    ) -> AsyncGenerator[tuple[object, Snapshot | Change | None], None]:
        await self._passes()
        stream = await self._server.stream()
        epoch, at = mark if isinstance(mark, tuple) else (self._server.epoch, None)
        if epoch != self._server.epoch:
            raise Gap("the server has other data than before")
        gates = (self._link, self._server.gate)
        cuts = [gate.cuts for gate in gates]
        for gate in gates:
            gate.enter(stream)
        try:
            async with aclosing(stream.follow(service, at)) as items:
                async for at, item in items:
                    await self._passes_on(cuts)
                    yield (epoch, at), item
        except Closed as exc:
            raise Unavailable("the stream was reset") from exc
        finally:
            for gate in gates:
                gate.leave(stream)

    async def _passes_on(self, cuts: Sequence[int]) -> None:
        for gate, before in zip((self._link, self._server.gate), cuts, strict=True):
            if gate.silent or gate.refuses:
                await gate.passes(until=gate.known_silent)
            if gate.cuts != before:
                raise Unavailable("the stream was reset")

    async def _ask(self, do: Callable[[], Awaitable[T]]) -> T:
        server = self._server.gate
        hears = self._link.silent and not (server.silent or server.refuses)
        if hears and self._server.chance.random() < 0.5:
            with suppress(ServiceNotFound):
                await do()  # the question gets through, the answer does not
        await self._passes()
        return await do()

    async def _passes(self) -> None:
        await asyncio.sleep(self._server.chance.uniform(0, _LATENCY))
        await self._link.passes()
        await self._server.gate.passes()
