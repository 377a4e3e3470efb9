"""What has to be done around nats-py when a connection begins and ends."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from typing import Any, NamedTuple

from nats.aio.client import Client as NatsClient
from nats.aio.subscription import Subscription
from nats.errors import Error

from micro.access import CERTIFICATE, PLAIN, tls_fault
from micro.errors import ConfigError, MicroError, Unauthenticated, Unavailable

#: Seconds between two questions whether the server lives, and how many may stand unanswered.
_PING_EVERY = 1.0
_UNANSWERED = 2
#: Seconds that the end of a connection may take before it is cut off.
_FAREWELL = 0.5
_READER = "_wait_for_msgs_task"
#: Commands that may wait for a server that does not read.
_COMMANDS = 64 * 1024


class Host(NamedTuple):
    """``host:port``, and the name that its certificate is of where that is another."""

    address: str
    name: str = ""

    @property
    def known_as(self) -> str:
        """The name that its certificate is of; empty: it is of an address."""
        name = self.name or self.address.rpartition(":")[0]
        return "" if _is_ip(name) else name

    def of_its_cluster(self, address: str) -> Host:
        """Another one, which this one has named: servers know each other by addresses alone."""
        return Host(address, self.known_as if _is_ip(address.rpartition(":")[0]) else "")


class Login(NamedTuple):
    """Who we are; a password without a user is a token."""

    user: str
    password: str

    def __repr__(self) -> str:
        return f"Login({self.user!r})"


async def dial(
    client: NatsClient,
    host: Host,
    login: Login | None,
    tls: ssl.SSLContext | None,
    within: float,
    on_error: Callable[[Exception], Awaitable[None]],
    on_closed: Callable[[], Awaitable[None]],
) -> None:
    """Connect to one host, once; ``on_error`` has to raise what it is told meanwhile.

    Raises:
        ConfigError: the server does not speak TLS, and it was asked for.
        Exception: whatever nats-py raises.
    """
    credentials: dict[str, Any] = {}
    if login is not None:
        # It asks for them when the handshake is over, if there was one.
        secret = _Guarded(client, login.password, tls)
        credentials = {"user": login.user, "password": secret} if login.user else {"token": secret}
    await client.connect(
        [f"nats://{host.address}"],
        error_cb=on_error,
        closed_cb=on_closed,
        name="micro",
        allow_reconnect=False,
        connect_timeout=within,  # type: ignore[arg-type]  # it may be a float
        max_reconnect_attempts=1,
        ping_interval=_PING_EVERY,  # type: ignore[arg-type]  # it may be a float
        max_outstanding_pings=_UNANSWERED,
        pending_size=0,  # else a publish that waits would swallow a cancellation
        flusher_queue_size=_COMMANDS,
        tls=tls,
        tls_hostname=host.name,
        **credentials,
    )
    _check_encryption(client, tls)


@contextmanager
def cancellable() -> Iterator[None]:
    """A cancellation that came within is raised, also one that nothing within has raised.

    nats-py connects by ``asyncio.wait_for``, which before Python 3.12 loses it when what it waits
    for is done at the same moment.
    """
    task = asyncio.current_task()
    before = 0 if task is None else task.cancelling()
    try:
        yield
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError


async def bury(client: NatsClient, subscriptions: Iterable[Subscription | None]) -> None:
    """End a connection; cut off what ``close`` leaves when the server does not read.

    Cancelled, it leaves nothing either.
    """
    try:
        with suppress(Exception):
            async with asyncio.timeout(_FAREWELL):
                await client.close()
    finally:
        writer = _writer(client)
        if writer is not None:
            writer.transport.abort()
        names = ("_reading_task", "_ping_interval_task", "_flusher_task")
        tasks = [_cancelled(client, name) for name in names]
        tasks += [_cancelled(subscription, _READER) for subscription in subscriptions]
        await asyncio.gather(*filter(None, tasks), return_exceptions=True)


async def unsubscribe(subscription: Subscription) -> None:
    """End a subscription; of a connection that has ended, nats-py leaves its task."""
    with suppress(Error, OSError):
        await subscription.unsubscribe()
    _cancelled(subscription, _READER)


def _cancelled(owner: object, name: str) -> asyncio.Task[object] | None:
    """A task of nats-py's that is to end, if there is one."""
    task = getattr(owner, name, None)
    if not isinstance(task, asyncio.Task):
        return None
    task.cancel()
    return task


def translated(exc: Exception, client: NatsClient, where: str, within: float) -> MicroError:
    """What the failure of a connection means."""
    text = str(exc)
    if isinstance(exc, MicroError):
        return type(exc)(f"{where}: {exc.detail}")
    if "authorization violation" in text.lower() or "authentication" in text.lower():
        return Unauthenticated(
            f"{where}: the server refuses the login; correct user and password, or token"
        )
    if isinstance(exc, ssl.SSLError):
        return ConfigError(f"{where}: the server speaks TLS: {tls_fault(exc)}")
    if isinstance(exc, ConnectionError) and _wants_certificate(client):
        return ConfigError(f"{where}: the server refuses our TLS; {CERTIFICATE}")
    if isinstance(exc, ConnectionRefusedError):
        text = "connection refused; does NATS run there?"
    if isinstance(exc, TimeoutError):
        text = f"no answer in {within:g} s"
    return Unavailable(f"{where}: {text or type(exc).__name__}")


class _Guarded:
    """Gives a secret, for TLS alone where that was asked for; it has no text."""

    def __init__(self, client: NatsClient, secret: str, tls: ssl.SSLContext | None) -> None:
        self._client = client
        self._secret = secret
        self._tls = tls

    def __call__(self) -> str:
        _check_encryption(self._client, self._tls)
        return self._secret


def _check_encryption(client: NatsClient, tls: ssl.SSLContext | None) -> None:
    """nats-py would do without TLS when the server does not ask for it.

    Raises:
        ConfigError: there is none where it was asked for.
    """
    if tls is not None and not _is_encrypted(client):
        raise ConfigError(PLAIN)


def _wants_certificate(client: NatsClient) -> bool:
    """Whether the server does; what it says of ours may be lost with the connection."""
    said = getattr(client, "_server_info", None)
    return isinstance(said, dict) and bool(said.get("tls_verify"))


def _is_encrypted(client: NatsClient) -> bool:
    writer = _writer(client)
    return writer is not None and writer.get_extra_info("ssl_object") is not None


def _is_ip(name: str) -> bool:
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _writer(client: NatsClient) -> asyncio.StreamWriter | None:
    writer = getattr(getattr(client, "_transport", None), "_io_writer", None)
    return writer if isinstance(writer, asyncio.StreamWriter) else None
