"""What a reader makes of answers and of what is told, which it hears in two queues."""

from __future__ import annotations

import msgspec
import pytest

from micro.registry import Node
from micro_plugin_nats._view import View

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")
MOVED = msgspec.structs.replace(NODE, address="127.0.0.1:9302")


@pytest.fixture
def view() -> View:
    async def ask(service: str | None) -> None:
        raise AssertionError("nobody is silent for long")

    return View(None, ask)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer is on its way for long."""
    monkeypatch.setattr("micro_plugin_nats._view._OLDER", 0.0)


def test_answer_that_is_older_than_a_goodbye_brings_no_node_back(view: View) -> None:
    view.take(NODE, 60, told=True)
    view.forget(NODE)
    assert view.take(NODE, 60)
    assert view.nodes() == ()


def test_node_that_tells_of_itself_after_a_goodbye_is_back(view: View) -> None:
    view.forget(NODE)
    view.take(NODE, 60, told=True)
    view.take(NODE, 60)
    assert view.nodes() == (NODE,)


@pytest.mark.usefixtures("later")
def test_node_that_answers_long_after_a_goodbye_is_back(view: View) -> None:
    view.forget(NODE)
    view.take(NODE, 60)
    assert view.nodes() == (NODE,)


def test_answer_that_is_older_than_a_change_does_not_undo_it(view: View) -> None:
    view.take(NODE, 60)
    view.take(MOVED, 60, told=True)
    view.take(NODE, 60)
    assert view.nodes() == (MOVED,)


@pytest.mark.usefixtures("later")
def test_answer_long_after_a_change_counts(view: View) -> None:
    view.take(NODE, 60, told=True)
    view.take(MOVED, 60)
    assert view.nodes() == (MOVED,)


def test_goodbyes_are_remembered_no_longer_than_answers_may_be_on_their_way(
    view: View, later: None
) -> None:
    for number in range(100):
        view.forget(msgspec.structs.replace(NODE, id=f"greeter-{number}"))
    assert len(view._gone) == 1
