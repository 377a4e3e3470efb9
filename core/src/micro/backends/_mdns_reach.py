"""Whether multicast works here: what is said on each interface has to come back."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import suppress

from micro.backends._mdns_link import Link, Source
from micro.backends._mdns_wire import Zone

#: Seconds that a packet may take to come back, and between two of them, as each may be lost.
_WITHIN = 1.0
_EVERY = 0.2


async def heard() -> dict[str, bool]:
    """For each interface that takes multicast, by name: whether its own packets came back.

    They are questions for a name that nobody has.

    Raises:
        Unavailable: no interface takes multicast.
    """
    token, zone = uuid.uuid4().hex[:12], Zone("", "doctor")
    missing: dict[bytes, int] = {}
    all_came = asyncio.Event()

    def hear(wire: bytes, _source: Source, _asked: bool) -> None:  # noqa: FBT001 - see Hear
        missing.pop(wire, None)
        if not missing:
            all_came.set()

    link = Link(hear)
    await link.open()
    try:
        names = link.names()
        missing |= {zone.query(f"doctor-{token}-{index}"): index for index in names}
        with suppress(TimeoutError):
            async with asyncio.timeout(_WITHIN):
                await _ask(link, missing, all_came)
    finally:
        await link.aclose()
    return {name: index not in missing.values() for index, name in names.items()}


async def _ask(link: Link, missing: dict[bytes, int], all_came: asyncio.Event) -> None:
    """Send what is missing, again and again, until all has come."""
    while missing:
        for packet, index in tuple(missing.items()):
            link.multicast(packet, only_here=False, index=index)
        with suppress(TimeoutError):
            await asyncio.wait_for(all_came.wait(), _EVERY)
