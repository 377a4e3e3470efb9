"""``micro health``: each node of a service is asked how it is, by itself."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
import msgspec

from micro.cli import _output
from micro.cli._report import time_text
from micro.client import Client
from micro.errors import DeadlineExceeded, DecodeError, EndpointNotFound, MicroError, Unavailable
from micro.registry import Node
from micro.selector import Selector

EPILOG = """Exit status: 0 when all nodes are healthy, 1 when one is not, 3 when there is none;
otherwise as with the other commands."""
#: Nodes that are asked at once: each may take a connection.
_AT_ONCE = 256
_NO_ENDPOINT = "answers, and has no Debug.Health to say more"
#: What the metadata of a node that can be asked says; Go Micro's gRPC servers say another.
_PROTOCOL = "mucp"
#: Problems by what was behind an error; FileNotFoundError is that of a unix socket.
_CAUSES = {
    TimeoutError: "silent",
    ConnectionRefusedError: "refused",
    FileNotFoundError: "refused",
    ssl.SSLError: "handshake",
    OSError: "unreachable",
}
#: What is printed of a problem.
PROBLEMS = {
    "foreign": "not asked, since it speaks {detail}",
    "gone": "it has left the registry meanwhile",
    "refused": "refused: nobody listens there",
    "silent": "no answer in {seconds:.1f} s",
    "unreachable": "unreachable: {detail}",
    "handshake": "no handshake: {detail}",
    "lost": "hung up: {detail}",
    "unhealthy": "answers, but is not healthy: {detail}",
}


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of asking one node; ``seconds`` until then. docs/bench.md has the problems."""

    id: str
    address: str
    version: str
    reachable: bool
    healthy: bool
    seconds: float
    problem: str | None = None
    detail: str = ""


async def ask_all(
    client: Client,
    nodes: Sequence[Node],
    has_left: Callable[[Node], bool],
    *,
    timeout: float | None,
    metadata: Mapping[str, str],
) -> list[Answer]:
    """What each node says, all asked at once; each has ``timeout`` seconds.

    ``has_left`` tells whether a node was registered, and is no more.
    """
    turns = asyncio.Semaphore(_AT_ONCE)

    async def ask(node: Node) -> Answer:
        async with turns:
            began = time.monotonic()
            protocol = node.metadata.get("protocol", _PROTOCOL)
            if protocol != _PROTOCOL:
                return _answer(node, began, "foreign", protocol)
            try:
                reply = await client.call(
                    node.service,
                    "Debug.Health",
                    {},
                    timeout=timeout,
                    metadata=metadata,
                    selector=_only(node),
                )
            except EndpointNotFound:  # as most nodes of Go Micro 4 and later say
                return _answer(node, began, None, _NO_ENDPOINT)
            except MicroError as exc:
                problem = "gone" if has_left(node) and not exc.remote else _problem(exc)
                return _answer(node, began, problem, str(exc))
            return _answer(node, began, *_read(reply))

    async with asyncio.TaskGroup() as asking:
        answers = [asking.create_task(ask(node)) for node in nodes]
    return [answer.result() for answer in answers]


def _only(node: Node) -> Selector:
    """Takes this node alone, so that the client goes to it by the best transport of both."""
    return Selector(filters=(lambda one: one.id == node.id,))


def _read(reply: Any) -> tuple[str | None, str]:
    status = reply.get("status") if isinstance(reply, Mapping) else None
    return (None, "") if status == "ok" else ("unhealthy", f"status {status!r:.80}")


def _answer(node: Node, began: float, problem: str | None, detail: str) -> Answer:
    return Answer(
        id=node.id,
        address=node.address,
        version=node.version,
        reachable=problem in (None, "unhealthy"),
        healthy=problem is None,
        seconds=time.monotonic() - began,
        problem=problem,
        detail=detail,
    )


def _problem(error: MicroError) -> str:
    """Why a node did not say that it is healthy."""
    if error.remote:
        return "unhealthy"
    cause = error.__cause__
    for kind, problem in _CAUSES.items():
        if isinstance(cause, kind):
            return problem
    if isinstance(error, DeadlineExceeded):
        return "silent"
    if isinstance(error, DecodeError):  # it was an answer, of a handler of that name
        return "unhealthy"
    lost = isinstance(error, Unavailable) and error.sent is not False
    return "lost" if lost else "handshake"  # it was reached, but they do not agree


# -- what is printed ------------------------------------------------------------------------------


def as_json(service: str, answers: Sequence[Answer]) -> dict[str, Any]:
    """What ``micro health --json`` prints."""
    return {
        "service": service,
        "healthy": all(answer.healthy for answer in answers),
        "nodes": msgspec.to_builtins(answers),
    }


def show(answers: Sequence[Answer]) -> None:
    """Print a line a node, and how many are healthy."""
    rows = [
        [
            answer.id,
            answer.address,
            answer.version,
            "yes" if answer.reachable else "NO",
            time_text(answer.seconds),
            _why(answer),
        ]
        for answer in answers
    ]
    title = ("NODE", "ADDRESS", "VERSION", "REACHABLE", "TIME", "WHY NOT")
    _output.show_table(rows, title=title)
    healthy = sum(answer.healthy for answer in answers)
    click.echo(f"\n{healthy} of {len(answers)} healthy")


def _why(answer: Answer) -> str:
    if answer.problem is None:
        return answer.detail
    return PROBLEMS[answer.problem].format(seconds=answer.seconds, detail=answer.detail)
