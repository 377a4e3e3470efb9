from __future__ import annotations

import base64
import io
import json
import logging
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

import micro
from micro.cli import _output, describe, main, services
from micro.cli._output import Exit, exit_of
from micro.errors import BY_NAME
from micro.logs import printable

from .test_installed import Site

MICRO = str(Path(sys.executable).with_name("micro"))
#: Seconds that any one step may take.
PATIENCE = 30
SERVICE = '''
import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
import micro

@dataclass
class Address:
    city: str

@dataclass
class Request:
    name: str
    addresses: list[Address] = field(default_factory=list)

@dataclass
class Response:
    message: str

class Helloworld:
    async def call(self, request: Request) -> Response:
        """Greet a person."""
        return Response(message=f"Hello {request.name}")

    async def count(self, start: int = 7) -> list[int]:
        return list(range(start, start + 40))

    async def wait(self, word: str = "") -> None:
        print("waiting", word, flush=True)
        await asyncio.Event().wait()

    async def refuse(self) -> None:
        detail = "first\\nsecond \\x1b[31mred"
        raise micro.Aborted(detail, details={"winner": "other"}, retry_after=2)

    async def lack(self) -> None:
        raise micro.NotFound("no such row")

class Other:
    async def context(self) -> dict[str, str]:
        return dict(micro.context().metadata)

    async def reverse(self, data: bytes) -> bytes:
        return data[::-1]

    async def flip(self, values: list[int]) -> dict[str, list[int]]:
        return {"values": values[::-1]}

class Streams:
    async def count(self, to: int, start: int = 0) -> AsyncIterator[int]:
        """Count."""
        for number in range(start, to):
            yield number

    async def add(self, numbers: AsyncIterator[int]) -> int:
        return sum([number async for number in numbers])

    async def greet(self, said: AsyncIterator[Request]) -> AsyncIterator[Response]:
        async for request in said:
            yield Response(message=f"Hello {request.name}")
        yield Response(message="Bye")

    async def reverse(self, said: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for data in said:
            yield data[::-1]

    async def context(self) -> AsyncIterator[dict[str, str]]:
        yield dict(micro.context().metadata)

    async def fail(self) -> AsyncIterator[int]:
        yield 1
        raise micro.Aborted("enough")

    async def stop(self, said: AsyncIterator[Request]) -> AsyncIterator[int]:
        yield 1

    async def stay(self, word: str = "") -> AsyncIterator[str]:
        try:
            yield word
            await asyncio.Event().wait()
        finally:
            print("left", word, flush=True)

service = micro.Service("helloworld")
for handler in (Helloworld(), Other(), Streams()):
    service.handle(handler)
service.run()
'''


class Done(NamedTuple):
    status: int
    out: str
    err: str


