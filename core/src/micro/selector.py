"""Choosing the node that a call goes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from micro.registry import Node

#: Gives one of at least one node; made once for each service that is called.
Strategy: TypeAlias = Callable[[Sequence[Node]], Node]


def at_random() -> Strategy:
    """Each node is as likely; the cost does not grow with their number."""
    from random import random

    def choose(nodes: Sequence[Node]) -> Node:
        return nodes[int(random() * len(nodes))]

    return choose
