"""The nodes that this process has registered, and their heartbeats."""

from __future__ import annotations

import asyncio
import math
from typing import NamedTuple

from micro.errors import Unavailable
from micro.record import check_found
from micro.registry import Node
from micro_plugin_consul._api import Consul
from micro_plugin_consul._entry import Namespace, Registration

#: Seconds for which the servers are believed to have what passes in time.
_SHOWN = 30.0


class _Held(NamedTuple):
    """A node as it was registered, and when it last passed, and was seen at the servers."""

    node: Node
    ttl: float
    said: Registration
    passed: float
    shown: float


class Own:
    """Registers nodes with an agent, and sees that its servers have them.

    Raises:
        Unavailable: no server answers in time, or the servers do not come to have what the agent
            has. Others are what they answer.
    """

    def __init__(self, consul: Consul, names: Namespace) -> None:
        self._consul = consul
        self._names = names
        self._held: dict[tuple[str, str], _Held] = {}

    async def register(self, node: Node, ttl: float) -> None:
        """Have ``node`` pass for ``ttl`` seconds.

        Raises:
            InvalidArgument: it cannot be registered. TooLarge: it is over 64 KiB.
        """
        consul, now = self._consul, asyncio.get_running_loop().time()
        key, said = (node.service, node.id), self._said(node, ttl)
        async with consul.client.beating():
            held = self._held.get(key)
            is_held = held is not None and held.said == said and await consul.passes(said.id)
            if not is_held:
                self._held.pop(key, None)
                await consul.register(said)
            elif held is not None and held.passed > now - ttl / 2 and held.shown > now - _SHOWN:
                self._held[key] = held._replace(passed=now)
                return
            self._held[key] = _Held(node, ttl, said, now, -math.inf)
            await self._shown(said, is_held=is_held)
            self._held[key] = _Held(node, ttl, said, now, now)

    async def deregister(self, node: Node) -> None:
        """Take ``node`` out, whoever has registered it.

        Raises:
            InvalidArgument: there can be no such node, of Go Micro's either.
        """
        check_found(node)
        consul, name = self._consul, self._names.name(node.service)
        self._held.pop((node.service, node.id), None)
        id_ = self._names.id(node)
        async with consul.client.beating():
            if not await consul.deregister(id_):
                known = {entry.service.id for entry in (await consul.instances(name)).entries}
                if known.isdisjoint((id_, node.id)):
                    return
                if id_ not in known:  # Go's ids have no service before them
                    id_ = node.id
                    await consul.deregister(id_)
            if not await consul.hides(name, id_):
                text = f"{consul.client.name}: {id_} is deregistered, and still shown; it may be"
                raise Unavailable(f"{text} with an agent that is down, or is not in the URL")

    def _said(self, node: Node, ttl: float) -> Registration:
        """What registers ``node``; a heartbeat has the same node, of which the same is to say."""
        held = self._held.get((node.service, node.id))
        if held is not None and held.node is node and held.ttl == ttl:
            return held.said
        return self._names.registration(node, ttl)

    async def _shown(self, said: Registration, *, is_held: bool) -> None:
        """Wait until the servers have what the agent has."""
        consul = self._consul
        if await consul.shows(said):
            return
        await consul.instances(said.name)  # it may be there, for others to see
        if is_held:
            # Somebody took it out of the catalog, at which the agent looks once in a while.
            await consul.deregister(said.id)
            await consul.register(said)
        if not await consul.shows(said):
            text = f"{consul.client.name}: the agent has {said.id}, and its servers do not show it"
            raise Unavailable(f"{text}; look into the agent's log for what it cannot tell them")
