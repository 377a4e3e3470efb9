"""One client for all backends of a service on one etcd: its hosts, and the login."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TypeVar

from google.protobuf.message import Message

from micro.access import split_host
from micro.errors import (
    ConfigError,
    FailedPrecondition,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from micro.url import URL, read_secret
from micro_plugin_etcd import _etcd_pb2 as pb
from micro_plugin_etcd import _tls
from micro_plugin_etcd._channel import Channel, Metadata, StaleToken, Stream
from micro_plugin_etcd._options import EtcdOptions

_log = logging.getLogger("micro.etcd")

M = TypeVar("M", bound=Message)

#: What login or rights that have changed meanwhile are told by.
_REFUSALS = (StaleToken, Unauthenticated, PermissionDenied)
#: A server without a leader ends the stream, instead of being silent.
_LEADER = ("hasleader", "true")


@asynccontextmanager
async def connected(url: URL, options: EtcdOptions) -> AsyncIterator[Client]:
    """A client of the hosts of ``url``; nothing has been asked of them yet.

    Raises:
        ConfigError: a file that an option names cannot be used.
    """
    tls = await asyncio.to_thread(_tls.load, options, url.source)
    password = url.password
    if options.password_file:
        password = await asyncio.to_thread(read_secret, options.password_file, url.source)
    client = Client(url, options.timeout, tls, password)
    try:
        yield client
    finally:
        await client.aclose()


class Client:
    """Calls to the first host that answers, within ``timeout`` seconds over all hosts together.

    Raises:
        Unavailable: no host answers in time. Other errors are what a host answers.
    """

    def __init__(self, url: URL, timeout: float, tls: _tls.TLS | None, password: str) -> None:
        #: For the texts of errors: where the setting came from, and what it says.
        self.name: str = f"{url.source}: {url}"
        hosts = [split_host(host, 2379, self.name) for host in url.hosts or ("127.0.0.1",)]
        self._tls = tls
        self._hosts = deque(Channel(*host, tls, self.name) for host in hosts)
        self._share = timeout / len(hosts)
        self._login = (url.username, password) if url.username else None
        #: What tells who we are; None: it has to be asked for.
        self._credentials: Metadata | None = None if self._login else ()
        self._logging_in = asyncio.Lock()

    async def aclose(self) -> None:
        await asyncio.gather(*(host.aclose() for host in self._hosts))

    async def call(self, method: str, answer: type[M], request: Message) -> M:
        """The answer. What is sent may come twice: a host may take it, and be gone."""
        for others in reversed(range(len(self._hosts))):
            host = self._hosts[0]
            try:
                return await self._ask(host, method, answer, request)
            except Unavailable:
                self._pass_over(host)
                if not others:
                    raise
        raise AssertionError("a client has a host")

    @asynccontextmanager
    async def stream(self, method: str, answer: type[M]) -> AsyncIterator[Stream[M]]:
        """A stream to one host; when it breaks, the next one goes to another."""
        host = self._hosts[0]
        try:
            async with self._in_time(host):
                credentials = await self._logged_in(host)
            with self._unless_refused(credentials):
                async with host.stream(method, answer, (_LEADER, *credentials)) as stream:
                    yield stream
        except StaleToken:
            raise
        except Unavailable:
            self._pass_over(host)
            raise

    @asynccontextmanager
    async def explaining_tls(self) -> AsyncIterator[None]:
        """Within, no host is Unavailable for a mistake about TLS, which gRPC tells like any cause.

        Raises:
            ConfigError: there is one, with what to do about it.
        """
        # Before, where TLS is asked for: gRPC would write of a mistake to stderr.
        faults = [] if self._tls is None else await self._faults()
        if faults and all(faults):
            raise ConfigError(f"{self.name}: {faults[0]}")
        try:
            yield
        except Unavailable:
            for text in filter(None, faults or await self._faults()):
                raise ConfigError(f"{self.name}: {text}") from None
            raise

    async def _faults(self) -> list[str]:
        looks = (_tls.fault(host.host.strip("[]"), host.port, self._tls) for host in self._hosts)
        return await asyncio.gather(*looks)

    @asynccontextmanager
    async def _in_time(self, host: Channel) -> AsyncIterator[None]:
        """What is asked of one host, the login for it included, ends with its share of the time."""
        try:
            async with asyncio.timeout(self._share):
                yield
        except TimeoutError:
            raise self._late(host) from None

    def _late(self, host: Channel) -> Unavailable:
        return Unavailable(f"{host.where}: no answer in {self._share:g} s")

    async def _ask(self, host: Channel, method: str, answer: type[M], request: Message) -> M:
        try:
            async with asyncio.timeout(self._share):
                with suppress(StaleToken, Unauthenticated):
                    return await self._ask_once(host, method, answer, request)
                return await self._ask_once(host, method, answer, request)
        except TimeoutError:
            raise self._late(host) from None

    async def _ask_once(self, host: Channel, method: str, answer: type[M], request: Message) -> M:
        credentials = self._credentials
        if credentials is None:
            credentials = await self._logged_in(host)
        try:
            return await host.unary(method, answer, request, credentials)
        except _REFUSALS:
            self._refused(credentials)
            raise

    @contextmanager
    def _unless_refused(self, credentials: Metadata) -> Iterator[None]:
        try:
            yield
        except _REFUSALS:
            self._refused(credentials)
            raise

    def _refused(self, credentials: Metadata) -> None:
        """Log in anew for the next call, unless somebody has got others since."""
        if self._login is not None and self._credentials is credentials:
            self._credentials = None

    async def _logged_in(self, host: Channel) -> Metadata:
        """What tells who we are; it is asked for once, however many calls need it."""
        async with self._logging_in:
            if self._credentials is None:
                self._credentials = await self._log_in(host)
            return self._credentials

    async def _log_in(self, host: Channel) -> Metadata:
        assert self._login is not None
        name, password = self._login
        request = pb.AuthenticateRequest(name=name, password=password)
        try:
            made = await host.unary("Auth/Authenticate", pb.AuthenticateResponse, request, ())
        except FailedPrecondition:
            _log.warning("%s: the server asks for no login; ours is not used", self.name)
            return ()
        return (("token", made.token),)

    def _pass_over(self, failed: Channel) -> None:
        if self._hosts[0] is failed:
            self._hosts.rotate(-1)
