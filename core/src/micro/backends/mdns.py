"""Discovery without a server: multicast DNS, on the wire that Go Micro speaks.

Every process answers for its own nodes and listens to the others. Meant for development: whoever is
on the network is believed. ``mdns:///prod`` is a namespace of its own, which Go Micro does not see.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import ClassVar, NamedTuple

import msgspec

from micro.backend import Connections
from micro.backends._mdns_link import Link, Source
from micro.backends._mdns_view import Heard, View
from micro.backends._mdns_wire import Card, Instance, Question, Zone, node_of, parse
from micro.errors import (
    Closed,
    ConfigError,
    DecodeError,
    Gap,
    MicroError,
    ResourceExhausted,
    ServiceNotFound,
    Unavailable,
)
from micro.registry import (
    Change,
    Node,
    Registry,
    RegistryFeatures,
    Snapshot,
    check_node,
    check_service,
    check_ttl,
)
from micro.url import URL

_log = logging.getLogger("micro.mdns")

#: When a new or changed node is announced again, and a goodbye repeated.
_AGAIN = (0.25, 1.0)
_GOODBYES = (0.03, 0.07)
_SCAN_EVERY = 2.0
_WARN_EVERY = 60.0

#: A longer time to live is cut; who still lives then is asked before, and answers.
_LONGEST = 3600

#: Go asks one; what is over is not answered.
_QUESTIONS = 8
# Answers that wait, and how many are sent before those who asked get time to read them.
_WAITING = 2048
_BURST = 32
_BURST_PAUSE = 0.005


class MDNSOptions(msgspec.Struct, frozen=True):
    """The options of ``mdns:``: ``timeout`` is how long a reader waits for answers at most."""

    timeout: float = 1.0


class MDNSRegistry(Registry):
    """Nodes that announce themselves by multicast.

    ``dropped`` counts what was heard and not taken: broken packets, false nodes, and what is over
    the limits.
    """

    schemes: ClassVar[tuple[str, ...]] = ("mdns",)
    Options: ClassVar[type[msgspec.Struct]] = MDNSOptions
    features: RegistryFeatures = RegistryFeatures(min_ttl=2.0, converge=3.0, ignores_case=True)

    def __init__(self, url: URL) -> None:
        super().__init__(url)
        self.dropped: int = 0
        self._timeout = MDNSOptions().timeout
        self._link: Link | None = None
        self._own: dict[str, _Own] = {}
        self._leaving: dict[asyncio.Task[None], str] = {}
        self._views: set[View] = set()
        self._answers: asyncio.Queue[_Answer] = asyncio.Queue(_WAITING)
        self._tasks: list[asyncio.Task[None]] = []
        self._warned = -math.inf

    async def connect(self, connections: Connections) -> None:
        if self.url.hosts:
            raise ConfigError(f"{self.url.source}: mdns has no hosts; write mdns or mdns:///name")
        self._timeout = self.url.options(MDNSOptions).timeout
        self._zone = Zone(self.url.path, socket.gethostname())
        link = Link(self._hear)
        await link.open()
        self._link = link
        self._tasks = [
            asyncio.create_task(self._send_answers(link), name="micro.mdns answers"),
            asyncio.create_task(self._scan(link), name="micro.mdns interfaces"),
        ]

    async def aclose(self) -> None:
        link, self._link = self._link, None
        if link is None:
            return
        try:
            for own in tuple(self._own.values()):
                self._leave(own, link)
            await asyncio.gather(*self._leaving, return_exceptions=True)
        finally:
            for view in self._views:
                view.end(Closed("mdns: the registry was closed"))
            tasks = [*self._tasks, *self._leaving]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await link.aclose()

    async def register(self, node: Node, *, ttl: float) -> None:
        link = self._open()
        check_ttl(ttl, self.features)
        card = self._zone.card(node)
        until = time.monotonic() + ttl
        own = self._own.get(card.key)
        if own is None or own.card != card or not own.ttl:
            own = _Own(card, until)
            self._announce(own, link)
            self._take_over(own)
        else:
            own.until = until
            self._announce(own, link)
        for view in self._views:
            self._show(own, view)

    async def deregister(self, node: Node) -> None:
        link = self._open()
        own = self._own.get(f"{check_node(node).id}.{node.service}".lower())
        if own is not None:
            self._leave(own, link)

    async def get(self, service: str) -> tuple[Node, ...]:
        with self._view(check_service(service)) as view:
            await view.quiet(self._timeout)
            nodes = view.nodes()
        if not nodes:
            raise ServiceNotFound(f"service {service!r} is not registered: nobody answers on mdns")
        return nodes

    async def services(self) -> tuple[str, ...]:
        with self._view(None, only_names=True) as view:
            await view.quiet(self._timeout)
            return tuple(sorted(view.names.values()))

    async def follow(
        self, service: str | None, mark: object
    ) -> AsyncGenerator[tuple[object, Snapshot | Change | None], None]:
        self._open()
        if mark is not None:
            raise Gap("mdns: what was said meanwhile is not known")
        with self._view(None if service is None else check_service(service)) as view:
            await view.answered(self._timeout)
            yield True, Snapshot(nodes=view.begin())
            while True:
                for change in await view.changes():
                    yield True, change

    def _open(self) -> Link:
        if self._link is None:
            raise Closed("mdns: the registry is not connected")
        return self._link

    @contextmanager
    def _view(self, service: str | None, *, only_names: bool = False) -> Iterator[View]:
        link = self._open()
        view = View(service, lambda name: link.ask(self._zone.query(name)), only_names=only_names)
        for own in self._own.values():
            self._show(own, view)
        self._views.add(view)
        try:
            yield view
        finally:
            self._views.discard(view)

    # -- what we say

    def _announce(self, own: _Own, link: Link) -> None:
        if own.ttl:
            packet = self._zone.announcement(own.card, ttl=own.ttl)
            link.multicast(packet, only_here=own.only_here)

    def _announce_again(self, own: _Own) -> None:
        try:
            self._announce(own, self._open())
        except MicroError as exc:
            _log.debug("mdns: announcing %s again: %s", own.card.key, exc)

    def _take_over(self, own: _Own) -> None:
        """Have ``own`` in place of what its name stood for, which may be just leaving."""
        key = own.card.key
        for task, leaving in self._leaving.items():
            if leaving == key:
                task.cancel()
        if key in self._own:
            self._own[key].stop()
        self._own[key] = own
        own.repeat(self._announce_again)

    def _leave(self, own: _Own, link: Link) -> None:
        key = own.card.key
        own.stop()
        del self._own[key]
        for view in self._views:
            view.forget(key)
        if own.ttl:
            packet = self._zone.announcement(own.card, ttl=0)
            self._say_goodbye(packet, own, link)
            task = asyncio.create_task(self._goodbyes(packet, own, link), name=f"micro.mdns {key}")
            self._leaving[task] = key
            task.add_done_callback(self._leaving.pop)

    async def _goodbyes(self, packet: bytes, own: _Own, link: Link) -> None:
        for pause in _GOODBYES:
            await asyncio.sleep(pause)
            self._say_goodbye(packet, own, link)

    def _say_goodbye(self, packet: bytes, own: _Own, link: Link) -> None:
        try:
            link.multicast(packet, only_here=own.only_here)
        except Unavailable as exc:
            _log.debug("mdns: goodbye of %s: %s", own.card.key, exc)

    async def _send_answers(self, link: Link) -> None:
        sent = 0
        while True:
            question, own, to = await self._answers.get()
            if own.ttl:
                packet = self._zone.answer(question, own.card, ttl=own.ttl)
                link.answer(packet, to, only_here=own.only_here)
            sent += 1
            if sent % _BURST == 0:
                await asyncio.sleep(_BURST_PAUSE)

    async def _scan(self, link: Link) -> None:
        while True:
            await asyncio.sleep(_SCAN_EVERY)
            self._own = {key: own for key, own in self._own.items() if own.ttl}
            if self._has_new_interface(link):
                for own in self._own.values():
                    self._announce_again(own)
                for view in self._views:
                    view.ask_soon()

    def _has_new_interface(self, link: Link) -> bool:
        try:
            return link.scan()
        except OSError as exc:
            _log.warning("mdns: the network interfaces cannot be listed: %s", exc)
            return False

    # -- what we hear

    def _hear(self, wire: bytes, source: Source, asked: bool) -> None:  # noqa: FBT001 - see Hear
        if self._link is None:
            return
        try:
            packet = parse(wire)
            if not packet.is_answer:
                self._asked(packet.questions, source, self._link)
                return
            for name in self._zone.listed(packet):
                self._learn_name(check_service(name))
            for instance in self._zone.instances(packet):
                self._learn(instance, source, self._link, asked=asked)
        except MicroError as exc:
            self._drop(exc, source)

    def _asked(self, questions: tuple[Question, ...], source: Source, link: Link) -> None:
        asked = {question.text: question for question in questions[:_QUESTIONS]}
        names = [name for name in asked if name.endswith(self._zone.suffix)]
        if not names or link.is_own(source):
            return
        local = link.is_local(source[0])
        shown = [own for own in self._own.values() if own.ttl and (local or not own.only_here)]
        for name in names:
            if name == self._zone.list_name:
                fitting = list({own.service: own for own in shown}.values())
            else:
                fitting = [own for own in shown if self._zone.is_asked(name, own.card)]
            for own in fitting:
                self._queue(_Answer(asked[name], own, source))

    def _queue(self, answer: _Answer) -> None:
        try:
            self._answers.put_nowait(answer)
        except asyncio.QueueFull:
            raise ResourceExhausted("more is asked than can be answered") from None

    def _learn_name(self, service: str) -> None:
        if [view for view in self._views if not view.name(service)]:
            raise ResourceExhausted(f"no room for the name {service!r}")

    def _learn(self, instance: Instance, source: Source, link: Link, *, asked: bool) -> None:
        own = self._own.get(instance.key)
        if own is not None and own.ttl:
            if not instance.ttl:  # of one that had the id before, or another's forgery
                self._announce_again(own)
            return
        views = [view for view in self._views if view.wants(instance.key)]
        if not views or instance.key in self._leaving.values():
            return
        local = link.is_local(source[0])
        if instance.ttl == 0:
            for view in views:
                view.forget(instance.key, local=local)
            return
        if asked and any(view.has_just_left(instance.key) for view in views):
            return
        node, size = node_of(instance)
        heard = Heard(node, size, _only_here(instance, source, local=local))
        ttl = min(instance.ttl, _LONGEST)
        if [view for view in views if not view.take(instance.key, heard, ttl=ttl)]:
            raise ResourceExhausted(f"no room for {instance.name[:80]!r}")

    def _show(self, own: _Own, view: View) -> None:
        left = own.until - time.monotonic()
        if view.only_names:
            view.name(own.card.node.service)
        elif left > 0 and view.wants(own.card.key):
            view.take(own.card.key, Heard(own.card.node, 0, own.only_here), ttl=left, own=True)

    def _drop(self, why: MicroError, source: Source) -> None:
        self.dropped += 1
        _log.debug("mdns: dropped a packet from %s: %s", source[0], why)
        if time.monotonic() - self._warned >= _WARN_EVERY:
            self._warned = time.monotonic()
            _log.warning(
                "mdns: dropped %d packets so far, the last from %s: %s",
                self.dropped,
                source[0],
                why,
            )


class _Own:
    """A node of ours, until when it is registered, and its next announcements."""

    def __init__(self, card: Card, until: float) -> None:
        self.card = card
        self.until = until
        self.service = card.node.service.lower()
        self.only_here = card.address.is_loopback
        self._timers: list[asyncio.TimerHandle] = []

    @property
    def ttl(self) -> int:
        """What is left, in whole seconds rounded up; others may forget it late, but never early."""
        return max(0, math.ceil(self.until - time.monotonic()))

    def repeat(self, announce: Callable[[_Own], None]) -> None:
        loop = asyncio.get_running_loop()
        self._timers = [loop.call_later(delay, announce, self) for delay in _AGAIN]

    def stop(self) -> None:
        for timer in self._timers:
            timer.cancel()


class _Answer(NamedTuple):
    question: Question
    own: _Own
    to: Source


def _only_here(instance: Instance, source: Source, *, local: bool) -> bool:
    """Whether the node can be reached from this host alone.

    Raises:
        DecodeError: another host says so, or sends a neighbour to an address it does not have.
    """
    address = instance.address
    if address is None or local:
        return address is not None and address.is_loopback
    if address.is_loopback:
        raise DecodeError(f"{source[0]} announces a node on {address}")
    if address.is_link_local and not ip_address(source[0]).is_link_local:
        raise DecodeError(f"{source[0]} announces a node on {address}")
    return False
