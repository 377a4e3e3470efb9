"""A registry and the reference, given the same operations by chance, answer the same."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar, cast

import hypothesis
import msgspec
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from micro.backend import Connections
from micro.backends.memory import MemoryRegistry
from micro.follow import View
from micro.registry import Node, Registry
from micro.testing._nodes import converge, found
from micro.testing.waiting import eventually
from micro.url import URL

T = TypeVar("T")

_SERVICES = ("one", "one.two", "other")
#: Seconds that one step may take at most, on any backend.
_LONGEST = 60.0


def _texts() -> st.SearchStrategy[dict[str, str]]:
    return st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2)


_services = st.sampled_from(_SERVICES)
_nodes = st.builds(
    Node,
    service=_services,
    id=st.sampled_from(["a", "b", "B-1_c"]),
    address=st.sampled_from(["127.0.0.1:1", "127.0.0.1:65535"]),
    version=st.text(max_size=3),
    metadata=_texts(),
    service_metadata=_texts(),
)


class _Machine(RuleBasedStateMachine):
    """Runs in a thread; what it does with the registries is done in their event loop."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, registry: Registry, other: Registry
    ) -> None:
        super().__init__()
        self._loop = loop
        self._registry = registry
        self._other = other
        self._prefix = f"model-{uuid.uuid4().hex[:8]}"
        self._reference = MemoryRegistry(URL.parse("memory"))
        self._connections = Connections()
        self._view = self._do(self._begin())

    @rule(node=_nodes)
    def register(self, node: Node) -> None:
        ours = self._named(node)
        self._both(lambda registry: registry.register(ours, ttl=60))

    @rule(node=_nodes)
    def deregister(self, node: Node) -> None:
        ours = self._named(node)
        self._both(lambda registry: registry.deregister(ours))

    @rule(service=_services)
    def get(self, service: str) -> None:
        name = f"{self._prefix}.{service}"
        answer, expected = self._both(lambda registry: found(registry, name))
        assert answer == expected

    @rule()
    def services(self) -> None:
        answer, expected = self._both(self._listed)
        assert answer == expected

    @rule()
    def settle(self) -> None:
        """What another client is told, put together, is what the reference holds."""
        self._do(eventually(self._agree, within=converge(self._other)))

    def teardown(self) -> None:
        try:
            self.settle()
        finally:
            self._do(self._end())

    def _both(self, do: Callable[[Registry], Coroutine[Any, Any, T]]) -> tuple[T, T]:
        return self._do(do(self._registry)), self._do(do(self._reference))

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_LONGEST)

    def _named(self, node: Node) -> Node:
        """The same node, under the names of this example."""
        return msgspec.structs.replace(node, service=f"{self._prefix}.{node.service}")

    async def _begin(self) -> View:
        await self._reference.connect(self._connections)
        view = View(self._other, None, ttl=60)
        await view.entered()
        return view

    async def _end(self) -> None:
        await self._view.aclose()
        for node in await self._held():
            await self._registry.deregister(node)
        await self._reference.aclose()
        await self._connections.aclose()

    async def _agree(self) -> bool:
        ours = [node for node in self._view.nodes if node.service.startswith(self._prefix)]
        return ours == await self._held()

    async def _held(self) -> list[Node]:
        names = await self._reference.services()
        return [node for name in names for node in await self._reference.get(name)]

    async def _listed(self, registry: Registry) -> list[str]:
        return [name for name in await registry.services() if name.startswith(self._prefix)]


async def check_against_model(
    registry: Registry, other: Registry, *, examples: int, steps: int, seed: int
) -> None:
    """Try ``examples`` rows of ``steps`` operations.

    A failure is told with the operations that led to it; where changes are seen at once, with the
    fewest that lead to it. Elsewhere each further try would take a wait.
    """
    begin = partial(_Machine, asyncio.get_running_loop(), registry, other)
    quick = registry.features.converge == 0
    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=False,
        database=None,
        print_blob=True,
        phases=(Phase.generate, Phase.shrink) if quick else (Phase.generate,),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )

    @hypothesis.seed(seed)
    def machine() -> _Machine:
        return begin()

    made = cast("type[_Machine]", machine)  # a function that makes one does as well
    await asyncio.to_thread(run_state_machine_as_test, made, settings=settings)
