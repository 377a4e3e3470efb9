"""Calls, their context and metadata, and errors on the wire."""

from __future__ import annotations

import asyncio
import contextvars
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import micro
from micro.call import (
    METADATA_VALUE,
    Body,
    Call,
    Handler,
    Middleware,
    Reply,
    checked_metadata,
    compose,
    context,
    current,
    decode_error,
    encode_error,
    enter,
    reserved,
)
from micro.codec import codec_for
from micro.errors import BY_NAME, MicroError
from micro.transport import Limits

VECTORS = Path(__file__).parent / "vectors"
CALL = Call(service="users", endpoint="Users.Get", id="7", peer="10.0.0.1:5", deadline=9.0)

every_class = pytest.mark.parametrize("cls", BY_NAME.values(), ids=BY_NAME)


# -- middleware --------------------------------------------------------------------------------


def noted(name: str, log: list[str]) -> Middleware:
    def wrap(handler: Handler) -> Handler:
        async def run(call: Call, body: Body) -> Reply:
            log.append(f"{name} in")
            reply = await handler(call, body)
            log.append(f"{name} out")
            return reply

        return run

    return wrap


async def echo(call: Call, body: Body) -> Reply:
    return Reply(body=body)


@pytest.mark.asyncio
async def test_first_middleware_is_outermost() -> None:
    log: list[str] = []
    handler = compose([noted("first", log), noted("second", log)], echo)
    assert await handler(CALL, b"x") == Reply(body=b"x")
    assert log == ["first in", "second in", "second out", "first out"]


def test_handler_without_middleware_is_itself() -> None:
    assert compose((), echo) is echo


@pytest.mark.asyncio
async def test_middleware_is_composed_once_and_not_for_each_call() -> None:
    made: list[Handler] = []

    def wrap(handler: Handler) -> Handler:
        made.append(handler)
        return handler

    handler = compose(iter([wrap]), echo)
    for _ in range(3):
        await handler(CALL, b"")
    assert made == [echo]


# -- the context -------------------------------------------------------------------------------


def test_context_outside_of_a_handler_is_a_lookup_error_that_says_so() -> None:
    with pytest.raises(LookupError, match="inside a handler"):
        contextvars.Context().run(context)


def test_current_outside_of_a_handler_is_none() -> None:
    assert contextvars.Context().run(current) is None


def test_context_is_the_call_that_was_entered() -> None:
    def handle() -> None:
        enter(CALL)
        assert current() is CALL
        entered = context()
        assert (entered.id, entered.peer, entered.deadline) == ("7", "10.0.0.1:5", 9.0)
        assert (entered.service, entered.endpoint) == ("users", "Users.Get")
        assert entered.metadata == {}

    contextvars.Context().run(handle)


def test_reply_metadata_of_two_calls_is_apart() -> None:
    def handle() -> None:
        enter(msgspec.structs.replace(CALL, reply_metadata=None))
        context().reply_metadata["a"] = "b"
        assert context().reply_metadata == {"a": "b"}
        enter(msgspec.structs.replace(CALL, reply_metadata=None))
        assert context().reply_metadata == {}

    contextvars.Context().run(handle)


def test_context_is_frozen() -> None:
    def handle() -> micro.Context:
        enter(CALL)
        return context()

    entered = contextvars.Context().run(handle)
    with pytest.raises(AttributeError):
        entered.id = "8"  # type: ignore[misc]


@pytest.mark.asyncio
async def test_context_of_one_task_is_not_seen_by_another() -> None:
    both = asyncio.Barrier(2)

    async def handle(id: str) -> str:
        enter(Call(service="x", endpoint="X.Y", id=id))
        await both.wait()
        return context().id

    assert list(await asyncio.gather(handle("a"), handle("b"))) == ["a", "b"]
    assert current() is None


# -- metadata ----------------------------------------------------------------------------------

RESERVED = [
    "accept",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "host",
    "keep-alive",
    "origin",
    "te",
    "timeout",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "micro-id",
    "micro-error",
    "micro-service",
    "x-micro-error",
    "proxy-authorization",
    "sec-fetch-site",
]


def test_metadata_names_become_lower_case() -> None:
    assert checked_metadata({"Tenant-Id": "A"}) == {"tenant-id": "A"}


def test_metadata_is_copied() -> None:
    metadata = {"tenant": "a"}
    assert checked_metadata(metadata) is not metadata


@pytest.mark.parametrize("name", ["tenant", "traceparent", "a.b_c-d", "0", "x" * 256])
def test_metadata_name_of_letters_digits_and_signs_is_taken(name: str) -> None:
    assert checked_metadata({name: ""}) == {name: ""}


