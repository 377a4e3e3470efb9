"""What this process says of its own nodes, and what it hears of the others'."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from uuid import uuid4

from micro.errors import Closed, DecodeError, MicroError, PermissionDenied
from micro.registry import Node
from micro_plugin_nats import _wire
from micro_plugin_nats._client import Client
from micro_plugin_nats._connection import Message
from micro_plugin_nats._link import Link
from micro_plugin_nats._own import Owned
from micro_plugin_nats._view import View

_log = logging.getLogger("micro.nats")

#: Seconds until we ask again for a right to listen that was taken from us.
_AGAIN = 2.0
#: Seconds that others get to come back after an outage, before their silence counts.
_SETTLES = 0.75


class Exchange:
    """Answers for our nodes, and keeps readers informed, on each connection anew.

    ``subjects`` are where questions are asked and where changes are told; ``drop`` is called with
    what others said that does not count.
    """

    def __init__(
        self, client: Client, subjects: tuple[str, str], drop: Callable[[MicroError], None]
    ) -> None:
        self._client = client
        self._questions, self._changes = subjects
        self._drop = drop
        self._id = uuid4().hex
        self._own = Owned()
        self._views: set[View] = set()
        self._link: Link | None = None
        self._woken = asyncio.Event()
        self._error: MicroError | None = None
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Listen; cancelled or failed, it leaves nothing.

        Raises:
            PermissionDenied: the user may not listen, or ask.
        """
        self._task = asyncio.create_task(self._attend(), name="micro.nats registry")
        try:
            async with self._ready() as link:
                await link.tell(self._questions, _wire.question(_wire.NOBODY))
        except BaseException:  # cancelled, too: the task must not stay
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Say goodbye for our nodes, and end all readers."""
        self._error = Closed("nats: the registry was closed")
        self._missed(self._error)
        try:
            with suppress(MicroError):
                self._own.let_all_go()
                for node in self._own.unsaid():
                    await self._publish(_wire.delete(node, self._id))
        finally:
            task, self._task = self._task, None
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def say(self, node: Node, until: float) -> None:
        """Have this node, and those who listen told; when it fails, all is as it was before."""
        own, before = self._own.made(node, until), self._own.get(node)
        async with self._client.call():
            link = await self._listening()
            self._own.hold(own)
            for view in self._views:
                own.show(view)
            try:
                await link.tell(self._changes, _wire.create(own.record, own.ttl, self._id))
                self._check()
            except BaseException:  # cancelled, too
                for view in self._views if self._own.take_back(own, before) else ():
                    view.forget(node)
                self._woken.set()  # others may have heard of it
                raise

    async def unsay(self, node: Node) -> None:
        """Have this node no more, and tell so, whoever has it."""
        self._own.let_go(node)
        for view in self._views:
            view.forget(node)
        async with self._ready() as link:
            await link.tell(self._changes, _wire.delete(node, self._id))
        self._own.has_said(node)

    @asynccontextmanager
    async def viewing(self, service: str | None) -> AsyncIterator[View]:
        """A view that has heard whoever answers; it goes on hearing what is told."""
        async with AsyncExitStack() as stack:
            async with self._ready() as link:
                view = await stack.enter_async_context(self._informed(service, link))
            yield view

    @asynccontextmanager
    async def _ready(self) -> AsyncIterator[Link]:
        """A connection on which we listen, and the time of one call."""
        async with self._client.call():
            yield await self._listening()
            self._check()

    async def _listening(self) -> Link:
        """The connection on which we listen, or the next one."""
        while self._link is None or self._link.ended.is_set():
            self._check()
            self._woken.clear()
            await self._woken.wait()
        self._check()
        return self._link

    def _check(self) -> None:
        if self._error is not None:
            raise type(self._error)(self._error.detail)

    @asynccontextmanager
    async def _informed(self, service: str | None, link: Link) -> AsyncIterator[View]:
        async def ask(service: str | None) -> None:
            await link.publish(self._questions, _wire.question(service), reply=inbox)

        view = View(service, ask)
        for own in self._own:
            own.show(view)
        with link.inbox(lambda message: self._answered(message, view)) as inbox:
            self._views.add(view)
            try:
                if link.is_again:
                    settled = link.opened + min(_SETTLES, self._client.timeout / 2)
                    await asyncio.sleep(settled - time.monotonic())
                await link.tell(self._questions, _wire.question(service), reply=inbox)
                await view.collect(self._client.timeout / 3)  # that nobody answers is no time-out
                yield view
            finally:
                self._views.discard(view)

    async def _attend(self) -> None:
        """Listen on each connection, as long as it lives."""
        link: Link | None = None
        while True:
            link = await self._client.link(other_than=link)
            try:
                async with (
                    link.listening(self._questions, self._asked, self._missed),
                    link.listening(self._changes, self._told, self._missed),
                ):
                    self._link = link
                    if isinstance(self._error, PermissionDenied):
                        self._error = None  # the user may have been given the right
                    self._woken.set()
                    for own in self._own:  # others may have missed it, and we their questions
                        await self._publish(_wire.create(own.record, own.ttl, self._id))
                    while not (link.ended.is_set() or self._error):
                        if not self._own.owes:
                            self._woken.clear()
                            await self._woken.wait()
                        await self._say_goodbyes(link)
            except MicroError as exc:
                _log.debug("nats: not listening: %s", exc)
            self._link = None
            if isinstance(self._error, PermissionDenied):
                await asyncio.sleep(_AGAIN)
                link = None  # the same one does: rights change without an end of it

    async def _asked(self, message: Message) -> None:
        with self._skipping():
            asked = _wire.read_question(message.data)
            if message.reply.startswith(("$", self._questions, self._changes)):
                raise DecodeError(f"the answer is wanted at {message.reply[:80]!r}")
            for own in self._own if message.reply else ():
                if self._link is not None and asked.service in (None, own.node.service):
                    await self._link.publish(message.reply, _wire.answer(own.record, own.ttl))

    async def _told(self, message: Message) -> None:
        if not self._views and b'"delete"' not in message.data:
            return  # what all nodes tell at each interval concerns only who reads
        with self._skipping():
            told = _wire.read_change(message.data)
            for node in () if told.origin == self._id else told.nodes:
                await self._heed(node, told)

    async def _heed(self, node: Node, told: _wire.Told) -> None:
        own = self._own.get(node)
        if own is not None:
            if told.is_delete:  # it lives, and we know better
                await self._publish(_wire.create(own.record, own.ttl, self._id))
        elif told.is_delete:
            for view in self._views:
                view.forget(node)
        else:
            self._learn(node, told.ttl, self._views, told=True)

    def _answered(self, message: Message, view: View) -> None:
        if message.is_unheard:
            view.nobody()
            return
        with self._skipping():
            answer = _wire.read_answer(message.data)
            for node in answer.nodes:
                if self._own.get(node) is None:
                    self._learn(node, answer.ttl, {view}, told=False)

    def _learn(self, node: Node, ttl: float | None, views: set[View], *, told: bool) -> None:
        wanting = [view for view in views if view.wants(node)]
        if [view for view in wanting if not view.take(node, ttl, told=told)]:
            raise DecodeError(f"no room for node {node.id} of {node.service}")

    def _missed(self, error: MicroError) -> None:
        """The connection ended, or more came than could be read, or we may not listen."""
        if isinstance(error, PermissionDenied):
            self._error = error
        self._woken.set()
        for view in self._views:
            view.end(error)

    async def _say_goodbyes(self, link: Link) -> None:
        for node in self._own.unsaid():  # what the server has not taken is said on the next link
            with suppress(PermissionDenied):  # nobody has heard of it
                await link.tell(self._changes, _wire.delete(node, self._id))

    async def _publish(self, change: bytes) -> None:
        if self._link is not None:
            await self._link.publish(self._changes, change)

    @contextmanager
    def _skipping(self) -> Iterator[None]:
        """What others say and what does not count hides nothing."""
        try:
            yield
        except DecodeError as exc:
            self._drop(exc)
        except MicroError as exc:
            _log.debug("nats: nothing said: %s", exc)
