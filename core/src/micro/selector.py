"""Choosing the node that a call goes to."""

from __future__ import annotations

import random
from collections.abc import Sequence

from micro.registry import Node


def choose(nodes: Sequence[Node]) -> Node:
    """One of ``nodes``, each as likely; the cost does not grow with their number."""
    return nodes[int(random.random() * len(nodes))]