def run(*args: str, given: str = "", command: tuple[str, ...] = (MICRO,)) -> Done:
    """The real command, in a process of its own."""
    done = subprocess.run(
        [*command, *args],
        input=given,
        text=True,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    watchdog = threading.Timer(PATIENCE, process.kill)
    watchdog.start()
    try:
        read = []
        for line in process.stdout:
            read.append(line)
            if text in line:
                return
    finally:
        watchdog.cancel()
    pytest.fail(f"no line with {text!r} came: {read}")


@pytest.fixture(scope="module")
def registry() -> str:
    """A namespace that holds nothing but the services of these tests, on a machine that is busy."""
    return f"mdns:///cli-{uuid.uuid4().hex[:12]}?timeout=1500ms"


@pytest.fixture(scope="module")
def helloworld(
    registry: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[subprocess.Popen[str]]:
    """The service ``helloworld``, in a process of its own."""
    script = tmp_path_factory.mktemp("service") / "helloworld.py"
    script.write_text(SERVICE)
    with started(script, "--registry", registry, "--server_version", "1.5") as process:
        yield process
        process.kill()


def started(script: Path, *flags: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, str(script), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_line(process, "serving at")
    return process


def talking(*words: str) -> subprocess.Popen[str]:
    """A command whose standard input stays open."""
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, registry: str) -> Iterator[None]:
    monkeypatch.setenv("MICRO_REGISTRY", registry)
    monkeypatch.delenv("NO_COLOR", raising=False)
    level = logging.getLogger("micro").level
    yield
    logging.getLogger("micro").setLevel(level)


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment names a registry that nothing is registered with."""
    url = f"mdns:///cli-{uuid.uuid4().hex[:12]}?timeout=200ms"
    monkeypatch.setenv("MICRO_REGISTRY", url)
    return url


served = pytest.mark.usefixtures("helloworld")


# -- call --------------------------------------------------------------------------------------


@served
def test_call_prints_the_reply_as_one_line() -> None:
    done = run("call", "helloworld", "Helloworld.Call", '{"name":"Alice"}')
    assert done == (0, '{"message": "Hello Alice"}\n', "")


@served
def test_python_m_micro_is_the_same_command() -> None:
    words = ("call", "helloworld", "Helloworld.Call", '{"name":"Alice"}')
    done = run(*words, command=(sys.executable, "-m", "micro"))
    assert done == (0, '{"message": "Hello Alice"}\n', "")


@served
def test_call_reads_the_request_from_standard_input() -> None:
    done = run("call", "helloworld", "Helloworld.Call", "-", given='{"name": "Bob"}\n')
    assert done == (0, '{"message": "Hello Bob"}\n', "")


@served
def test_call_reads_the_request_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "request.json"
    file.write_text('{\n  "name": "Carol"\n}\n')
    done = run("call", "helloworld", "Helloworld.Call", f"@{file}")
    assert done == (0, '{"message": "Hello Carol"}\n', "")


@served
def test_the_request_is_an_empty_object_when_left_out() -> None:
    done = run("call", "helloworld", "Helloworld.Count")
    assert json.loads(done.out)[0] == 7


@served
def test_text_of_any_language_arrives_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # what machines read is UTF-8 all the same
    done = subprocess.run(
        [MICRO, "call", "helloworld", "Helloworld.Call", '{"name": "Łucja 🙂"}'],
        capture_output=True,
        timeout=PATIENCE,
        check=True,
    )
    assert done.stdout.decode() == '{"message": "Hello Łucja 🙂"}\n'


@served
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["--registry", "{}"], []),
        ([], ["--registry={}"]),
        (["--registry", "memory"], ["--registry", "{}"]),
        (["--log-level", "info", "--client_request_timeout", "9s"], ["--registry", "{}"]),
        (["--registry", "{}"], ["--client-request-timeout", "9", "--transport", "http"]),
    ],
)
def test_options_stand_before_or_after_the_command(
    monkeypatch: pytest.MonkeyPatch, registry: str, before: list[str], after: list[str]
) -> None:
    monkeypatch.setenv("MICRO_REGISTRY", "memory")
    words = [*before, "call", "helloworld", *after, "Helloworld.Call", '{"name":"Alice"}']
    done = run(*(word.replace("{}", registry) for word in words))
    assert done == (0, '{"message": "Hello Alice"}\n', "")


@served
def test_metadata_goes_with_a_call() -> None:
    words = ("-m", "Tenant=a", "--metadata", "trace=b=c", "-m", "tenant=d")
    for command in ("call", "stream"):
        endpoint = "Other.Context" if command == "call" else "Streams.Context"
        done = run(command, "helloworld", endpoint, "{}", *words)
        told = json.loads(done.out)
        assert (told["tenant"], told["trace"]) == ("d", "b=c")


@pytest.mark.parametrize("pair", ["tenant", "=a", ""])
def test_metadata_that_is_no_pair_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], pair: str
) -> None:
    assert main(["call", "helloworld", "Helloworld.Call", "-m", pair]) == Exit.USAGE
    text = f"error: UsageError: --metadata: {pair!r} is not key=value; see micro call --help\n"
    assert capsys.readouterr().err == text


@served
def test_a_timeout_is_that_of_the_call() -> None:
    done = run("call", "helloworld", "Helloworld.Wait", "--timeout", "300ms")
    assert (done.status, done.out) == (Exit.DEADLINE_EXCEEDED, "")
    assert done.err.startswith("error: DeadlineExceeded: helloworld Helloworld.Wait: no reply ")


@served
def test_a_timeout_may_be_longer_than_the_usual_one() -> None:
    began = time.monotonic()
    words = ("--client_request_timeout", "100ms", "--timeout", "2s")
    done = run("call", "helloworld", "Helloworld.Wait", *words)
    assert done.status == Exit.DEADLINE_EXCEEDED
    assert "Helloworld.Wait" in done.err
    assert time.monotonic() - began >= 2


@pytest.mark.parametrize(
    ("text", "why"), [("soon", "is not a duration; write 5s, "), ("0s", "is not more than 0")]
)
def test_a_timeout_that_is_no_time_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], text: str, why: str
) -> None:
    assert main(["call", "helloworld", "Helloworld.Call", "--timeout", text]) == Exit.USAGE
    assert capsys.readouterr().err.startswith(f"error: ConfigError: --timeout: {text!r} {why}")


@served
def test_a_call_to_an_address_asks_no_registry() -> None:
    told = json.loads(run("describe", "helloworld", "--json").out)
    words = ("--address", told["nodes"][0]["address"], "--registry", "memory")
    done = run("call", "any.name", "Helloworld.Call", '{"name":"Alice"}', *words)
    assert done == (0, '{"message": "Hello Alice"}\n', "")
    done = run("stream", "any.name", "Streams.Count", '{"to": 2}', *words)
    assert done == (0, "0\n1\n", "")


def test_a_call_to_an_address_where_nobody_listens_is_unavailable() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        done = run("call", "helloworld", "Helloworld.Call", "--address", address)
    assert (done.status, done.out) == (Exit.UNAVAILABLE, "")
    assert address in done.err


def test_what_is_no_address_is_a_usage_error() -> None:
    done = run("call", "helloworld", "Helloworld.Call", "--address", "nowhere")
    assert (done.status, done.out) == (Exit.USAGE, "")
    assert "'nowhere': write host:port" in done.err


@served
@pytest.mark.parametrize("name", ["msgpack", "application/msgpack", "json", "application/json"])
def test_a_request_travels_as_its_content_type_says(name: str) -> None:
    words = ("call", "helloworld", "Other.Flip", '{"values": [1, 2]}', "--content-type", name)
    assert run(*words) == (0, '{"values": [2, 1]}\n', "")


@served
def test_bytes_travel_as_they_are_and_come_out_so() -> None:
    words = [MICRO, "call", "helloworld", "Other.Reverse", "-", "--content_type", "octet-stream"]
    sent = bytes(range(256))
    done = subprocess.run(words, input=sent, capture_output=True, timeout=PATIENCE, check=True)
    assert done.stdout == sent[::-1]
    words.append("--json")
    done = subprocess.run(words, input=sent, capture_output=True, timeout=PATIENCE, check=True)
    assert base64.b64decode(json.loads(done.stdout)) == sent[::-1]


def test_protobuf_is_refused_with_what_to_write_instead(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("protobuf", "application/x-protobuf"):
        words = ["call", "helloworld", "Helloworld.Call", "--content-type", name]
        assert main(words) == Exit.USAGE
        told = capsys.readouterr().err
        assert told.startswith("error: UsageError: --content_type: no protobuf is made of JSON")
        assert "send json" in told


def test_an_unknown_content_type_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["stream", "helloworld", "Helloworld.Call", "--content-type", "xml"]
    assert main(words) == Exit.USAGE
    text = "--content_type: 'xml' is not json, msgpack or octet-stream"
    assert capsys.readouterr().err.startswith(f"error: UsageError: {text}")


@served
def test_a_service_tells_how_it_is() -> None:
    assert run("call", "helloworld", "Debug.Health") == (0, '{"status": "ok"}\n', "")
    told = json.loads(run("call", "helloworld", "Debug.Stats").out)
    assert told["started"] <= told["timestamp"]
    assert "Debug." not in run("describe", "helloworld").out


# -- stream ------------------------------------------------------------------------------------


@served
def test_stream_prints_a_line_for_each_reply() -> None:
    done = run("stream", "helloworld", "Streams.Count", '{"to": 3}')
    assert done == (0, "0\n1\n2\n", "")


@served
def test_stream_sends_each_line_of_standard_input() -> None:
    for words in ((), ("-",)):
        done = run("stream", "helloworld", "Streams.Add", *words, given="1\n\n20\n300")
        assert done == (0, "321\n", "")


@served
def test_stream_tells_the_service_that_standard_input_has_ended() -> None:
    lines = '{"name": "Alice"}\n  {"name": "Bob"}\r\n'
    done = run("stream", "helloworld", "Streams.Greet", given=lines)
    told = ["Hello Alice", "Hello Bob", "Bye"]
    assert done == (0, "".join(f'{{"message": "{text}"}}\n' for text in told), "")


@served
def test_stream_reads_lines_from_a_file_or_from_nothing(tmp_path: Path) -> None:
    file = tmp_path / "said.jsonl"
    file.write_text("".join(f"{number}\n" for number in range(50_000)))
    for path, total in ((file, 1_249_975_000), (Path(os.devnull), 0)):
        with path.open() as lines:
            out = subprocess.run(
                [MICRO, "stream", "helloworld", "Streams.Add"],
                stdin=lines,
                capture_output=True,
                timeout=PATIENCE,
                check=True,
            ).stdout
        assert out == f"{total}\n".encode()


@served
def test_stream_sends_and_shows_each_line_at_once() -> None:
    words = [MICRO, "stream", "helloworld", "Streams.Greet"]
    with talking(*words) as process:
        assert process.stdin is not None
        for name in ("Alice", "Bob"):
            process.stdin.write(f'{{"name": "{name}"}}\n')
            process.stdin.flush()
            wait_for_line(process, f"Hello {name}")
        process.stdin.close()
        wait_for_line(process, "Bye")
        assert process.wait(PATIENCE) == 0


@served
def test_stream_ends_with_the_service_although_standard_input_is_open() -> None:
    with talking(MICRO, "stream", "helloworld", "Streams.Stop") as process:
        wait_for_line(process, "1")
        assert process.wait(PATIENCE) == 0


@served
def test_stream_shows_what_came_before_an_error() -> None:
    done = run("stream", "helloworld", "Streams.Fail", "{}")
    assert done == (Exit.ERROR, "1\n", "error: Aborted: helloworld: enough\n")


@served
def test_stream_of_an_unknown_service_or_endpoint_is_not_found() -> None:
    done = run("stream", "helloworld", "Streams.Counts", '{"to": 3}')
    assert (done.status, done.out) == (Exit.NOT_FOUND, "")
    assert "did you mean Streams.Count" in done.err
    done = run("stream", "helloworl", "Streams.Count", '{"to": 3}')
    assert (done.status, done.out) == (Exit.NOT_FOUND, "")
    assert "ServiceNotFound" in done.err


@served
def test_stream_names_the_line_that_is_no_message() -> None:
    done = run("stream", "helloworld", "Streams.Add", given='1\n\n{"a":}\n3\n')
    text = "line 3 of standard input is not JSON: Expecting value at line 1, column 6"
    assert (done.status, done.out) == (Exit.USAGE, "")
    assert done.err.startswith(f"error: UsageError: {text}")


def test_stream_with_a_wrong_argument_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stream", "helloworld", "Streams.Count", "{"]) == Exit.USAGE
    assert capsys.readouterr().err.startswith("error: UsageError: the JSON argument is not JSON: ")


@served
def test_stream_ends_at_its_timeout() -> None:
    done = run("stream", "helloworld", "Streams.Stay", '{"word": "a"}', "--timeout", "1500ms")
    assert (done.status, done.out) == (Exit.DEADLINE_EXCEEDED, '"a"\n')
    assert done.err.startswith("error: DeadlineExceeded: ")


def test_stream_outlives_the_time_out_of_calls_and_ends_quietly_when_interrupted(
    helloworld: subprocess.Popen[str],
) -> None:
    words = ["--client_request_timeout", "1s", "stream", "helloworld", "Streams.Stay"]
    with talking(MICRO, *words, '{"word": "interrupted"}') as process:
        wait_for_line(process, "interrupted")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err.strip()) == (Exit.INTERRUPTED, "", "")
    wait_for_line(helloworld, "left interrupted")


@served
def test_stream_ends_quietly_when_its_reader_leaves() -> None:
    script = f"{MICRO} stream helloworld Streams.Count '{{\"to\": 100000}}' | head -n 2"
    done = run("-c", script, command=("bash", "--norc"))
    assert (done.out, done.err) == ("0\n1\n", "")


@served
def test_stream_of_bytes_is_lines_as_they_are() -> None:
    words = ("stream", "helloworld", "Streams.Reverse", "--content-type", "octet-stream")
    assert run(*words, given="abc\n\n{x\n").out == "cba\n\nx{\n"
    assert run(*words, "--json", given="abc\n").out == '"Y2Jh"\n'


# -- errors, and the status that scripts see ---------------------------------------------------


@served
def test_an_unknown_endpoint_names_those_that_exist() -> None:
    done = run("call", "helloworld", "Helloworld.Coll")
    assert (done.status, done.out) == (Exit.NOT_FOUND, "")
    assert done.err == (
        "error: EndpointNotFound: helloworld: there is no endpoint 'Helloworld.Coll'; "
        "did you mean Helloworld.Call or Helloworld.Count or Helloworld.Wait?\n"
    )


@served
@pytest.mark.parametrize(
    "words", [("call", "helloword", "Helloworld.Call"), ("describe", "hellworld")]
)
def test_an_unknown_service_names_similar_ones(words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.status == Exit.NOT_FOUND
    assert done.err.startswith(f"error: ServiceNotFound: service '{words[1]}' is not registered;")
    assert done.err.count("\n") == 1
    assert "did you mean" in done.err
    assert "helloworld" in done.err


@served
@pytest.mark.parametrize(
    ("request_", "path"),
    [
        ('{"name": 5}', "$.name"),
        ('{"name": "A", "addresses": [{"city": "B"}, {"city": 5}]}', "$.addresses[1].city"),
    ],
)
def test_a_wrong_field_is_named_by_its_path(request_: str, path: str) -> None:
    done = run("call", "helloworld", "Helloworld.Call", request_)
    assert done.status == Exit.ERROR
    assert done.err.startswith("error: DecodeError: helloworld: ")
    assert f"Expected `str`, got `int` - at `{path}`" in done.err


@served
def test_what_the_service_does_not_find_is_not_found() -> None:
    done = run("call", "helloworld", "Helloworld.Lack")
    assert done == (Exit.NOT_FOUND, "", "error: NotFound: helloworld: no such row\n")


@served
def test_the_text_of_a_peer_is_one_harmless_line() -> None:
    done = run("call", "helloworld", "Helloworld.Refuse")
    text = r"first\nsecond \x1b[31mred"
    assert done == (Exit.ERROR, "", f"error: Aborted: helloworld: {text}\n")


@served
def test_an_error_for_machines_is_json() -> None:
    done = run("call", "helloworld", "Helloworld.Refuse", "--json")
    assert (done.status, done.out) == (Exit.ERROR, "")
    assert json.loads(done.err) == {
        "kind": "Aborted",
        "code": 409,
        "detail": "first\nsecond \x1b[31mred",
        "id": "helloworld",
        "details": {"winner": "other"},
        "retry_after": 2,
    }


@served
def test_no_reply_in_time_is_deadline_exceeded() -> None:
    done = run("call", "helloworld", "Helloworld.Wait", "--client_request_timeout", "2500ms")
    assert (done.status, done.out) == (Exit.DEADLINE_EXCEEDED, "")
    assert done.err.startswith("error: DeadlineExceeded: helloworld Helloworld.Wait: no reply ")


def test_a_node_that_nobody_answers_for_is_unavailable(tmp_path: Path, registry: str) -> None:
    script = tmp_path / "helloworld.py"
    script.write_text(SERVICE)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        flags = ("--registry", registry, "--server_name", "away", "--server_advertise", address)
        with started(script, *flags) as process:
            done = run("call", "away", "Helloworld.Call")
            process.kill()
    assert (done.status, done.out) == (Exit.UNAVAILABLE, "")
    assert done.err.startswith("error: Unavailable: ")
    assert address in done.err
    assert done.err.count("\n") == 1


def test_an_interrupt_ends_with_130(helloworld: subprocess.Popen[str]) -> None:
    words = ["--client_request_timeout", "1m", "call", "helloworld", "Helloworld.Wait"]
    words = [MICRO, *words, '{"word": "interrupt"}']
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as caller:
        wait_for_line(helloworld, "waiting interrupt")
        caller.send_signal(signal.SIGINT)
        out, err = caller.communicate(timeout=PATIENCE)
    assert (caller.returncode, out, err.strip()) == (Exit.INTERRUPTED, "", "")


@pytest.mark.parametrize(
    ("service", "endpoint", "text"),
    [
        ("no name", "Helloworld.Call", "service name 'no name': "),
        ("helloworld", "/", "endpoint '/': write Handler.Method"),
    ],
)
def test_a_name_that_nothing_has_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], service: str, endpoint: str, text: str
) -> None:
    assert main(["call", service, endpoint]) == Exit.USAGE
    assert capsys.readouterr().err.startswith(f"error: InvalidArgument: {text}")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["services", "--registry", "mdsn"],
            "error: ConfigError: --registry: no registry has the scheme 'mdsn'; did you mean '",
        ),
        (
            ["--transport", "pigeon", "call", "a", "b"],
            "error: ConfigError: --transport: no transport has the scheme 'pigeon'; known are ",
        ),
        (
            ["services", "--log-level", "loud"],
            "error: ConfigError: --log_level: log level 'loud': write one of debug, ",
        ),
        (
            ["describe", "a", "--client-request-timeout", "soon"],
            "error: ConfigError: --client_request_timeout: client_request_timeout: 'soon' is not ",
        ),
    ],
)
def test_a_wrong_setting_is_a_usage_error_that_names_it(
    capsys: pytest.CaptureFixture[str], words: list[str], text: str
) -> None:
    assert main(words) == Exit.USAGE
    assert capsys.readouterr().err.startswith(text)


def test_a_wrong_variable_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICRO_REGISTRY", "mdsn")
    assert main(["services"]) == Exit.USAGE
    assert "MICRO_REGISTRY: no registry has the scheme 'mdsn'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "wrong", "right"),
    [
        (["services", "--registy", "memory"], "--registy", "--registry"),
        (["--registy", "memory", "services"], "--registy", "--registry"),
        (["call", "a"], "Missing argument 'ENDPOINT'", "micro call --help"),
        (["service"], "No such command 'service'", "micro --help"),
        (["completion", "csh"], "csh", "'bash', 'zsh', 'fish'"),
    ],
)
def test_a_wrong_argument_is_a_usage_error_of_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], wrong: str, right: str
) -> None:
    assert main(words) == Exit.USAGE
    error = capsys.readouterr().err
    assert error.startswith("error: UsageError: ")
    assert error.count("\n") == 1
    assert wrong in error
    assert right in error


def test_a_usage_error_for_machines_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "service"]) == Exit.USAGE
    told = json.loads(capsys.readouterr().err)
    assert (told["kind"], told["code"], told["id"]) == ("UsageError", 400, "")
    assert "No such command 'service'" in told["detail"]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (
            "{name: 1}",
            "is not JSON: Expecting property name enclosed in double quotes at line 1, column 2",
        ),
        ('{"name":}', "is not JSON: Expecting value at line 1, column 9"),
        (
            '{\n  "name": "Alice"\n  "age": 5\n}',
            "is not JSON: Expecting ',' delimiter at line 3, column 3",
        ),
        ("", "is not JSON: Expecting value at line 1, column 1"),
        ('{"a": 1, "a": 2}', "cannot be sent: the JSON has the name 'a' twice in one object"),
        ("[" * 5000 + "]" * 5000, "cannot be sent: "),
        ('{"a": NaN}', "cannot be sent: "),
        ('{"a": "\udcff"}', "cannot be sent: "),
    ],
)
def test_bad_json_is_a_usage_error_that_says_where(
    capsys: pytest.CaptureFixture[str], text: str, where: str
) -> None:
    assert main(["call", "helloworld", "Helloworld.Call", text]) == Exit.USAGE
    error = capsys.readouterr().err
    assert error.startswith(f"error: UsageError: the JSON argument {where}")
    assert error.count("\n") == 1


def test_bad_json_in_a_file_names_the_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "request.json"
    file.write_text('{"name":\n}')
    assert main(["call", "helloworld", "Helloworld.Call", f"@{file}"]) == Exit.USAGE
    where = f"{file} is not JSON: Expecting value at line 2, column 1"
    assert where in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["call", "helloworld", "Helloworld.Call", f"@{tmp_path}/none"]) == Exit.USAGE
    assert f"cannot read '{tmp_path}/none': No such file" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [*BY_NAME.values(), micro.ConfigError, micro.Closed])
def test_every_error_has_a_status(kind: type[micro.MicroError]) -> None:
    expected = Exit.ERROR
    for base, status in (
        (micro.NotFound, Exit.NOT_FOUND),
        (micro.Unavailable, Exit.UNAVAILABLE),
        (micro.DeadlineExceeded, Exit.DEADLINE_EXCEEDED),
        (micro.ConfigError, Exit.USAGE),
    ):
        expected = status if issubclass(kind, base) else expected
    assert exit_of(kind("text", remote=True)) == expected


def test_an_argument_refused_before_it_was_sent_is_a_usage_error() -> None:
    assert exit_of(micro.InvalidArgument("text")) == Exit.USAGE
    assert exit_of(micro.InvalidArgument("text", remote=True)) == Exit.ERROR


def test_a_reply_that_cannot_be_read_is_no_usage_error() -> None:
    assert exit_of(micro.DecodeError("text")) == Exit.ERROR


def test_help_documents_every_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == Exit.OK
    text = capsys.readouterr().out
    assert all(re.search(rf"^ +{status:d} +\w+", text, re.MULTILINE) for status in Exit)


def test_no_command_shows_the_help_and_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == Exit.USAGE
    shown = capsys.readouterr()
    assert (shown.out, shown.err[:6]) == ("", "Usage:")


# -- services and describe ---------------------------------------------------------------------


@served
def test_services_lists_names_nodes_and_versions() -> None:
    done = run("services")
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines()[0].split() == ["SERVICE", "NODES", "VERSIONS"]
    assert ["helloworld", "1", "1.5"] in [line.split() for line in done.out.splitlines()]


@served
def test_services_for_machines_is_json() -> None:
    done = run("services", "--json")
    assert {"name": "helloworld", "nodes": 1, "versions": ["1.5"]} in json.loads(done.out)
    assert done.out.count("\n") == 1


def test_an_empty_registry_is_said_and_no_error(
    capsys: pytest.CaptureFixture[str], empty: str
) -> None:
    assert main(["services"]) == Exit.OK
    assert capsys.readouterr().out == (
        f"nothing is registered with {empty}; "
        "start a service, or choose another registry: --registry\n"
    )


@pytest.mark.usefixtures("empty")
def test_an_empty_registry_is_an_empty_list_for_machines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["services", "--json"]) == Exit.OK
    assert capsys.readouterr().out == "[]\n"


@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize("words", [["describe", "a"], ["call", "a", "B.C"]])
def test_a_service_not_found_where_nothing_is_says_so(
    capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(words) == Exit.NOT_FOUND
    text = "service 'a' is not registered; nothing is registered, is it running?"
    assert capsys.readouterr().err == f"error: ServiceNotFound: {text}\n"


@served
def test_describe_shows_endpoints_messages_and_nodes() -> None:
    done = run("describe", "helloworld")
    assert (done.status, done.err) == (0, "")
    assert (
        """\
Helloworld.Call
  Greet a person.
  request      Request
    name       string
    addresses  []Address
      city     string
  response     Response
    message    string
"""
        in done.out
    )
    title, node = done.out.splitlines()[-2:]
    assert title.split() == ["NODE", "ADDRESS", "VERSION", "METADATA"]
    assert node.split()[1].startswith("127.0.0.1:")
    assert node.split()[2] == "1.5"
    assert "transport=http" in node.split()


@served
def test_describe_for_machines_is_json() -> None:
    done = run("--json", "describe", "helloworld")
    told = json.loads(done.out)
    assert (told["name"], told["versions"]) == ("helloworld", ["1.5"])
    call_ = next(one for one in told["endpoints"] if one["name"] == "Helloworld.Call")
    assert call_["metadata"] == {"description": "Greet a person."}
    assert call_["versions"] == ["1.5"]
    assert [field["name"] for field in call_["request"]["values"]] == ["name", "addresses"]
    assert told["nodes"][0]["metadata"]["protocol"] == "mucp"


def node(id: str, version: str, *endpoints: str, **metadata: str) -> micro.Node:
    return micro.Node(
        service="a",
        id=id,
        address="127.0.0.1:1",
        version=version,
        metadata=metadata,
        endpoints=tuple(micro.Endpoint(name=name) for name in endpoints),
    )


def test_describe_says_which_version_has_an_endpoint(capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [node("x", "1", "A.Old", "A.Both"), node("y", "2", "A.Both", "A.New")]
    _output.show_service(nodes)
    lines = capsys.readouterr().out.splitlines()
    assert {"A.Both", "A.New (version 2)", "A.Old (version 1)"} <= set(lines)


def test_describe_says_which_endpoints_stream(capsys: pytest.CaptureFixture[str]) -> None:
    stream = micro.Endpoint(name="A.Watch", metadata={"stream": "true"})
    replace = msgspec.structs.replace
    nodes = [node("x", "1", "A.Call"), replace(node("y", "2"), endpoints=(stream,))]
    _output.show_service(nodes)
    lines = capsys.readouterr().out.splitlines()
    assert {"A.Call (version 1)", "A.Watch (stream; version 2)"} <= set(lines)
    _output.show_service(nodes[1:])
    assert "A.Watch (stream)" in capsys.readouterr().out.splitlines()


def test_describe_shows_nothing_that_moves_a_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    _output.show_service([node("x", "1\x1b[2J", "A.B\r", key="v\nv")])
    text = capsys.readouterr().out
    assert r"1\x1b[2J" in text
    assert r"A.B\r" in text
    assert r"key=v\nv" in text


@pytest.mark.parametrize("text", ["\n", "\r", "\x1b", "\x9b", "\u2028", "\u202e", "\udcff", "\x00"])
def test_printable_escapes(text: str) -> None:
    assert printable(f"a{text}b").isascii()


def test_printable_keeps_text_of_any_language() -> None:
    assert printable("Łucja 日本 🙂") == "Łucja 日本 🙂"


class Helloworld:
    async def call(self, name: str) -> str:
        return f"Hello {name}"


@pytest.mark.asyncio
async def test_commands_need_only_an_open_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MICRO_REGISTRY")
    plugins = micro.Plugins()
    places: dict[str, Any] = {"registry": "memory://here", "transport": "memory://here"}
    server = micro.Service("helloworld", **places, plugins=plugins)
    server.handle(Helloworld())
    async with server, micro.Service("micro", **places, plugins=plugins) as client:
        url, found = await services(client)
        nodes = await describe(client, "helloworld")
    assert (url, found) == ("memory://here", {"helloworld": nodes})


# -- version -----------------------------------------------------------------------------------


def test_version_tells_micro_core_and_python(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == Exit.OK
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in lines] == ["micro-core", "Python"]


def test_version_for_machines_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version", "--json"]) == Exit.OK
    told = json.loads(capsys.readouterr().out)
    assert told["Python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(told) == {"micro-core", "Python"}


# -- plugins -----------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site(tmp_path, monkeypatch)
    site.install("micro-core", version="0.9")
    yield site
    site.forget()


COMMANDS = """
import click
from micro.hookspecs import hookimpl

@click.command("dump")
@click.argument("word", default="nothing")
def dump(word):
    'Dump what there is.'
    click.echo(f"dumped {word}")

@hookimpl
def micro_commands():
    return [click.Command("other"), dump]
"""
BACKENDS = """
from micro.backends.memory import MemoryRegistry
from micro.hookspecs import hookimpl

class XRegistry(MemoryRegistry):
    schemes = ("x",)

@hookimpl
def micro_backends():
    return [XRegistry]
"""
EXTENSION = """
from micro.hookspecs import hookimpl

class Debug:
    async def stats(self) -> str:
        return "fine"

def saying(handler):
    async def run(call, body):
        print("called", call.endpoint)
        return await handler(call, body)
    return run

@hookimpl
def micro_configure(service):
    service.handle(Debug())
    service.wrap_client(saying)
"""
LOUD = "raise RuntimeError('loaded')"


def install_dump(site: Site, text: str = COMMANDS, name: str = "dump") -> None:
    modules = {"micro_plugin_x_commands": text}
    site.install("micro-plugin-x", commands={name: "micro_plugin_x_commands"}, modules=modules)


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What ``micro plugins --json`` prints, by distribution."""
    assert main(["plugins", "--json"]) == Exit.OK
    return {row["distribution"]: row for row in json.loads(capsys.readouterr().out)}


def test_command_of_a_plugin_runs(capsys: pytest.CaptureFixture[str], site: Site) -> None:
    install_dump(site)
    assert main(["dump", "all"]) == Exit.OK
    assert capsys.readouterr().out == "dumped all\n"


def test_help_of_a_plugins_command_is_its_own(
    capsys: pytest.CaptureFixture[str], site: Site
) -> None:
    install_dump(site)
    assert main(["dump", "--help"]) == Exit.OK
    text = capsys.readouterr().out
    assert "Usage: micro dump [OPTIONS] [WORD]" in text
    assert "Dump what there is." in text


def test_help_lists_a_plugins_command_without_loading_it(
    capsys: pytest.CaptureFixture[str], site: Site
) -> None:
    install_dump(site, LOUD)
    assert main(["--help"]) == Exit.OK
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "dump from micro-plugin-x 1.0" in rows
    assert "micro_plugin_x_commands" not in sys.modules


def test_plugins_command_completes_without_being_loaded(
    monkeypatch: pytest.MonkeyPatch, site: Site
) -> None:
    install_dump(site, LOUD)
    monkeypatch.setenv("PYTHONPATH", str(site.folder))
    assert completed(monkeypatch, "du") == (0, "plain,dump\n", "")
    assert completed(monkeypatch, "dump", "--") == (0, "plain,--help\n", "")


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("", "it has no hook micro_commands"),
        (COMMANDS.replace("[click.Command", "[5, click.Command"), "gave [5, <Command other>, "),
        (COMMANDS.replace('"dump"', '"damp"'), "micro_commands gave no command 'dump'"),
        (
            COMMANDS.replace("return", "raise LookupError; return"),
            "micro_commands gave no list: LookupErr",
        ),
    ],
)
def test_broken_command_of_a_plugin_is_a_usage_error_that_names_it(
    capsys: pytest.CaptureFixture[str], site: Site, text: str, cause: str
) -> None:
    install_dump(site, text)
    assert main(["dump"]) == Exit.USAGE
    error = capsys.readouterr().err
    assert error.startswith("error: ConfigError: micro dump: command 'dump' of micro-plugin-x 1.0 ")
    assert cause in error
    assert error.count("\n") == 1
    assert main(["version"]) == Exit.OK


