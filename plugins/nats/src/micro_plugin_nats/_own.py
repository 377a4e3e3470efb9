"""The nodes of this process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

from micro.record import encode_node
from micro.registry import Node
from micro_plugin_nats._view import Key, View, key_of


class Own(NamedTuple):
    """A node of ours, its record, and until when it is registered."""

    node: Node
    record: bytes
    until: float

    @property
    def ttl(self) -> float:
        return self.until - time.monotonic()

    def show(self, view: View) -> None:
        """To a reader in this process, who would not hear our own answers."""
        if view.wants(self.node) and self.ttl > 0:
            view.take(self.node, self.ttl, own=True)


class Owned:
    """The nodes that we say we have, and those of whose going nobody could be told yet."""

    def __init__(self) -> None:
        self._held: dict[Key, Own] = {}
        self._unsaid: dict[Key, Own] = {}

    def __iter__(self) -> Iterator[Own]:
        """Those whose time is not over, each as it is at its turn, if it is still there then."""
        self._held = {key: own for key, own in self._held.items() if own.ttl > 0}
        return (self._held[key] for key in list(self._held) if key in self._held)

    def get(self, node: Node) -> Own | None:
        """What we say of a node, while its time is not over."""
        own = self._held.get(key_of(node))
        return own if own is not None and own.ttl > 0 else None

    def made(self, node: Node, until: float) -> Own:
        """What to say of a node; a heartbeat has the same node, of which the same is to say."""
        held = self._held.get(key_of(node))
        record = encode_node(node) if held is None or held.node is not node else held.record
        return Own(node, record, until)

    def hold(self, own: Own) -> None:
        self._held[key_of(own.node)] = own
        self._unsaid.pop(key_of(own.node), None)

    def take_back(self, own: Own, before: Own | None) -> bool:
        """Have what was there before ``own``; whether that is nothing now.

        Others may have heard of it all the same; they are told when they can be.
        """
        if self.get(own.node) is not own:
            return False  # more was said since
        if before is not None:
            self.hold(before)
            return False
        self.let_go(own.node)
        return True

    def let_go(self, node: Node) -> None:
        """Have it no more; that it goes is still to be said."""
        own = self._held.pop(key_of(node), None)
        if own is not None:
            self._unsaid[key_of(node)] = own

    def let_all_go(self) -> None:
        for own in self:
            self.let_go(own.node)

    def has_said(self, node: Node) -> None:
        """That it goes was said."""
        self._unsaid.pop(key_of(node), None)

    @property
    def owes(self) -> bool:
        """Whether nobody was told yet of the going of one."""
        return bool(self._unsaid)

    def unsaid(self) -> Iterator[Node]:
        """Those of whose going nobody was told; each was told of when the next is asked for."""
        while self._unsaid:
            key, own = next(iter(self._unsaid.items()))
            if own.ttl > 0:  # else others do not know it any more
                yield own.node
            if self._unsaid.get(key) is own:
                del self._unsaid[key]