@pytest.mark.parametrize(
    "name", ["", "a b", "a:b", "é", "a\r\nb", "a\n", "a\0", "x" * 257, "a/b", '"', "(", "😀"]
)
def test_metadata_name_that_cannot_travel_is_refused(name: str) -> None:
    with pytest.raises(micro.InvalidArgument, match="letters, digits"):
        checked_metadata({name: "x"})


@pytest.mark.parametrize("name", RESERVED)
def test_metadata_name_of_the_protocol_is_refused(name: str) -> None:
    assert reserved(name)
    for spelt in (name, name.upper()):
        with pytest.raises(micro.InvalidArgument, match=f"'{spelt}' is reserved"):
            checked_metadata({spelt: "x"})


@pytest.mark.parametrize("name", ["micro", "authorization", "cookie", "times", "security"])
def test_metadata_name_like_one_of_the_protocol_is_taken(name: str) -> None:
    assert not reserved(name)
    assert checked_metadata({name: "x"})


@pytest.mark.parametrize(
    "value", ["a\rb", "a\nb", "a\r\nX: y", "\0", "a\0b", " a", "a ", "\ta", "a\t", " ", "\n"]
)
def test_metadata_value_with_line_ends_nul_or_blanks_at_its_ends_is_refused(value: str) -> None:
    with pytest.raises(micro.InvalidArgument, match=r"'tenant'.*CR, LF or NUL"):
        checked_metadata({"tenant": value})


@pytest.mark.parametrize("value", ["\x01", "a\x0bb", "a\x1bb", "a\x7fb", "\ud800", "a\udfffb"])
def test_metadata_value_that_no_header_can_hold_is_refused(value: str) -> None:
    """Control characters are refused by every HTTP parser, and a lone surrogate is not UTF-8."""
    with pytest.raises(micro.InvalidArgument, match="'tenant'"):
        checked_metadata({"tenant": value})


@pytest.mark.parametrize("value", ["", "a b", "a\tb", "é", "日本", "a" * METADATA_VALUE])
def test_metadata_value_of_other_characters_is_taken_as_it_is(value: str) -> None:
    assert checked_metadata({"a": value}) == {"a": value}


@pytest.mark.parametrize("value", ["a" * (8 * 1024 + 1), "é" * (4 * 1024 + 1)], ids=["a", "é"])
def test_metadata_value_over_8_kib_of_utf8_is_refused(value: str) -> None:
    with pytest.raises(micro.TooLarge, match="'a' is over 8192 bytes"):
        checked_metadata({"a": value})


@given(st.dictionaries(st.text(), st.text(st.characters(codec=None))))
def test_metadata_is_what_a_header_can_hold_or_a_micro_error(metadata: dict[str, str]) -> None:
    try:
        checked = checked_metadata(metadata)
    except (micro.InvalidArgument, micro.TooLarge):
        return
    for name, value in checked.items():
        assert re.fullmatch(r"[!-~]+", name)
        assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f]", value)
        assert value.encode().decode() == value


# -- errors on the wire ------------------------------------------------------------------------


@every_class
@given(st.text(min_size=1, max_size=200))
def test_error_that_travels_arrives_as_itself(cls: type[MicroError], detail: str) -> None:
    got = decode_error(encode_error(cls(detail), id="users"))
    assert type(got) is cls
    assert (got.detail, got.id, got.remote) == (detail, "users", True)


@every_class
@given(st.text(st.characters(codec=None)), st.text(st.characters(codec=None)))
def test_error_on_the_wire_fits_a_header(cls: type[MicroError], detail: str, id: str) -> None:
    text = encode_error(cls(detail, id=id), id="users")
    assert re.fullmatch(r"[ -~]+", text)
    assert text == text.strip()


@pytest.mark.parametrize("character", ["a", "\n", "é", "日", "😀", '"'])
def test_longest_error_on_the_wire_fits_the_headers_that_a_peer_takes(character: str) -> None:
    """It is sent under two names, since old and new versions of Go Micro read different ones."""
    text = encode_error(micro.NotFound(character * 1_000_000), id="users")
    assert 2 * len(text) < Limits().headers


@pytest.mark.parametrize("character", ["a", "日", "😀"])
def test_long_detail_is_cut_and_arrives_as_its_class(character: str) -> None:
    got = decode_error(encode_error(micro.NotFound(character * 1_000_000), id="users"))
    assert type(got) is micro.NotFound
    assert set(got.detail) == {character}


