from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest

from micro.errors import ConfigError
from micro.logs import configure

micro_log = logging.getLogger("micro")
LINE = re.compile(r"\d\d:\d\d:\d\d\.\d{3} (\w+) +(\S+)  (.*)\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def level() -> Iterator[None]:
    before = micro_log.level
    yield
    micro_log.setLevel(before)


@contextmanager
def program(*handlers: logging.Handler) -> Iterator[list[logging.Handler]]:
    """A program that has set up these handlers, whatever pytest did."""
    with patch.object(logging.getLogger(), "handlers", list(handlers)) as root_handlers:
        yield root_handlers


def logged(stream: io.StringIO, message: str, *args: object, level: str = "info") -> str:
    with program():
        configure(level, source="--log_level", stream=stream)
        logging.getLogger("micro.test").info(message, *args)
    return stream.getvalue()


def test_an_event_is_one_line_with_time_level_logger_and_text() -> None:
    line = LINE.fullmatch(logged(io.StringIO(), "serving at %s", "127.0.0.1:1"))
    assert line
    assert line.groups() == ("INFO", "micro.test", "serving at 127.0.0.1:1")


@pytest.mark.parametrize("break_", ["\n", "\r", "\r\n"])
def test_a_line_break_in_a_message_cannot_forge_a_line(break_: str) -> None:
    text = logged(io.StringIO(), "name %s", f"x{break_}12:00:00.000 INFO    micro.auth  granted")
    assert text.splitlines() == [text.removesuffix("\n")]
    assert "granted" in text


def test_a_terminal_gets_colour() -> None:
    assert "\x1b[32mINFO" in logged(Terminal(), "hello")


def test_what_is_no_terminal_gets_no_colour() -> None:
    assert "\x1b" not in logged(io.StringIO(), "hello")


def test_the_level_leaves_out_what_is_below_it() -> None:
    assert not logged(io.StringIO(), "hello", level="warning")


@pytest.mark.parametrize("level", ["debug", "info", "WARNING", "Error"])
def test_levels_are_read_in_any_case(level: str) -> None:
    configure(level, source="--log_level")
    assert logging.getLevelName(micro_log.level) == level.upper()


def test_an_unknown_level_is_a_config_error_that_names_its_source() -> None:
    with pytest.raises(ConfigError) as caught:
        configure("loud", source="MICRO_LOG_LEVEL")
    assert str(caught.value) == (
        "MICRO_LOG_LEVEL: log level 'loud': write one of debug, info, warning, error"
    )


def test_an_error_is_followed_by_its_traceback() -> None:
    stream = io.StringIO()
    with program():
        configure("info", source="--log_level", stream=stream)
        try:
            int("out of order")
        except ValueError:
            micro_log.exception("failed")
    text = stream.getvalue()
    assert "ERROR   micro  failed\n" in text
    assert "Traceback (most recent call last):\n" in text
    assert "ValueError: invalid literal for int() with base 10: 'out of order'\n" in text


def test_a_programs_own_set_up_is_left_alone() -> None:
    own, stream = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(own)
    with program(handler) as handlers:
        configure("info", source="--log_level", stream=stream)
        micro_log.info("hello")
        assert handlers == [handler]
    assert (own.getvalue(), stream.getvalue()) == ("hello\n", "")
