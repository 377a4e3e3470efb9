"""Choosing the node that a call goes to: which may be called, and which of them is.

A strategy is a plain callable, so a program writes its own in a few lines::

    def nearest() -> Strategy:
        return lambda candidates, call: min(candidates, key=lambda one: distance(one.node))

    service = micro.Service("web", selector=Selector(strategy=nearest))
"""

from __future__ import annotations

import struct
from bisect import bisect
from collections.abc import Callable, Sequence
from typing import TypeAlias

import msgspec

from micro.call import Call
from micro.registry import Node

#: Points that a key of ``consistent_hash`` tries, and those of a node that it may find.
_PROBES = 11
_POINTS = struct.Struct(">8Q")


class Candidate:
    """A node that can be called; ``outstanding`` counts this client's calls that run on it.

    A node that said that it has too much counts as busier until it wants to be asked again.
    """

    __slots__ = ("node", "outstanding")

    def __init__(self, node: Node) -> None:
        self.node: Node = node
        self.outstanding: int = 0

    def release(self) -> None:
        """A call on it has ended."""
        self.outstanding -= 1


#: Gives one of at least one candidate; the sequence stays the same object until they change.
Strategy: TypeAlias = Callable[[Sequence[Candidate], Call], Candidate]
#: Whether a node may be called.
Filter: TypeAlias = Callable[[Node], bool]


def least_busy_of_two() -> Strategy:
    """Of two by chance the one with fewer calls; the cost does not grow with their number.

    Source: M. Mitzenmacher, The Power of Two Choices in Randomized Load Balancing, 1996.
    """
    from random import random

    def choose(candidates: Sequence[Candidate], _: Call) -> Candidate:
        count = len(candidates)
        if count == 1:
            return candidates[0]
        first = int(random() * count)
        one, other = candidates[first], candidates[int(random() * count)]
        if other is one:  # two that differ: a node that is stuck is never compared with itself
            other = candidates[first - 1]
        return other if other.outstanding < one.outstanding else one

    return choose


def at_random() -> Strategy:
    """Any of them, each as often as the others."""
    from random import random

    return lambda candidates, _: candidates[int(random() * len(candidates))]


def round_robin() -> Strategy:
    """One after the other, across the calls of a client; it begins anywhere."""
    from random import randrange

    turn = randrange(1_000_000)

    def choose(candidates: Sequence[Candidate], _: Call) -> Candidate:
        nonlocal turn
        turn += 1
        return candidates[turn % len(candidates)]

    return choose


def consistent_hash(key: Callable[[Call], str]) -> Callable[[], Strategy]:
    """The same node for calls with the same ``key(call)``, as long as it is there and up.

    When a node comes or goes, only the keys that it takes or leaves move. Each node has a half to
    one and a half of its share of many keys. The cost grows with the logarithm of the number of
    nodes. A Selector takes what this gives::

        Selector(strategy=consistent_hash(lambda call: call.metadata["tenant"]))

    Source: B. Appleton, M. O'Reilly, Multi-probe consistent hashing, 2015.
    """

    def strategy() -> Strategy:
        owners: dict[int, Candidate] = {}
        places: list[int] = []
        seen: Sequence[Candidate] = ()

        def choose(candidates: Sequence[Candidate], call: Call) -> Candidate:
            nonlocal owners, places, seen
            if candidates is not seen:
                owners = {point: one for one in candidates for point in _points(one.node.id)}
                places, seen = sorted(owners), candidates
            return owners[_nearest(places, key(call))]

        return choose

    return strategy


def version(wanted: str) -> Filter:
    """Nodes of this version."""
    return lambda node: node.version == wanted


def label(name: str, value: str) -> Filter:
    """Nodes whose metadata has ``name`` with this value."""
    return lambda node: node.metadata.get(name) == value


def endpoint(name: str) -> Filter:
    """Nodes that say that they have this endpoint, ``Handler.Method``."""
    return lambda node: any(one.name == name for one in node.endpoints)


class Selector(msgspec.Struct, frozen=True, kw_only=True):
    """Which nodes may be called, and which of them is.

    ``strategy`` makes the Strategy of one service, once; all of ``filters`` must take a node. Make
    a Selector once and give it to many calls: nodes are filtered when they change, not by call.
    Whatever the selector, what is known of a node's health and load is the same.
    """

    strategy: Callable[[], Strategy] = least_busy_of_two
    filters: tuple[Filter, ...] = ()

    def allows(self, node: Node) -> bool:
        return all(allowed(node) for allowed in self.filters)


def _points(text: str) -> tuple[int, ...]:
    from hashlib import blake2b

    return _POINTS.unpack(blake2b(text.encode(), digest_size=_POINTS.size).digest())


def _nearest(places: list[int], key: str) -> int:
    """The next place to some probe of a key, of all probes the one with the shortest way."""
    from hashlib import blake2b

    digest = blake2b(key.encode(), digest_size=16).digest()
    place, step = int.from_bytes(digest[:8]), int.from_bytes(digest[8:]) | 1
    best, shortest = 0, 1 << 64
    for _ in range(_PROBES):
        found = places[bisect(places, place) % len(places)]
        way = (found - place) % (1 << 64)
        if way < shortest:
            best, shortest = found, way
        place = (place + step) % (1 << 64)
    return best
