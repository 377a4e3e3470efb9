"""Choosing the node that a call goes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from micro.registry import Node


class Candidate:
    """A node that can be called; ``outstanding`` counts this client's calls that run on it."""

    __slots__ = ("node", "outstanding")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.outstanding = 0


#: Gives one of at least one candidate; made once for each service that is called.
Strategy: TypeAlias = Callable[[Sequence[Candidate]], Candidate]


def least_busy_of_two() -> Strategy:
    """Of two by chance the one with fewer calls; the cost does not grow with their number.

    Source: M. Mitzenmacher, The Power of Two Choices in Randomized Load Balancing, 1996.
    """
    from random import random

    def choose(candidates: Sequence[Candidate]) -> Candidate:
        count = len(candidates)
        if count == 1:
            return candidates[0]
        first = candidates[int(random() * count)]
        second = candidates[int(random() * count)]
        return second if second.outstanding < first.outstanding else first

    return choose
