"""Whether a node gets calls: it is registered for as long as its service says that it is ready."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeAlias

from micro.registration import Registration

_log = logging.getLogger("micro.service")

#: Says whether a service should get calls: None or True, else False, or it raises.
ReadyCheck: TypeAlias = Callable[[], Awaitable[bool | None] | bool | None]

#: Seconds between two questions, and that an answer may take.
EVERY = 1.0
WITHIN = 2.0
#: Seconds that registering may take when a node becomes ready.
_REGISTERING = 10.0
#: Seconds that a check that is cancelled has to end.
_LAST_WAIT = 0.3


class Presence:
    """Keeps a node registered while its service is ready, and out of the registry while it is not.

    ``check`` is asked every second, by one task, and has two seconds to answer; a longer one says
    no, and is not asked again before it has ended. Without one a service is ready while it runs.
    ``tell`` hears each change: why the service is not ready, "" when it is. It is told neither too
    early nor too late: not ready before the node is taken out, ready once it is registered.
    """

    def __init__(
        self,
        name: str,
        registration: Registration,
        check: ReadyCheck | None,
        tell: Callable[[str], None],
    ) -> None:
        self._name = name
        self._registration = registration
        self._check = None if check is None else _Question(check)
        self._tell = tell
        self._why = "it is starting"
        self._task: asyncio.Task[None] | None = None

    @property
    def why(self) -> str:
        """Why the service is not ready; "" if it is."""
        return self._why

    async def start(self) -> None:
        """Register, if the service is ready; else as soon as it is.

        Raises:
            MicroError: it is ready, and the registry cannot be told.
        """
        if self._check is None:
            await self._register()
            return
        try:
            why = await self._check.ask()
            if not why:
                await self._register()
            else:
                self._note(why)
                _log.info("%s: registers when it is ready; now %s%s", *self._told(why))
        except BaseException:
            await self._check.aclose()
            raise
        self._task = asyncio.create_task(self._run(self._check), name=f"micro.ready {self._name}")

    async def stop(self) -> None:
        """Ask no more, and take the node out of the registry, if it is there."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._registration.stop()
        if self._check is not None:
            await self._check.aclose()

    async def _run(self, check: _Question) -> None:
        from random import uniform

        while True:
            await asyncio.sleep(EVERY * uniform(0.9, 1.1))
            why = await check.ask()
            if why and self._registration.registered:
                self._note(why)
                _log.warning("%s: not ready, taken out of the registry: %s%s", *self._told(why))
                await self._registration.stop()
            elif not why and self._why:
                await self._try_to_register()
            elif why != self._why:
                self._note(why)
                _log.warning("%s: not ready: %s%s", *self._told(why))

    async def _try_to_register(self) -> None:
        try:
            async with asyncio.timeout(_REGISTERING):
                await self._register()
        except Exception as exc:  # whatever a backend raises, the next time it may not
            why = f"it cannot be registered: {type(exc).__name__}"
            if why != self._why:
                self._note(why)
                _log.warning("%s: ready, but not registered, trying on: %r", self._name, exc)
        else:
            _log.info("%s: ready, and registered", self._name)

    async def _register(self) -> None:
        await self._registration.start()
        self._note("")

    def _note(self, why: str) -> None:
        self._why = why
        self._tell(why)

    def _told(self, why: str) -> tuple[str, str, str]:
        """What a log line needs; an exception's text is for the log alone."""
        return self._name, why, self._check.detail if self._check is not None else ""


class _Question:
    """A service's own check, asked so that it can neither wait for ever nor be asked twice at once.

    A plain function runs in a thread, since it may wait for something.
    """

    def __init__(self, check: ReadyCheck) -> None:
        called = getattr(check, "__call__", check)  # noqa: B004 - the method of an object
        self._in_loop = any(inspect.iscoroutinefunction(one) for one in (check, called))
        self._check = check
        self._asked: asyncio.Task[object] | None = None
        #: The text of the last exception, after a colon.
        self.detail: str = ""

    async def ask(self) -> str:
        """Why the service is not ready, without what may be a secret; "" if it is."""
        self.detail = ""
        if self._asked is None or _is_over(self._asked):  # what it said meanwhile is old
            self._asked = asyncio.create_task(self._answer(), name="micro.ready_check")
        asked = self._asked
        done, _ = await asyncio.wait({asked}, timeout=WITHIN)
        if not done:
            if self._in_loop:  # a thread cannot be cancelled: it goes on, and is waited for
                asked.cancel()
            return f"ready_check did not answer in {WITHIN:g} s"
        self._asked = None
        if asked.cancelled():
            return "ready_check was cancelled"
        error = asked.exception()
        if error is not None:
            self.detail = f": {error}"
            return f"ready_check raised {type(error).__name__}"
        return _why(asked.result())

    async def aclose(self) -> None:
        """Wait for a check no longer; one that ignores its cancellation is left to the process."""
        asked, self._asked = self._asked, None
        if asked is not None:
            asked.cancel()
            await asyncio.wait({asked}, timeout=_LAST_WAIT)
            _is_over(asked)

    async def _answer(self) -> object:
        answer = self._check() if self._in_loop else await _in_thread(self._check)
        return await answer if inspect.isawaitable(answer) else answer


def _is_over(asked: asyncio.Task[object]) -> bool:
    """Whether it has ended; its exception is then looked at, and nobody is told of it."""
    if asked.done() and not asked.cancelled():
        asked.exception()
    return asked.done()


def _why(answer: object) -> str:
    if answer is None or answer is True:
        return ""
    if answer is False:
        return "ready_check says no"
    return f"ready_check returned a {type(answer).__name__}, not True, False or None"


async def _in_thread(function: Callable[[], Any]) -> Any:
    """What a plain function returns; the thread holds no process that ends."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[tuple[Any, Exception | None]] = loop.create_future()

    def settle(result: Any, error: Exception | None) -> None:
        if not ended.done():
            ended.set_result((result, error))

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except Exception as exc:  # the loop's side raises it
            error = exc
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="micro ready_check", daemon=True).start()
    result, error = await ended
    if error is not None:
        raise error
    return result
