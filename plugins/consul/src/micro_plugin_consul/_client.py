"""One client for all backends of a service on one Consul: its hosts, and how many connections."""

from __future__ import annotations

import asyncio
import math
import ssl
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from micro.access import load_tls, split_host
from micro.errors import ConfigError, ResourceExhausted, Unavailable
from micro.url import URL, read_secret
from micro_plugin_consul import _tls
from micro_plugin_consul._http import LOGIN, Answer, Session
from micro_plugin_consul._options import ConsulOptions

# Connections at most. Consul takes 200 from one address: all programs of a host share them.
_BEATS, _READS, _WATCHES, _SHED_WATCHES = 8, 8, 16, 2
#: Seconds for which those of heartbeats are kept, since a new one may be refused; and all others.
_BEATS_KEPT, _OTHERS_KEPT = 300.0, 2.0
#: Seconds of fewer watches after a 429, and before the first repetition of what got it.
_SHED, _BACK_OFF = 30.0, 0.05
#: Seconds for an answer to a query that waits, beyond its wait, of which Consul adds a sixteenth.
_GRACE = 1.0


@asynccontextmanager
async def connected(url: URL, options: ConsulOptions) -> AsyncIterator[Client]:
    """A client of the hosts of ``url``; nothing has been asked of them yet.

    Raises:
        ConfigError: a file that an option names cannot be used, or the login is no token.
    """
    if url.username:
        raise ConfigError(
            f"{url.source}: consul: it knows no user names; a token stands after a colon: {LOGIN}"
        )
    tls = await asyncio.to_thread(load_tls, options, f"{url.source}: consul")
    token = url.password
    if options.token_file:
        token = await asyncio.to_thread(read_secret, options.token_file, url.source)
    if not token.isprintable():  # no header could have it
        raise ConfigError(f"{url.source}: consul: the token has a line break within: {LOGIN}")
    client = Client(url, options.timeout, tls, token)
    try:
        yield client
    finally:
        await client.aclose()


class Watches:
    """How many queries may wait at once; fewer for some time after the server had too many."""

    def __init__(self) -> None:
        self._open = 0
        self._shed_until = 0.0

    @property
    def crowded(self) -> bool:
        """Whether there are more than may be."""
        return self._open > self._most()

    def take(self) -> bool:
        """Whether one more may wait; who took it gives it back."""
        if self._open >= self._most():
            return False
        self._open += 1
        return True

    def give_back(self) -> None:
        self._open -= 1

    def shed(self) -> None:
        self._shed_until = asyncio.get_running_loop().time() + _SHED

    def _most(self) -> int:
        is_shed = asyncio.get_running_loop().time() < self._shed_until
        return _SHED_WATCHES if is_shed else _WATCHES