def test_detail_with_a_lone_surrogate_arrives_as_its_class() -> None:
    """As in the name of a file that is not UTF-8."""
    got = decode_error(encode_error(micro.NotFound("no file \udcff"), id="users"))
    assert type(got) is micro.NotFound
    assert got.detail.startswith("no file ")


def test_error_on_the_wire_has_go_micros_form_and_our_kind() -> None:
    assert json.loads(encode_error(micro.InvalidArgument("bad"), id="users")) == {
        "id": "users",
        "code": 400,
        "detail": "bad",
        "status": "Bad Request",
        "kind": "InvalidArgument",
    }


def test_error_that_a_peer_sent_keeps_its_id_when_it_is_sent_on() -> None:
    error = decode_error(encode_error(micro.NotFound("gone"), id="users"))
    assert decode_error(encode_error(error, id="web")).id == "users"


@pytest.mark.parametrize(
    "details", [{"field": "name", "most": 3}, {"nested": [1, {"a": None}], "text": "ü\n"}]
)
def test_details_of_an_error_arrive(details: dict[str, object]) -> None:
    error = micro.InvalidArgument("bad", details=details)
    assert decode_error(encode_error(error, id="users")).details == details


@pytest.mark.parametrize(
    "details", [{"at": object()}, {"text": "x" * 5000}, {"n": {1: {2}}, "s": ()}]
)
def test_details_that_cannot_travel_are_left_out_and_the_error_arrives(
    details: dict[str, object],
) -> None:
    got = decode_error(encode_error(micro.NotFound("gone", details=details), id="users"))
    assert type(got) is micro.NotFound
    assert got.detail == "gone"
    assert "at" not in got.details
    assert len(str(got.details)) < 5000


def test_what_was_not_executed_is_told_so() -> None:
    error = micro.ResourceExhausted("busy", sent=False, retry_after=0.25)
    got = decode_error(encode_error(error, id="users"))
    assert got.sent is False
    assert got.retry_after == 0.25


def test_what_may_have_been_executed_is_not_told_otherwise() -> None:
    got = decode_error(encode_error(micro.Unavailable("gone"), id="users"))
    assert got.sent is None
    assert got.retry_after is None


@pytest.mark.parametrize("seconds", ["-1", "0", '"soon"', "null", "true2", "[1]", "-1e400"])
def test_odd_retry_after_is_none(seconds: str) -> None:
    text = f'{{"code":503,"detail":"d","kind":"Unavailable","retry_after":{seconds}}}'
    assert decode_error(text).retry_after is None


def test_peer_cannot_ask_for_a_longer_wait_than_five_minutes() -> None:
    assert decode_error('{"code":503,"detail":"d","retry_after":1e9}').retry_after == 300


@pytest.mark.parametrize("details", ["[1]", '"x"', "7", "null"])
def test_details_of_another_form_do_not_hide_the_error(details: str) -> None:
    got = decode_error(f'{{"code":404,"detail":"gone","details":{details}}}')
    assert type(got) is micro.NotFound
    assert not got.details


@every_class
def test_error_without_a_detail_arrives_with_the_phrase_of_its_status(
    cls: type[MicroError],
) -> None:
    got = decode_error(encode_error(cls(), id="users"))
    assert type(got) is cls
    assert got.detail == json.loads(encode_error(cls(), id="users"))["status"]


class Teapot(MicroError):
    """A class of a program, with a status of its own."""

    status = 418


@pytest.mark.parametrize("name", ["DataLoss", "Aborted", "OutOfRange", "Unknown", "NotFound"])
def test_subclass_of_a_program_arrives_as_the_class_that_it_extends(name: str) -> None:
    own: Any = type("Own", (BY_NAME[name],), {})
    assert type(decode_error(encode_error(own("no"), id="shop"))) is BY_NAME[name]


def test_error_with_a_status_of_its_own_can_be_sent() -> None:
    got = decode_error(encode_error(Teapot("short and stout"), id="kitchen"))
    assert got.detail == "short and stout"


def test_unknown_kind_falls_back_to_the_code() -> None:
    got = decode_error('{"code":404,"detail":"gone","kind":"NotOfThisVersion"}')
    assert type(got) is micro.NotFound


@pytest.mark.parametrize("kind", ["ConfigError", "Closed", "Gap", "MicroError", "SystemExit", ""])
def test_kind_that_never_travels_is_not_made_by_a_peer(kind: str) -> None:
    got = decode_error(json.dumps({"code": 503, "detail": "x", "kind": kind}))
    assert type(got) is micro.Unavailable


