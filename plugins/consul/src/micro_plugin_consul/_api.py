"""What Consul does for us, in services, instances and checks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import msgspec

from micro.errors import ConfigError, PermissionDenied, Unauthenticated, Unavailable
from micro_plugin_consul._client import Client
from micro_plugin_consul._entry import Instance, Registration
from micro_plugin_consul._http import RIGHTS, Answer, Failed, Mistaken

_log = logging.getLogger("micro.consul")

T = TypeVar("T")

#: Seconds that a query waits for something new. One that is answered proves that the server lives.
_WAIT = 3.0
#: Seconds between two looks whether the servers have what the agent has; it tells them at once.
_LOOKS = (0.0, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)


class Agent(msgspec.Struct, frozen=True, rename="pascal"):
    node: str
    address: str = ""


class Check(msgspec.Struct, frozen=True, rename="pascal"):
    """Without a ``service_id`` it is of the whole agent, and so of all that is registered there."""

    node: str
    check_id: str = msgspec.field(name="CheckID")
    status: str
    notes: str = ""
    service_id: str = msgspec.field(name="ServiceID", default="")
    service_name: str = ""
    modify_index: int = 0


class Entry(msgspec.Struct, frozen=True, rename="pascal"):
    """An instance with the agent that it is registered at, and the checks of both."""

    node: Agent
    service: Instance
    checks: tuple[Check, ...]

    @property
    def alive(self) -> bool:
        """Go's rule: nothing critical. A warning is a node that may be called."""
        return all(check.status != "critical" for check in self.checks)


class Found(NamedTuple):
    """Instances that are alive, as they are at an index."""

    at: int
    entries: tuple[Entry, ...]


