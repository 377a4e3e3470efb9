"""What a consumer of JetStream delivers, from its first message on: whole, or at an end.

Source: https://github.com/nats-io/nats-architecture-and-design, ADR-15 (subjects of
acknowledgements) and ADR-9 (heartbeats).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from contextlib import suppress
from typing import NamedTuple

from micro.errors import MicroError, Unavailable
from micro_plugin_nats._connection import Message

#: Seconds after which a stream without a sign of life is dead; the server gives one every 2 s.
_SILENCE = 5.0
#: Messages that its reader may have left unread.
_UNREAD = 16 * 1024
_IDLE = "100"
#: Operations, and reasons of the server's own, after which a key holds nothing.
_DELETES = ("KV-Operation", "Nats-Marker-Reason")


class Entry(NamedTuple):
    """What a key holds; None: it was deleted, or its time to live is over."""

    key: str
    value: bytes | None


class Stream:
    """Entries in the order in which they were stored; a hole, or silence, is its end."""

    def __init__(self, where: str, prefix: int) -> None:
        self._where = where
        self._prefix = prefix
        self._entries: deque[Entry] = deque()
        self._delivered = 0
        self._read = 0
        self._expected = 0
        self._idle = False
        self._alive = time.monotonic()
        self._error: MicroError | None = None
        self._woken = asyncio.Event()

    def expect(self, count: int) -> None:
        """So many entries were there when it began."""
        self._expected = count

    def end(self, error: MicroError) -> None:
        self._error = self._error or error
        self._woken.set()

    def take(self, message: Message) -> None:
        """What the server delivers."""
        self._alive = time.monotonic()
        if message.status == _IDLE:
            self._idle = True
            self._check_number(int(message.headers.get("Nats-Last-Consumer", self._delivered)))
        elif message.status:
            said = message.headers.get("Description", message.status)
            self.end(Unavailable(f"{self._where}: the stream ended: {said}"))
        else:
            self._delivered += 1
            number, pending = _place(message.reply)
            self._check_number(number)
            self._idle = not pending
            is_gone = any(name in message.headers for name in _DELETES)
            value = None if is_gone else message.data
            self._entries.append(Entry(message.subject[self._prefix :], value))
            if len(self._entries) > _UNREAD:
                self.end(Unavailable(f"{self._where}: more changes than are read"))
        self._woken.set()

    async def first(self) -> list[Entry]:
        """The entries that were there when it began.

        Raises:
            Unavailable: it broke.
        """
        entries: list[Entry] = []
        # One that expires meanwhile does not come; then a sign of life shows that none is left.
        while len(entries) < self._expected and not (self._idle and not self._entries):
            await self._wait(math.inf)
            entries += self._taken()
        return entries

    async def next(self, until: float = math.inf) -> list[Entry]:
        """What has come since, once there is something; nothing at the moment ``until``.

        Raises:
            Unavailable: it broke, or nothing proves any more that it lives.
        """
        while not self._entries and time.monotonic() < until:
            await self._wait(until)
        self._raise()
        return self._taken()

    def _taken(self) -> list[Entry]:
        entries = list(self._entries)
        self._entries.clear()
        return entries

    def _raise(self) -> None:
        if self._error is not None:
            raise type(self._error)(self._error.detail)

    async def _wait(self, until: float) -> None:
        """Until something came, or that moment."""
        self._raise()
        if self._entries:
            return
        now = time.monotonic()
        if now >= self._alive + _SILENCE:
            raise Unavailable(f"{self._where}: the stream is silent")
        self._woken.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(min(until, self._alive + _SILENCE) - now):
                await self._woken.wait()

    def _check_number(self, number: int) -> None:
        if number != self._delivered:
            self.end(Unavailable(f"{self._where}: a change was lost on the way"))


def _place(reply: str) -> tuple[int, int]:
    """The number of a delivery, and how many are to come, in the subject of its acknowledgement."""
    words = reply.split(".")
    short = len(words) == 9  # the form without domain and account
    return int(words[6 if short else 8]), int(words[8 if short else 10])