@pytest.mark.parametrize("code", [0, -1, 200, 418, 599, 2**31, 2**63 - 1])
def test_unknown_code_is_unknown(code: int) -> None:
    got = decode_error(json.dumps({"id": "x", "code": code, "detail": "what"}))
    assert type(got) is micro.Unknown
    assert got.detail == "what"


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (400, micro.InvalidArgument),
        (401, micro.Unauthenticated),
        (403, micro.PermissionDenied),
        (404, micro.NotFound),
        (408, micro.DeadlineExceeded),
        (409, micro.AlreadyExists),
        (429, micro.ResourceExhausted),
        (500, micro.Internal),
        (501, micro.Unimplemented),
        (503, micro.Unavailable),
    ],
)
def test_code_of_go_micro_is_our_class(code: int, cls: type[MicroError]) -> None:
    got = decode_error(f'{{"id":"go","code":{code},"detail":"d","status":"S"}}')
    assert type(got) is cls
    assert (got.id, got.detail, got.remote) == ("go", "d", True)


_NO_METHOD = "rpc: can't find method Nope"
_BOB = "name Bob is not allowed"


@pytest.mark.parametrize(
    ("name", "cls", "id", "detail"),
    [
        ("unary-error", micro.InvalidArgument, "helloworld", _BOB),
        ("unary-error-plain", micro.Unknown, "", "plain failure of Bob"),
        ("unary-no-method", micro.EndpointNotFound, "", _NO_METHOD),
        ("unary-no-service", micro.EndpointNotFound, "", "rpc: can't find service Other"),
        ("raw-bad-json", micro.Unknown, "", "unexpected EOF"),
        ("raw-legacy-jsonrpc-error", micro.InvalidArgument, "helloworld", _BOB),
        ("raw-legacy-protorpc-error", micro.EndpointNotFound, "", _NO_METHOD),
    ],
)
def test_error_captured_from_go_is_our_class(
    name: str, cls: type[MicroError], id: str, detail: str
) -> None:
    captured = (VECTORS / f"{name}.rsp.http").read_text(encoding="latin-1")
    (header,) = re.findall(r"^Micro-Error: ([^\r\n]+)", captured, re.MULTILINE)
    got = decode_error(header)
    assert type(got) is cls
    assert (got.id, got.detail, got.remote) == (id, detail, True)


def test_every_captured_error_is_tested() -> None:
    replies = [p for p in VECTORS.glob("*.rsp.http") if not p.name.startswith("stream-")]
    captured = {p.name for p in replies if b"\nMicro-Error: " in p.read_bytes()}
    assert len(captured) == 7


def test_ill_formed_request_of_go_is_an_invalid_argument() -> None:
    got = decode_error("rpc: service/endpoint request ill-formed: Nope")
    assert type(got) is micro.InvalidArgument


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
_fields = st.dictionaries(st.sampled_from(["id", "code", "detail", "status", "kind"]), _json)


@given(st.text(st.characters(codec=None)) | (_json | _fields).map(json.dumps))
def test_hostile_text_is_a_remote_micro_error(text: str) -> None:
    got = decode_error(text)
    assert isinstance(got, MicroError)
    assert got.remote


@pytest.mark.parametrize(
    "text",
    [
        "x" * 10_000_000,
        "[" * 100_000,
        '{"detail":' + "[" * 100_000,
        '{"id":' * 100_000,
        '{"detail":"' + "x" * 10_000_000 + '"}',
        '{"code":' + "9" * 100_000 + "}",
        '{"code":1e999}',
        '{"detail":"\\ud800"}',
        '{"detail":null}',
        "null",
        "",
        "\0",
        "\ud800",
    ],
    ids=lambda text: repr(text[:24]),
)
def test_huge_or_deep_or_malformed_text_is_a_micro_error_of_bounded_size(text: str) -> None:
    got = decode_error(text)
    assert type(got) is micro.Unknown
    assert len(str(got)) < 10_000


@pytest.mark.parametrize(
    "text",
    [
        "rpc: can't find method " + "x" * 1_000_000,
        json.dumps({"id": "x" * 1_000_000, "detail": "d"}),
        json.dumps({"status": "x" * 1_000_000}),
    ],
    ids=["Go's", "id", "status"],
)
def test_every_part_of_an_error_from_a_peer_is_bounded(text: str) -> None:
    assert len(str(decode_error(text))) < 10_000


# -- values ------------------------------------------------------------------------------------


def test_call_is_json_by_default() -> None:
    assert (
        codec_for(Call(service="x", endpoint="X.Y").content_type).content_type == "application/json"
    )


def test_calls_do_not_share_their_metadata() -> None:
    one, other = (Call(service="x", endpoint="X.Y") for _ in range(2))
    one.metadata["a"] = "b"
    assert other.metadata == {}