def test_two_distributions_for_one_command_are_refused_unloaded_and_both_are_named(
    capsys: pytest.CaptureFixture[str], site: Site
) -> None:
    install_dump(site, LOUD)
    site.install("another-x", commands={"dump": "another_x"}, modules={"another_x": LOUD})
    assert main(["dump"]) == Exit.USAGE
    error = capsys.readouterr().err
    assert error.startswith("error: ConfigError: micro dump: command 'dump' of another-x 1.0 ")
    assert error.endswith("it is claimed by micro-plugin-x 1.0 too; uninstall one of them\n")
    main(["--help"])
    assert "from another-x 1.0 and micro-plugin-x 1.0" in capsys.readouterr().out


def test_command_of_a_plugin_does_not_replace_ours(
    capsys: pytest.CaptureFixture[str], site: Site
) -> None:
    install_dump(site, COMMANDS.replace('"dump"', '"version"'), name="version")
    assert main(["version"]) == Exit.OK
    assert capsys.readouterr().out.startswith("micro-core")
    (told,) = listed(capsys)["micro-plugin-x"]["commands"]
    assert told["broken"].startswith("micro has a command of that name")


def test_plugins_lists_what_is_installed_and_why_it_is_broken(
    capsys: pytest.CaptureFixture[str], site: Site
) -> None:
    install_dump(site)
    site.install(
        "micro-plugin-y",
        version="2.3",
        backends={"x": "micro_plugin_y", "z": "micro_plugin_y", "e": "no_such_module"},
        extensions={"audit": "micro_plugin_y_audit"},
        modules={"micro_plugin_y": BACKENDS, "micro_plugin_y_audit": EXTENSION},
    )
    assert main(["plugins"]) == Exit.OK
    assert [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()] == [
        ["DISTRIBUTION", "VERSION", "OFFERS"],
        ["micro-core", "0.9", "scheme http: transport"],
        ["scheme", "mdns:", "registry"],
        ["scheme", "memory:", "registry, transport"],
        ["scheme", "tcp:", "transport"],
        ["micro-plugin-x", "1.0", "command dump"],
        [
            "micro-plugin-y",
            "2.3",
            (
                "scheme e: BROKEN: it cannot be imported: ModuleNotFoundError: "
                "No module named 'no_such_module' (module no_such_module)"
            ),
        ],
        ["scheme", "x:", "registry"],
        [
            "scheme",
            "z:",
            "BROKEN: micro_backends gave no backend with the scheme 'z' (module micro_plugin_y)",
        ],
        ["extension", "audit"],
    ]