class Client:
    """Calls to the first host that answers, within ``timeout`` seconds over all hosts together.

    Raises:
        Unavailable: no host answers in time. Other errors are what a host answers.
    """

    def __init__(self, url: URL, timeout: float, tls: ssl.SSLContext | None, token: str) -> None:
        #: For the texts of errors: where the setting came from, and what it says.
        self.name: str = f"{url.source}: {url}"
        self.timeout: float = timeout
        self.has_token: bool = bool(token)
        self.watches: Watches = Watches()
        scheme, port = ("https", 8501) if tls else ("http", 8500)
        hosts = [split_host(host, port, self.name) for host in url.hosts or ("127.0.0.1",)]
        self._hosts = deque("{}://{}:{}".format(scheme, *host) for host in hosts)
        self._share = timeout / len(hosts)
        self._tls = tls
        self._beats = Session(self.name, tls, token, kept=_BEATS_KEPT)
        self._others = Session(self.name, tls, token, kept=_OTHERS_KEPT)
        self._beating = asyncio.Semaphore(_BEATS)
        self._reading = asyncio.Semaphore(_READS)
        self._answered = -math.inf

    async def aclose(self) -> None:
        await self._beats.aclose()
        await self._others.aclose()

    async def tls_fault(self) -> str:
        """What is wrong with the TLS of a host, when none can be reached; empty when it is not."""
        if self._tls is None:
            return ""
        told = await asyncio.gather(*(_tls.look(host, self._tls) for host in self._hosts))
        return next(filter(None, told), "")

    @asynccontextmanager
    async def beating(self) -> AsyncIterator[None]:
        """Within, ``beat`` may be called; all of it may take as long as one call."""
        async with self._turn(self._beating):
            try:
                async with asyncio.timeout(self.timeout):
                    yield
            except TimeoutError:
                raise Unavailable(f"{self.name}: no answer in {self.timeout:g} s") from None

    async def beat(self, method: str, path: str, body: bytes | None = None, **query: str) -> Answer:
        """A call on connections that nothing else uses, and that stay open."""
        return await self._call(self._beats, method, path, query, body)

    async def beat_all(self, method: str, path: str) -> list[Answer]:
        """As ``beat``, to every host; what those answer that can be reached."""
        asked = [self._ask(self._beats, host, method, path, {}, None) for host in self._hosts]
        told = await asyncio.gather(*asked, return_exceptions=True)
        answers = [answer for answer in told if isinstance(answer, Answer)]
        for error in told:
            if isinstance(error, BaseException) and not answers:
                raise error
        return answers

    async def get(self, path: str, **query: str) -> Answer:
        """What is at ``path``."""
        async with self._turn(self._reading):
            return await self._call(self._others, "GET", path, query, None)

    async def wait(self, path: str, index: int, seconds: float, **query: str) -> Answer:
        """What is at ``path`` once that is newer than ``index``, or else after ``seconds``."""
        host, within = self._hosts[0], seconds * 17 / 16 + _GRACE
        asked = {"index": str(index), "wait": f"{seconds * 1000:.0f}ms", **query}
        try:
            answer = await self._others.ask(host, "GET", path, asked, within=within)
        except Unavailable:
            self._pass_over(host)
            raise
        except ResourceExhausted as exc:
            self.watches.shed()
            raise Unavailable(exc.detail) from None
        if not answer.at:  # the next one would be answered at once, and so on
            text = f"{self.name}: an answer without X-Consul-Index; does a proxy take that away?"
            raise Unavailable(text)
        return answer

    @asynccontextmanager
    async def _turn(self, places: asyncio.Semaphore) -> AsyncIterator[None]:
        """One of so many places; who waits for one does so for as long as the server answers."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with asyncio.timeout(self.timeout):
                    await places.acquire()
                break
            except TimeoutError:
                if loop.time() - self._answered > self.timeout:
                    text = f"{self.name}: no answer in {self.timeout:g} s to what was asked before"
                    raise Unavailable(text) from None
        try:
            yield
        finally:
            places.release()

    async def _call(
        self, session: Session, method: str, path: str, query: dict[str, str], body: bytes | None
    ) -> Answer:
        for others in reversed(range(len(self._hosts))):
            host = self._hosts[0]
            try:
                return await self._ask(session, host, method, path, query, body)
            except Unavailable:
                self._pass_over(host)
                if not others:
                    raise
        raise AssertionError("a client has a host")

    async def _ask(
        self,
        session: Session,
        host: str,
        method: str,
        path: str,
        query: dict[str, str],
        body: bytes | None,
    ) -> Answer:
        """What one host answers, in its share of the time; one that is crowded is asked again."""
        loop, pause = asyncio.get_running_loop(), _BACK_OFF
        end = loop.time() + self._share
        while True:
            try:
                within = end - loop.time()
                answer = await session.ask(host, method, path, query, body, within=within)
                self._answered = loop.time()
                return answer
            except ResourceExhausted as exc:
                self.watches.shed()
                if loop.time() + pause > end:
                    raise Unavailable(exc.detail) from None
                await asyncio.sleep(pause)
                pause *= 2

    def _pass_over(self, failed: str) -> None:
        if self._hosts[0] is failed:
            self._hosts.rotate(-1)
