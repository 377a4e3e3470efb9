"""The tree of errors, and what each error tells."""

from __future__ import annotations

import asyncio
import re

import pytest

import micro
from micro import errors
from micro.errors import BY_NAME, Code, MicroError

#: https://github.com/grpc/grpc/blob/master/doc/statuscodes.md, without OK.
GRPC = [
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
]
LOCAL = {"ConfigError", "Closed", "Gap"}
GROUP = "(never sent to a peer)"
_BRANCH = re.compile(r"    ((?:[│ ]   )*)[├└]── (\w+|\(.*\))")


def drawn() -> dict[str, str]:
    """Each class of the drawing in the docstring, with what it hangs from."""
    parents: dict[str, str] = {}
    path = ["MicroError"]
    for line in (errors.__doc__ or "").splitlines():
        if branch := _BRANCH.match(line):
            depth = len(branch[1]) // 4 + 1
            path = [*path[:depth], branch[2]]
            parents[branch[2]] = path[depth - 1]
    return parents


def classes() -> dict[str, type[MicroError]]:
    found = {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, MicroError)
    }
    del found["MicroError"]
    return found


every_class = pytest.mark.parametrize("cls", classes().values(), ids=classes())


def test_tree_of_the_docstring_is_the_tree_of_classes() -> None:
    tree = drawn()
    assert tree.pop(GROUP) == "MicroError"
    shown = {name: "MicroError" if parent == GROUP else parent for name, parent in tree.items()}
    assert shown == {name: cls.__base__.__name__ for name, cls in classes().items() if cls.__base__}


def test_classes_that_are_never_sent_are_drawn_so() -> None:
    assert {name for name, parent in drawn().items() if parent == GROUP} == LOCAL


def test_classes_that_travel_are_all_the_others() -> None:
    assert {name: cls for name, cls in classes().items() if name not in LOCAL} == BY_NAME


def test_codes_are_those_of_grpc() -> None:
    assert {code.name: code.value for code in Code} == {
        name: number for number, name in enumerate(GRPC, 1)
    }


@pytest.mark.parametrize("code", Code, ids=lambda code: code.name)
def test_each_code_has_one_class_right_below_the_base(code: Code) -> None:
    named = "".join(word.capitalize() for word in code.name.split("_"))
    (cls,) = [cls for cls in MicroError.__subclasses__() if cls.__name__ == named]
    assert cls.code is code


@every_class
def test_class_below_another_has_its_code(cls: type[MicroError]) -> None:
    assert cls.__base__ is not None
    if cls.__base__ is not MicroError:
        assert issubclass(cls.__base__, MicroError)
        assert cls.code is cls.__base__.code


@pytest.mark.parametrize("name", sorted(LOCAL))
def test_errors_of_this_process_have_the_code_internal(name: str) -> None:
    assert classes()[name].code is Code.INTERNAL


@every_class
def test_class_says_in_its_docstring_what_happened(cls: type[MicroError]) -> None:
    assert cls.__doc__
    assert cls.__doc__ != MicroError.__doc__


@every_class
def test_class_is_a_public_name(cls: type[MicroError]) -> None:
    assert getattr(micro, cls.__name__) is cls


@pytest.mark.parametrize(
    ("cls", "status"),
    [
        (micro.InvalidArgument, 400),
        (micro.Unauthenticated, 401),
        (micro.PermissionDenied, 403),
        (micro.NotFound, 404),
        (micro.DeadlineExceeded, 408),
        (micro.AlreadyExists, 409),
        (micro.Internal, 500),
    ],
)
def test_status_is_the_number_that_go_micro_uses(cls: type[MicroError], status: int) -> None:
    assert cls.status == status


@every_class
def test_status_is_an_http_error(cls: type[MicroError]) -> None:
    assert 400 <= cls.status < 600


def test_error_of_this_process_has_no_id_and_is_not_remote() -> None:
    error = micro.NotFound("gone")
    assert (error.detail, error.id, error.remote) == ("gone", "", False)


def test_whether_the_call_was_sent_is_unknown_by_default() -> None:
    assert micro.Unavailable("away").sent is None
    assert micro.Unavailable("away", sent=False).sent is False


def test_text_is_the_detail() -> None:
    assert str(micro.NotFound("gone")) == "gone"
    assert str(micro.NotFound()) == ""


def test_text_begins_with_the_id_of_who_raised_it() -> None:
    assert str(micro.NotFound("gone", id="users")) == "users: gone"


def test_cancelled_by_a_peer_is_no_cancellation_of_ours() -> None:
    assert not issubclass(micro.Cancelled, asyncio.CancelledError)
    assert not issubclass(asyncio.CancelledError, MicroError)


def test_micro_error_is_caught_with_other_exceptions_and_not_with_exits() -> None:
    assert issubclass(MicroError, Exception)
    assert not issubclass(MicroError, OSError)