def test_plugins_for_machines_is_json(capsys: pytest.CaptureFixture[str], site: Site) -> None:
    install_dump(site)
    site.install("another-x", commands={"dump": "another_x"}, backends={"x": "another_x"})
    (site.folder / "another_x.py").write_text(BACKENDS)
    rows = listed(capsys)
    assert rows["micro-core"]["version"] == "0.9"
    assert {"name": "memory", "kinds": ["registry", "transport"]} in rows["micro-core"]["schemes"]
    assert rows["another-x"] == {
        "distribution": "another-x",
        "version": "1.0",
        "schemes": [{"name": "x", "kinds": ["registry"]}],
        "commands": [
            {"name": "dump", "broken": "it is claimed by micro-plugin-x 1.0 too (module another_x)"}
        ],
        "extensions": [],
    }
    (twice,) = rows["micro-plugin-x"]["commands"]
    assert twice["broken"].startswith("it is claimed by another-x 1.0 too")


def test_plugins_where_none_is_installed_says_how_one_is_found(
    capsys: pytest.CaptureFixture[str], site: Site
) -> None:
    assert main(["plugins"]) == Exit.OK
    shown = capsys.readouterr().out
    assert "No plugin is installed." in shown
    assert "micro.backends, micro.commands or micro.extensions" in shown
    assert sys.executable in shown


