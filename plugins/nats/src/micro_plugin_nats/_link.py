"""A connection on which questions are asked: answers have a subject of their own."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from itertools import count
from typing import Self
from uuid import uuid4

from micro.errors import MicroError
from micro_plugin_nats._connection import Concern, Connection, Message
from micro_plugin_nats._dialing import Host, Login


class Link(Connection):
    """A connection, and the inboxes of those who wait for answers on it."""

    def __init__(self, where: str, *, is_again: bool) -> None:
        super().__init__(where, is_again=is_again)
        self._inbox = f"_INBOX.{uuid4().hex}"
        self._numbers = count()
        #: Who takes what comes to an inbox.
        self.heard: dict[str, Callable[[Message], None]] = {}
        self._listening = AsyncExitStack()

    async def open(
        self, host: Host, login: Login | None, tls: ssl.SSLContext | None, *, within: float
    ) -> None:
        await super().open(host, login, tls, within=within)
        answers = self.listening(f"{self._inbox}.*", self._answered, self._end)
        try:
            await self._listening.enter_async_context(answers)
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        try:
            await super().aclose()
        finally:
            await self._listening.aclose()

    async def ask(
        self, subject: str, data: bytes = b"", headers: dict[str, str] | None = None
    ) -> Message:
        """The first answer; it may be that nobody listens.

        Raises:
            Unavailable: the connection has ended.
            PermissionDenied: the user may not publish to ``subject``.
        """
        with _Waiting(self, subject) as waiting:
            await self.publish(subject, data, reply=waiting.inbox, headers=headers)
            return await waiting.answer

    async def tell(self, subject: str, data: bytes, reply: str = "") -> None:
        """Publish, and wait until the server has taken it, and all that was published before.

        nats-py's own ``flush`` does not prove it: its PING overtakes what waits to be sent.

        Raises:
            Unavailable: the connection has ended.
            PermissionDenied: the user may not publish to ``subject``.
        """
        with _Waiting(self, subject) as waiting:
            await self.publish(subject, data, reply=reply)
            await self.publish(waiting.inbox, b"")
            await waiting.answer

    @contextmanager
    def inbox(self, heard: Callable[[Message], None]) -> Iterator[str]:
        """A subject of our own, for answers."""
        name = self.new_inbox()
        self.heard[name] = heard
        try:
            yield name
        finally:
            del self.heard[name]

    def new_inbox(self) -> str:
        """A name for one, which nothing else has."""
        return f"{self._inbox}.{next(self._numbers)}"

    def _answered(self, message: Message) -> None:
        heard = self.heard.get(message.subject)
        if heard is not None:  # who asked may have gone
            heard(message)


class _Waiting(Concern):
    """Waits for the first message in an inbox, or for the reason why none can come."""

    __slots__ = ("_link", "answer", "inbox")

    def __init__(self, link: Link, subject: str) -> None:
        self.answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self.inbox: str = link.new_inbox()
        super().__init__(subject, self.inbox)
        self._link = link

    def __enter__(self) -> Self:
        self._link.add_concern(self)
        self._link.heard[self.inbox] = self._settle
        return self

    def __exit__(self, *exc: object) -> None:
        del self._link.heard[self.inbox]
        self._link.remove_concern(self)
        if not self.answer.cancel() and not self.answer.cancelled():
            self.answer.exception()  # nobody may have waited for it any more

    def lose(self, error: MicroError) -> None:
        if not self.answer.done():
            self.answer.set_exception(type(error)(error.detail))

    def _settle(self, message: Message) -> None:
        if not self.answer.done():
            self.answer.set_result(message)