class Consul:
    """The calls that we make.

    Raises:
        Unavailable: no server answers in time. PermissionDenied, Unauthenticated: the token may
            not, or is not known.
    """

    def __init__(self, client: Client) -> None:
        self.client: Client = client
        self._has_acls = True
        self._has_warned = False

    async def check(self, name: str) -> None:
        """Whether a server answers, knows the token, and has a leader; ``name`` is of a service.

        Raises:
            ConfigError: TLS is spoken where it should not be, or the other way, or not trusted.
        """
        try:
            await self._look_at_token()
            answer = await self.client.get(f"health/service/{name}", consistent="")
            self._entries(answer, name)
        except Mistaken as exc:
            raise ConfigError(exc.detail) from None
        except Unavailable:
            if why := await self.client.tls_fault():
                raise ConfigError(f"{self.client.name}: {why}") from None
            raise

    async def _look_at_token(self) -> None:
        client = self.client
        try:
            async with client.beating():
                told = await client.beat("GET", "acl/token/self")
        except Unauthenticated:
            if client.has_token:
                raise
            return  # what everybody may is seen when it is asked for
        self._has_acls = told.status != 401
        if not self._has_acls and client.has_token:
            _log.warning("%s: the server asks for no token; ours is not used", client.name)

    async def register(self, said: Registration) -> None:
        body = msgspec.json.encode(said.body)
        await self.client.beat("PUT", "agent/service/register", body)
        # What has passed once comes back as passing when the agent is restarted.
        await self.passes(said.id)

    async def passes(self, id: str) -> bool:
        """A heartbeat; False when it has to be registered anew."""
        try:
            answer = await self.client.beat("PUT", f"agent/check/pass/service:{id}")
        except Failed:  # so old versions say that they do not know it
            return False
        return answer.status == 200

    async def deregister(self, id: str) -> bool:
        """Whether an agent knew the instance; none does now."""
        told = await self.client.beat_all("PUT", f"agent/service/deregister/{id}")
        return any(answer.status == 200 for answer in told)

    async def shows(self, said: Registration) -> bool:
        """Whether the servers come to have what was registered."""
        return await self._come_to(said.name, said.id, lambda found: _has(found, said))

    async def hides(self, name: str, id: str) -> bool:
        """Whether the servers come to have an instance no more."""
        return await self._come_to(name, id, lambda found: not found)

    async def _come_to(self, name: str, id: str, be: Callable[[tuple[Entry, ...]], bool]) -> bool:
        for pause in _LOOKS:
            await asyncio.sleep(pause)
            path, only = f"health/service/{name}", f'Service.ID == "{id}"'
            answer = await self.client.beat("GET", path, consistent="", filter=only)
            if be(self._entries(answer, name)):
                return True
        return False

    async def instances(self, name: str) -> Found:
        """Those of one service, as the leader has them.

        Raises:
            PermissionDenied: there may be some that we may not see.
        """
        answer = await self.client.get(f"health/service/{name}", consistent="")
        found = self._found(answer, name)
        if answer.filtered and not found.entries:
            raise PermissionDenied(f"{self.client.name}: there may be some of {name}; {RIGHTS}")
        if answer.filtered and not self._has_warned:  # whether they are alive, nobody knows
            self._has_warned = True
            _log.warning("%s: some of %s may not be read; %s", self.client.name, name, RIGHTS)
        if not found.entries:
            await self.may_see(name)
        return found

    async def wait(self, name: str, index: int) -> Found:
        """Those of one service, once there is something new, or else as they are after a while.

        That there are none may be untrue: a server that comes back may not know them yet.
        """
        answer = await self.client.wait(f"health/service/{name}", index, _WAIT)
        return self._found(answer, name)

    async def checks(self, index: int, part: str) -> tuple[int, tuple[Check, ...]]:
        """All checks, of services whose names have ``part``; with an index when it is newer."""
        # Names with a slash are of somebody's namespace.
        only = f'ServiceName contains "{part}"' if part else 'not (ServiceName contains "/")'
        return await self._all(
            "health/state/any", index, tuple[Check, ...], filter=f'ServiceName == "" or {only}'
        )

    async def names(self, index: int) -> tuple[int, dict[str, tuple[str, ...]]]:
        """Those of all services, with their tags; with an index when it is newer."""
        return await self._all("catalog/services", index, dict[str, tuple[str, ...]])

    async def _all(self, path: str, index: int, kind: type[T], **query: str) -> tuple[int, T]:
        if index:
            answer = await self.client.wait(path, index, _WAIT, **query)
        else:
            answer = await self.client.get(path, consistent="", **query)
        if answer.at < index:  # what changed meanwhile, nobody can tell
            raise Unavailable(f"{self.client.name}: the server lost data: it has an older index")
        return max(1, answer.at), self._read(answer, kind)

    async def may_see(self, name: str) -> None:
        """Whether it is true that there is no such service: lists are cut silently.

        Raises:
            PermissionDenied: of this name nothing may be read. Unauthenticated: not without token.
        """
        if not self._has_acls:
            return
        await self.client.get(f"agent/health/service/name/{name}")
        only = 'ServiceName == ""'  # each agent has a check of its own
        agents = await self.client.get("health/state/any", filter=only)
        if not self._read(agents, tuple[Check, ...]):
            raise PermissionDenied(f"{self.client.name}: no agent may be read; {RIGHTS}")

    def _found(self, answer: Answer, name: str) -> Found:
        entries = self._entries(answer, name)
        return Found(max(1, answer.at), tuple(entry for entry in entries if entry.alive))

    def _entries(self, answer: Answer, name: str) -> tuple[Entry, ...]:
        """Of this service; Consul finds those too whose names differ in case."""
        found = self._read(answer, tuple[Entry, ...])
        return tuple(entry for entry in found if entry.service.service == name)

    def _read(self, answer: Answer, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(answer.body, type=kind)
        except msgspec.DecodeError as exc:
            text = f"{self.client.name}: status {answer.status}, not an answer of Consul: {exc}"
            raise Unavailable(text) from exc


def _has(entries: tuple[Entry, ...], said: Registration) -> bool:
    """Whether one of them is what was registered, and alive."""
    address, tags = (said.body["Address"], said.body["Port"]), sorted(said.body["Tags"])
    return any(
        entry.alive
        and (entry.service.address, entry.service.port) == address
        and sorted(entry.service.tags or ()) == tags
        for entry in entries
    )