def test_extension_wraps_the_calls_of_the_command_and_makes_it_serve_nothing(
    capsys: pytest.CaptureFixture[str], site: Site
) -> None:
    site.install("micro-plugin-e", extensions={"e": "ext"}, modules={"ext": EXTENSION})
    words = ["--registry", "memory", "--transport", "memory"]
    assert main(["call", "micro", "Debug.Stats", *words, "--extensions", "e"]) == Exit.NOT_FOUND
    shown = capsys.readouterr()
    assert shown.out == "called Debug.Stats\n"
    assert "nothing is registered" in shown.err


def test_extensions_of_the_command_may_be_repeated(
    capsys: pytest.CaptureFixture[str], site: Site
) -> None:
    site.install("micro-plugin-e", extensions={"e": "ext"}, modules={"ext": EXTENSION})
    words = ["--extensions", "f", "--extensions", "e", "services", "--registry", "memory"]
    assert main(words) == Exit.USAGE
    text = "--extensions: no extension has the name 'f' (installed: e)"
    assert capsys.readouterr().err == f"error: ConfigError: {text}\n"


def test_no_plugin_is_looked_for_when_none_is_asked_for() -> None:
    program = """\
import sys
from micro.cli import main
main(["services", "--registry", "memory", "--transport", "memory"])
print(*sys.modules)"""
    done = run("-c", program, command=(sys.executable,))
    assert not {"importlib.metadata", "pluggy"} & set(done.out.split())


