"""One client for all backends of a service on one NATS: it keeps a connection."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from random import uniform

import msgspec

from micro.access import load_tls, split_host
from micro.backend import Connections
from micro.errors import Closed, ConfigError, MicroError, Unauthenticated, Unavailable
from micro.url import URL, read_secret
from micro_plugin_nats._dialing import Host, Login
from micro_plugin_nats._link import Link
from micro_plugin_nats._options import NatsOptions

_log = logging.getLogger("micro.nats")

_PORT = 4222
#: Seconds between two attempts to connect, by chance.
_PAUSE = (0.05, 0.25)
#: Seconds that one server has to let us in again.
_PATIENCE = 2.0
#: Seconds between two looks at a connection that may have ended untold.
_LOOK = 1.0
#: Hosts that are tried at most, those of the URL and what servers of the cluster say.
_HOSTS = 32


async def shared(url: URL, options: NatsOptions, connections: Connections) -> Client:
    """The client that all backends use which ask for the same servers in the same way."""
    server = msgspec.structs.replace(url, scheme="nats", path="")
    key = (msgspec.structs.replace(server, source="", query=()), url.password, _asked(options))
    return await connections.get(key, lambda: connected(server, options))


@asynccontextmanager
async def connected(url: URL, options: NatsOptions) -> AsyncIterator[Client]:
    """A client of the hosts of ``url``, connected to the first that lets us in.

    Raises:
        ConfigError: a file that an option names cannot be used, or TLS is not as it says.
        Unavailable: none answers within ``timeout``.
        Unauthenticated: the login is refused.
    """
    client = await Client.made(url, options)
    keeping = asyncio.create_task(client.keep(), name="micro.nats connection")
    try:
        yield client
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await client.aclose()


class Client:
    """Keeps a connection: each is made anew, and what was asked of one that ended has failed."""

    def __init__(
        self, url: URL, options: NatsOptions, tls: ssl.SSLContext | None, password: str
    ) -> None:
        #: For the texts of errors: where the setting came from, and what it says.
        self.name: str = f"{url.source}: {url}"
        self.timeout: float = options.timeout
        self._tls = tls
        self._login = Login(url.username, password) if password else None
        hosts = (host.removeprefix("nats://") for host in url.hosts or ("127.0.0.1",))
        split = (split_host(host, _PORT, self.name) for host in hosts)
        self._hosts = deque(Host(f"{host}:{port}") for host, port in split)
        self._link: Link | None = None
        self._linked = asyncio.Event()
        self._was_linked = False
        self._closed = False
        self._error: MicroError = Unavailable(f"{self.name}: not connected")

    @classmethod
    async def made(cls, url: URL, options: NatsOptions) -> Client:
        """A client that is connected; see ``connected``."""
        tls = await asyncio.to_thread(load_tls, options, f"{url.source}: nats")
        password = url.password
        if options.password_file:
            password = await asyncio.to_thread(read_secret, options.password_file, url.source)
        if url.username and not password:
            # Not the whole URL: in the place of a user it may be a token that stands there.
            raise ConfigError(
                f"{url.source}: {url.scheme}: a user needs a password; a token is written "
                ":token@host, or stands in the file of password_file"
            )
        client = cls(url, options, tls, password)
        await client._connect(options.timeout / len(client._hosts))
        return client

    async def aclose(self) -> None:
        link, self._link = self._link, None
        self._closed = True
        self._linked.set()
        if link is not None:
            await link.aclose()

    @asynccontextmanager
    async def call(self) -> AsyncIterator[Link]:
        """A connection, and ``timeout`` seconds for what is done with it, waiting for it included.

        Raises:
            Unavailable: there is none, or it ended, or the time is over.
        """
        link: Link | None = None
        try:
            async with asyncio.timeout(self.timeout):
                link = await self.link()
                yield link
        except TimeoutError:
            if link is None:
                raise type(self._error)(self._error.detail) from None
            raise Unavailable(f"{self.name}: no answer in {self.timeout:g} s") from None

    async def link(self, other_than: Link | None = None) -> Link:
        """The connection that there is, or the next one.

        Raises:
            Closed: there will be none.
        """
        while self._link is None or self._link is other_than or self._link.ended.is_set():
            if self._closed:
                raise Closed(f"{self.name}: used after it was closed")
            self._linked.clear()
            await self._linked.wait()
        return self._link

    async def keep(self) -> None:
        """Connect again whenever the connection has ended, without end."""
        while True:
            if self._link is not None:
                await self._end_of(self._link)
            try:
                await self._connect(min(_PATIENCE, self.timeout))
            except MicroError as exc:
                self._error = exc
                await asyncio.sleep(uniform(*_PAUSE))
            else:
                _log.info("%s: connected again", self.name)

    async def _end_of(self, link: Link) -> None:
        while not link.ended.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK):
                    await link.ended.wait()
            with suppress(MicroError):
                link.check()
        _log.info("%s: the connection has ended", self.name)
        self._link = None
        self._error = link.error or self._error
        self._know(link.others)  # of those too that have joined since
        await link.aclose()
        await asyncio.sleep(uniform(*_PAUSE))

    async def _connect(self, each: float) -> None:
        """To the first host that lets us in; a mistake of ours tells more than one that is down."""
        errors: list[MicroError] = []
        for _ in range(len(self._hosts)):
            link = Link(f"{self.name}: {self._hosts[0].address}", is_again=self._was_linked)
            try:
                await link.open(self._hosts[0], self._login, self._tls, within=each)
            except MicroError as exc:
                errors.append(exc)
                self._hosts.rotate(-1)
            else:
                self._know(link.others)
                self._link, self._was_linked = link, True
                self._linked.set()
                return
        told = [error for error in errors if isinstance(error, ConfigError | Unauthenticated)]
        raise (told or errors)[0]

    def _know(self, others: tuple[str, ...]) -> None:
        """Of servers that the first has named."""
        known = {host.address for host in self._hosts}
        new = [self._hosts[0].of_its_cluster(other) for other in others if other not in known]
        self._hosts.extend(new[: _HOSTS - len(self._hosts)])


def _asked(options: NatsOptions) -> tuple[object, ...]:
    """What of the options is about the connection."""
    return tuple(getattr(options, name) for name in NatsOptions.__struct_fields__)
