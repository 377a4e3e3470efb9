"""What ``micro doctor`` tries of transports: a port as a service opens it, and calls to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from ssl import SSLContext

from micro._running import Running
from micro.call import Call
from micro.cli._checks import Checks, Flaw, bounded, shown, timed
from micro.errors import ConfigError, MicroError
from micro.service import Service, _reachable
from micro.transport import Channel, Listener, Transport

#: Seconds that each step may take; backends end sooner by themselves.
_STEP = 10.0
#: Seconds that somebody may listen at our address who just goes, as another doctor does.
_GOES = 2.0
#: How often a call is made for its latency, and for how many seconds at most.
_TIMES = 200
_SECONDS = 1.0
_TAKEN = (
    "end who listens there, or choose another address in {where}; if that is the service "
    "itself, its transport does listen"
)
_LISTEN = "choose another address in {where}"
_UNANSWERED = "is a firewall between this host and itself? is another program at that address?"
_FAR = (
    "nothing, if a router or a load balancer sends nothing back to the host it came from; "
    "else correct {where}"
)


class TransportChecks:
    """Listens and calls itself, over each transport. ``service`` lends the rules for addresses."""

    def __init__(self, checks: Checks, running: Running, service: Service) -> None:
        self._checks = checks
        self._running = running
        self._service = service
        self._stack = AsyncExitStack()
        self._transports: Sequence[Transport] = ()
        self._address = ""
        self._name = running.name.text

    async def run(self) -> None:
        """Make all checks."""
        run = self._checks.run
        async with self._stack:
            if self._running.tls is not None:
                await run("tls", self._tls, within=_STEP)
            await run("listen", self._listen, within=_STEP, needs=["tls"])
            await run("call", self._call, within=2 * _STEP, needs=["listen"])
            if self._running.advertise.text:
                await run("advertise", self._advertise, within=_STEP, needs=["call"])
            await run("latency", self._latency, within=2 * _STEP, needs=["call"])

    async def _tls(self) -> str:
        tls = self._running.tls
        assert tls is not None
        chosen = self._running.name
        # Without a name of the service its certificate says it.
        await self._stack.enter_async_context(
            tls.kept(serves="" if chosen.source == "code" else chosen.text)
        )
        own = tls.own
        if own is None:
            raise Flaw(
                "there is no certificate, so that a service can call and not be called",
                "give one with --tls_cert_file and --tls_key_file; `micro cert` makes them",
            )
        self._name = own.service
        ends = time.strftime("%Y-%m-%d %H:%M", time.gmtime(own.ends))
        return f"certificate of {own.whose()}, until {ends} UTC"

    async def _listen(self) -> str:
        self._transports = await self._running.transports()
        listener = await self._opened()
        self._stack.push_async_callback(listener.aclose)
        self._address = _reachable(listener.address)
        names = " and ".join(one.features.name for one in self._transports)
        return f"at {listener.address}, for {names}"

    async def _opened(self) -> Listener:
        until = time.monotonic() + _GOES
        while True:
            try:
                return await self._service._listen(self._running, self._transports)
            except ConfigError as exc:
                in_use = "in use" in exc.detail
                if not in_use or time.monotonic() > until:
                    mend = (_TAKEN if in_use else _LISTEN).format(
                        where="--server_address (MICRO_SERVER_ADDRESS)"
                    )
                    raise Flaw(str(exc), mend) from exc
            await asyncio.sleep(0.1)

    async def _call(self) -> str:
        for transport in self._transports:
            async with self._dialled(transport, self._address) as channel:
                try:
                    await self._ask(channel)
                except MicroError as exc:
                    raise Flaw(f"over {transport.features.name}: {exc}", _UNANSWERED) from exc
        return f"{self._address} answers"

    async def _advertise(self) -> str:
        given = self._running.advertise
        async with self._dialled(self._transports[0], given.text) as channel:
            try:
                await bounded(self._ask(channel), _STEP / 2)
            except MicroError as exc:
                seen = f"{given.text}, which others are told, cannot be called from here: {exc}"
                raise Flaw(seen, _FAR.format(where=given.source), state="warning") from exc
        return f"{given.text}, which others are told, answers"

    async def _latency(self) -> str:
        told: list[str] = []
        for transport in self._transports:
            async with self._dialled(transport, self._address) as channel:
                took = await timed(_SECONDS, _TIMES, partial(self._ask, channel))
            told.append(f"{transport.features.name} {shown(took)}")
        return "; ".join(told)

    @asynccontextmanager
    async def _dialled(self, transport: Transport, address: str) -> AsyncIterator[Channel]:
        tls: SSLContext | None = None
        if self._running.tls is not None and transport.features.multi_process:
            tls = self._running.tls.client(self._name)
        channel = await transport.dial(
            address, self._running.limits, tls=tls, timeout=self._running.request_timeout
        )
        try:
            yield channel
        finally:
            await channel.aclose()

    async def _ask(self, channel: Channel) -> None:
        deadline = time.monotonic() + self._running.request_timeout
        call = Call(service=self._name, endpoint="Debug.Health", deadline=deadline)
        await bounded(channel.call(call, b"{}"), self._running.request_timeout)