# -- a terminal --------------------------------------------------------------------------------


def on_terminal(*words: str) -> str:
    """What a terminal gets to show."""
    primary, secondary = pty.openpty()
    try:
        subprocess.run(
            [MICRO, *words],
            stdin=secondary,
            stdout=secondary,
            stderr=secondary,
            timeout=PATIENCE,
            check=True,
        )
        return os.read(primary, 65536).decode().replace("\r\n", "\n")
    finally:
        os.close(primary)
        os.close(secondary)


@served
def test_a_reply_is_coloured_on_a_terminal() -> None:
    shown = on_terminal("call", "helloworld", "Helloworld.Call", '{"name":"Alice"}')
    assert shown == '{\x1b[34m"message"\x1b[0m: \x1b[32m"Hello Alice"\x1b[0m}\n'


@served
def test_no_color_turns_colour_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    shown = on_terminal("call", "helloworld", "Helloworld.Call", '{"name":"Alice"}')
    assert shown == '{"message": "Hello Alice"}\n'
    assert "\x1b" not in on_terminal("describe", "helloworld")


@served
def test_a_stream_is_coloured_lines_on_a_terminal_where_it_reads_no_lines() -> None:
    words = ("stream", "helloworld", "Streams.Count", "--timeout", "9s")
    assert on_terminal(*words, '{"to": 2}') == "\x1b[33m0\x1b[0m\n\x1b[33m1\x1b[0m\n"
    assert '"word"' not in on_terminal("stream", "helloworld", "Streams.Context")


