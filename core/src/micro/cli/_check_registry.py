"""What ``micro doctor`` asks of a registry, as two clients of it that have probes of their own."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import msgspec

from micro._running import Running
from micro.cli._checks import Checks, Flaw, bounded, quantile, shown, timed
from micro.cli._report import time_text
from micro.errors import (
    DeadlineExceeded,
    MicroError,
    ServiceNotFound,
    Unavailable,
    Unsupported,
)
from micro.follow import View, Watch
from micro.plugins import Plugins
from micro.registry import Node, Registry

#: Seconds that connecting may take, and any other question: more than backends do by themselves.
_CONNECT = 15.0
_ASK = 10.0
#: Seconds that the registry has to be told, of a doctor that is interrupted, that the probes go.
_FAREWELL = 5.0
#: Seconds after the promised time from which on a change is late, and from which on it is lost.
_LATE = 1.0
_LOST = 5.0
#: Seconds that a lease may seem to end too early, as two clocks are read one after the other.
_EARLY = 0.1
#: The least time to live for the clock: a shorter one would measure this process.
_LEAST_TTL = 1.0
#: How often a question is asked for its latency, and the seconds after which that is enough.
_TIMES = 100
_SECONDS = 1.0

_HOSTS = "services go on with the others; start it, or correct its address in {where}"
_UNTOLD = (
    "does a proxy between end long requests, or hold them back? does the server lag behind? "
    "Until this is mended, clients call nodes that are gone, and miss new ones"
)
_UNREAD = "may this user read what it writes? do all hosts in {where} belong to one cluster?"
_SLOW = "is the server far away, or overloaded? its disk may be slow"
_CLOCK = (
    "the server's clock {how}: look at its time service (NTP), and whether its machine was "
    "suspended"
)


class RegistryChecks:
    """Has one client write and another one watch. ``aclose`` takes away what it registered.

    ``one`` and ``two`` are runs of a service with the same settings; ``clock`` is how many seconds
    the check of the clock may take; ``plugins`` make a client of each host.
    """

    def __init__(
        self, checks: Checks, one: Running, two: Running, *, clock: float, plugins: Plugins
    ) -> None:
        url = one._registry.url
        is_private = url.scheme == "memory" and not url.hosts
        self._checks = checks
        self._one = one
        self._two = one if is_private else two
        self._clock = clock
        self._plugins = plugins
        self._url = url
        self._where = url.source
        self._service = f"micro-doctor-{uuid.uuid4().hex[:12]}"
        self._probe = self._new("probe")
        #: What the registry may know, by id.
        self._known: dict[str, Node] = {}
        #: What it has refused; it may know it nevertheless, and refuse to show it.
        self._refused: list[Node] = []

    async def run(self, multicast: Callable[[], Awaitable[str]] | None) -> None:
        """Make all checks; ``multicast`` is one more where a registry stands on that."""
        run = self._checks.run
        await run("reach", self._reach, within=_CONNECT)
        if len(self._url.hosts) > 1:
            await run("hosts", self._each, needs=["reach"])
        if multicast is not None:
            await run("multicast", multicast, within=_ASK, needs=["reach"])
        await run("rights", self._rights, within=_ASK, needs=["reach"])
        await run("read", self._read, within=_ASK, needs=["rights"])
        await run("watch", self._watch, needs=["read", "multicast"])
        await run("clock", self._leases, needs=["watch"])
        await run("latency", self._latency, within=3 * _ASK, needs=["read"])
        if self._known:
            await run("clean-up", self._clean, within=_ASK)

    async def aclose(self) -> None:
        """Deregister what is left; what the registry cannot be told, it forgets by itself."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL):
                for node in (*self._known.values(), *self._refused):
                    with suppress(MicroError):
                        await self._deregister(node)

    # -- the checks

    async def _reach(self) -> str:
        began = time.monotonic()
        registry = await self._one.registry()
        least = registry.features.min_ttl
        if self._one.register_ttl < least:
            raise Flaw(
                f"it keeps no node for less than {least:g} s, and register_ttl is "
                f"{self._one.register_ttl:g} s",
                f"set --register_ttl (MICRO_REGISTER_TTL) to {least:g}s or more",
            )
        return f"connected in {time_text(time.monotonic() - began)}"

    async def _each(self) -> str:
        """Connect to each host alone: a service would not tell that one is down."""
        hosts = self._url.hosts
        told = await asyncio.gather(*map(self._fault, hosts))
        if faults := [fault for fault in told if fault]:
            seen = f"{len(hosts) - len(faults)} of {len(hosts)} hosts answer; {'; '.join(faults)}"
            raise Flaw(seen, _HOSTS.format(where=self._where), state="warning")
        return f"all {len(hosts)} hosts answer"

    async def _fault(self, host: str) -> str:
        """Why one host does not do; empty when it does."""
        kind: type[Registry] = Registry  # type: ignore[type-abstract]
        alone = self._plugins.create(kind, msgspec.structs.replace(self._url, hosts=(host,)))
        connections = self._plugins.connections()
        try:
            await bounded(alone.connect(connections), _CONNECT)
        except DeadlineExceeded as exc:  # ours, which does not say whose answer
            return f"{host}: {exc}"
        except MicroError as exc:
            return str(exc)
        except Exception as exc:  # a backend of others may raise anything
            return f"{host}: {type(exc).__name__}: {exc}"
        finally:
            await alone.aclose()
            await connections.aclose()
        return ""

    async def _rights(self) -> str:
        for _ in range(2):  # the second one is a heartbeat
            await self._register(self._probe, self._one.register_ttl)
        return f"may register: {self._service}, for {self._one.register_ttl:g} s"

    async def _read(self) -> str:
        registry = await self._one.registry()
        mend = _UNREAD.format(where=self._where)
        try:
            nodes = await registry.get(self._service)
        except ServiceNotFound as exc:
            raise Flaw(f"what was just registered is not found: {exc}", mend) from exc
        if nodes != (self._probe,):
            raise Flaw(f"what was just registered is found as another: {nodes}", mend)
        names = await registry.services()
        if self._service not in names:
            raise Flaw("what was just registered is not among all services", mend)
        return f"found itself among {len(names)} services"

    async def _watch(self) -> str:
        node, ttl = self._new("watched"), self._one.register_ttl
        changed = msgspec.structs.replace(node, version="2")
        async with self._watching() as watch:
            took = [
                await self._sees(watch, "come", self._register(node, ttl), node),
                await self._sees(watch, "change", self._register(changed, ttl), changed),
                await self._sees(watch, "go", self._deregister(changed), None),
            ]
        promised = await self._converge()
        times = ", ".join(map(time_text, took))
        if max(took) > promised + _LATE:
            seen = f"another client saw it come, change and go, late: {times} ({promised:g} s)"
            raise Flaw(seen, _UNTOLD, state="warning")
        return f"another client saw it come, change and go: {times}"

    async def _leases(self) -> str:
        node = self._new("left-alone")
        async with self._watching() as watch:
            began, ttl = await self._lease(node)
            until = time.monotonic() + 2 * ttl
            await self._sees(watch, "come", asyncio.sleep(0), node)
            within = until - time.monotonic() + await self._converge() + _LOST
            try:
                await bounded(self._until(watch, node.id, None), within)
            except DeadlineExceeded:
                seen = f"a node with a time to live of {ttl:g} s is there still, after"
                raise Flaw(
                    f"{seen} {time_text(time.monotonic() - began)}",
                    _CLOCK.format(how="is slow, or stands"),
                ) from None
        took = time.monotonic() - began
        seen = f"a node with a time to live of {ttl:g} s was gone after {time_text(took)}"
        if took < ttl - _EARLY:
            raise Flaw(seen, _CLOCK.format(how="is fast, or leaps"))
        return seen

    async def _latency(self) -> str:
        registry = await self._one.registry()
        ttl = self._one.register_ttl
        beat = await timed(_SECONDS, _TIMES, lambda: self._register(self._probe, ttl))
        get = await timed(_SECONDS, _TIMES, lambda: registry.get(self._service))
        seen = f"heartbeat {shown(beat)}; get {shown(get)}"
        beats_late = quantile(beat, 0.99) > self._one.interval / 10
        if beats_late or quantile(get, 0.99) > self._one.request_timeout / 2:
            raise Flaw(seen, _SLOW, state="warning")
        return seen

    async def _clean(self) -> str:
        registry = await self._one.registry()
        try:
            await self._forget()
            left = await registry.get(self._service)
        except ServiceNotFound:
            return "nothing of this is left"
        except MicroError as exc:
            mend = f"nothing: it goes by itself, {self._one.register_ttl:g} s after its last beat"
            raise Flaw(f"a probe may be left: {exc}", mend, state="warning") from exc
        raise Flaw(f"deregistered, and still there: {[node.id for node in left]}", _SLOW)

    # -- what they do

    def _new(self, id_: str) -> Node:
        # Of this host alone, so that with mdns nobody else hears of it; nobody listens there.
        return Node(service=self._service, id=id_, address="127.0.0.1:9")

    async def _register(self, node: Node, ttl: float) -> None:
        registry = await self._one.registry()
        is_new = node.id not in self._known
        self._known[node.id] = node  # also when this is cut off
        try:
            await registry.register(node, ttl=ttl)
        except MicroError as exc:
            if is_new and not isinstance(exc, Unavailable | DeadlineExceeded):  # it was refused
                self._refused.append(self._known.pop(node.id))
            raise

    async def _deregister(self, node: Node) -> None:
        registry = await self._one.registry()
        await registry.deregister(node)
        self._known.pop(node.id, None)

    async def _forget(self) -> None:
        for node in tuple(self._known.values()):
            await self._deregister(node)

    async def _lease(self, node: Node) -> tuple[float, float]:
        """Register it once, as short as it can be: when that began, and its time to live."""
        features = (await self._one.registry()).features
        ttl = max(features.min_ttl, _LEAST_TTL)
        while True:
            most = 2 * ttl + features.converge
            if most > self._clock:
                raise Flaw(
                    f"may take {most:g} s", f"to allow it: --clock {most:g}s", state="skipped"
                )
            began = time.monotonic()
            try:
                await bounded(self._register(node, ttl), _ASK)
                return began, ttl
            except Unsupported:  # some servers have a higher least one than their kind
                ttl *= 2

    async def _converge(self) -> float:
        return (await self._two.registry()).features.converge

    @asynccontextmanager
    async def _watching(self) -> AsyncIterator[Watch]:
        registry: Registry = await bounded(self._two.registry(), _CONNECT)
        view = View(registry, self._service, ttl=self._one.register_ttl)
        try:
            await bounded(view.entered(), _ASK)
            async with view.watch() as watch:
                yield watch
        finally:
            await view.aclose()

    async def _sees(
        self, watch: Watch, word: str, act: Awaitable[None], wanted: Node | None
    ) -> float:
        """How long it takes until what was done is seen."""
        await bounded(act, _ASK)
        began, within = time.monotonic(), await self._converge() + _LOST
        id_ = "watched" if wanted is None else wanted.id
        try:
            await bounded(self._until(watch, id_, wanted), within)
        except DeadlineExceeded:
            why = f": {watch.error}" if watch.error else ""
            seen = f"another client did not see it {word} within {within:g} s{why}"
            raise Flaw(seen, _UNTOLD) from None
        return time.monotonic() - began

    async def _until(self, watch: Watch, id_: str, wanted: Node | None) -> None:
        while next((node for node in watch.nodes if node.id == id_), None) != wanted:
            await anext(watch)