@served
def test_bytes_cannot_harm_a_terminal() -> None:
    words = ("call", "helloworld", "Other.Reverse", "\n[2Jab", "--content_type", "octet-stream")
    assert on_terminal(*words) == "baJ2[\\n\n"


@served
def test_json_for_machines_has_no_colour_on_a_terminal() -> None:
    shown = on_terminal("call", "helloworld", "Helloworld.Call", '{"name":"Alice"}', "--json")
    assert shown == '{"message": "Hello Alice"}\n'


@served
def test_a_long_reply_is_indented_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    words = ("call", "helloworld", "Helloworld.Count")
    assert on_terminal(*words).startswith("[\n  7,\n  8,\n")
    assert run(*words).out.startswith("[7, 8, ")


@served
def test_a_reader_that_leaves_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [MICRO, "services"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    os.close(write)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_a_terminal_without_unicode_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    stream = io.TextIOWrapper(shown, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    main(["version"])
    print("Łucja", file=stream, flush=True)
    assert shown.getvalue().endswith(b"\\u0141ucja\n")


# -- completion --------------------------------------------------------------------------------


def completed(monkeypatch: pytest.MonkeyPatch, *words: str) -> Done:
    """What bash is told that the last of ``words`` could become."""
    monkeypatch.setenv("COMP_WORDS", " ".join(["micro", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    monkeypatch.setenv("_MICRO_COMPLETE", "bash_complete")
    return run()


@served
def test_services_complete_from_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "plain,helloworld" in completed(monkeypatch, "call", "hello").out.splitlines()
    assert "plain,helloworld" in completed(monkeypatch, "describe", "").out.splitlines()


@served
def test_endpoints_complete_from_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    done = completed(monkeypatch, "call", "helloworld", "Helloworld.C")
    assert done == (0, "plain,Helloworld.Call\nplain,Helloworld.Count\n", "")


@served
def test_completion_uses_the_options_before_it(
    monkeypatch: pytest.MonkeyPatch, registry: str
) -> None:
    monkeypatch.setenv("MICRO_REGISTRY", "memory")
    done = completed(monkeypatch, "--registry", registry, "call", "hello")
    assert done == (0, "plain,helloworld\n", "")


@pytest.mark.parametrize("url", ["memory", "nonsense", "mdns:///none?timeout=1m"])
def test_completion_that_finds_nothing_is_silent(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("MICRO_REGISTRY", url)
    assert completed(monkeypatch, "call", "hello") == (0, "\n", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_script_of_a_shell(
    capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    assert main(["completion", shell]) == Exit.OK
    text = capsys.readouterr().out
    assert "_micro_completion" in text
    assert f"_MICRO_COMPLETE={shell}_complete" in text


def test_bash_takes_its_script(monkeypatch: pytest.MonkeyPatch) -> None:
    script = f'eval "$({MICRO} completion bash)" && complete -p micro'
    done = run("-c", script, command=("bash", "--norc"))
    assert (done.status, done.err) == (0, "")
    assert "-F _micro_completion micro" in done.out
