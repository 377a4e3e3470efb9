"""Real server processes: an etcd, and small servers of Python that do what no good server does."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from micro.testing import EtcdServer, Server, servers
from micro.testing.certificates import Authority, Identity
from micro.testing.ports import HOST, unused_ports

SLACK = 2.0
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


class PythonServer(Server):
    """Answers a connection with a byte, after the lines of Python that are given to it."""

    scheme = "byte"

    def __init__(self, folder: Path, lines: str = "") -> None:
        super().__init__(folder)
        self.lines = lines

    def command(self, data: Path, ports: Sequence[int]) -> Sequence[str | Path]:
        serve = """
import socket
server = socket.create_server(("127.0.0.1", port))
while True:
    server.accept()[0].sendall(b".")
"""
        return [sys.executable, "-c", f"port = {ports[0]}\n{self.lines}\n{serve}"]

    def answers(self) -> bool:
        with socket.create_connection((HOST, self.port), timeout=1) as client:
            return client.recv(1) == b"."


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PythonServer]:
    with PythonServer(tmp_path) as server:
        yield server


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("authority"))


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def seconds_of(action: Callable[[], None]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


# -- any server -----------------------------------------------------------------------------------


def test_started_server_answers(server: PythonServer) -> None:
    assert server.running
    assert server.answers()
    assert server.address == f"127.0.0.1:{server.port}"
    assert server.url == f"byte://127.0.0.1:{server.port}"


def test_has_no_address_before_its_first_start(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no port before its first start"):
        _ = PythonServer(tmp_path).address


def test_start_of_a_running_server_changes_nothing(server: PythonServer) -> None:
    pid = server.pid
    server.start()
    assert server.pid == pid


def test_killed_server_is_gone(server: PythonServer) -> None:
    pid = server.pid
    server.kill()
    assert is_gone(pid)
    assert not server.running
    server.kill()
    with pytest.raises(RuntimeError, match="PythonServer does not run"):
        _ = server.pid


def test_stop_lets_it_end_by_itself(tmp_path: Path) -> None:
    says = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit('farewell'))"
    with PythonServer(tmp_path, says) as server:
        server.stop()
        assert not server.running
        assert server.log.read_text() == "farewell\n"


def test_stop_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PythonServer, "stops_within", 1.0)
    deaf = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)"
    with PythonServer(tmp_path, deaf) as server:
        pid = server.pid
        assert 1.0 <= seconds_of(server.stop) <= 1.0 + SLACK
        assert is_gone(pid)


def test_paused_server_holds_connections_and_is_silent_until_it_resumes(
    server: PythonServer,
) -> None:
    server.pause()
    server.pause()
    with socket.create_connection((HOST, server.port), timeout=0.2) as client:
        with pytest.raises(TimeoutError):
            client.recv(1)
        server.resume()
        client.settimeout(10)
        assert client.recv(1) == b"."


@pytest.mark.parametrize("end", [Server.stop, Server.kill])
def test_paused_server_can_be_ended(server: PythonServer, end: Callable[[Server], None]) -> None:
    pid = server.pid
    server.pause()
    assert seconds_of(lambda: end(server)) < server.stops_within
    assert is_gone(pid)


def test_start_resumes_a_paused_server(server: PythonServer) -> None:
    pid = server.pid
    server.pause()
    server.start()
    assert server.pid == pid
    assert server.answers()


def test_pause_twice_with_a_resume_between(server: PythonServer) -> None:
    for _ in range(20):
        server.pause()
        server.resume()
    assert server.answers()


def test_restart_keeps_the_address(server: PythonServer) -> None:
    address, pid = server.address, server.pid
    for _ in range(5):
        server.restart()
    assert server.address == address
    assert is_gone(pid)


def test_server_that_ends_says_why(tmp_path: Path) -> None:
    server = PythonServer(tmp_path, "raise SystemExit('no such option')")
    with pytest.raises(RuntimeError, match=r"(?s)ended with status 1; .*log:\nno such option"):
        server.start()


def test_error_has_the_log_of_the_last_start_alone(tmp_path: Path) -> None:
    server = PythonServer(tmp_path, "raise SystemExit('first')")
    with pytest.raises(RuntimeError, match="first"):
        server.start()
    server.lines = "raise SystemExit('second')"
    with pytest.raises(RuntimeError, match=r"log:\nsecond"):
        server.start()


def test_server_that_never_answers_is_ended_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PythonServer, "starts_within", 5.0)
    server = PythonServer(tmp_path, "import time\nprint('dreaming', flush=True)\ntime.sleep(60)")
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)does not answer; .*dreaming"):
        server.start()
    assert time.monotonic() - began <= 5.0 + SLACK
    assert not server.running


def test_first_start_leaves_a_port_to_who_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server((HOST, unused_ports(1)[0])) as other:
        taken = other.getsockname()[1]
        offers = iter([(taken,), (taken,), unused_ports(1)])
        monkeypatch.setattr(servers, "unused_ports", lambda _: next(offers))
        with PythonServer(tmp_path) as server:
            assert server.port != taken


def test_restart_says_that_its_port_is_taken(server: PythonServer) -> None:
    server.kill()
    with socket.create_server((HOST, server.port)):
        with pytest.raises(RuntimeError, match="already in use"):
            server.start()
    server.start()


def test_server_ends_with_the_test_run_that_forgets_it(tmp_path: Path) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_servers import PythonServer
server = PythonServer(Path({str(tmp_path)!r}))
server.start()
print(server.pid)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    pid = int(done.stdout)
    outlived = not is_gone(pid)
    if outlived:
        os.kill(pid, signal.SIGKILL)
    assert not outlived


@pytest.mark.skipif(not EPHEMERAL.exists(), reason="only Linux tells which ports those are")
def test_ports_are_not_those_of_connections() -> None:
    low, high = map(int, EPHEMERAL.read_text().split())
    ports = unused_ports(20)
    assert len(set(ports)) == 20
    assert not [port for port in ports if low <= port <= high]


# -- etcd -----------------------------------------------------------------------------------------


def kv(server: EtcdServer, what: str, message: str, tls: ssl.SSLContext | None = None) -> str:
    """A request to etcd's own gateway; "a2V5" is "key" in base64."""
    if tls:
        client: http.client.HTTPConnection = http.client.HTTPSConnection(
            HOST, server.port, timeout=5, context=tls
        )
    else:
        client = http.client.HTTPConnection(HOST, server.port, timeout=5)
    try:
        client.request("POST", f"/v3/kv/{what}", message)
        return client.getresponse().read().decode()
    finally:
        client.close()


PUT, GET, VALUE = '{"key": "a2V5", "value": "dmFsdWU="}', '{"key": "a2V5"}', '"value":"dmFsdWU="'


def test_etcd_is_ready_when_start_returns(etcd: EtcdServer) -> None:
    assert etcd.url == f"etcd://{etcd.address}"
    assert '"revision":"2"' in kv(etcd, "put", PUT)


def test_killed_etcd_has_its_data_when_it_returns(etcd: EtcdServer) -> None:
    kv(etcd, "put", PUT)
    etcd.kill()
    with pytest.raises(ConnectionRefusedError):
        kv(etcd, "range", GET)
    etcd.start()
    assert VALUE in kv(etcd, "range", GET)
    etcd.restart()
    assert VALUE in kv(etcd, "range", GET)
    etcd.stop()
    etcd.start()
    assert VALUE in kv(etcd, "range", GET)


def test_etcd_restarted_without_its_data_has_none(etcd: EtcdServer) -> None:
    kv(etcd, "put", PUT)
    etcd.restart(keep_data=False)
    assert VALUE not in kv(etcd, "range", GET)


def test_paused_etcd_answers_once_it_is_resumed(etcd: EtcdServer) -> None:
    kv(etcd, "put", PUT)
    etcd.pause()
    with pytest.raises(TimeoutError):
        etcd.answers()
    etcd.resume()
    assert VALUE in kv(etcd, "range", GET)


def test_etcd_takes_more_arguments(etcd_binary: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="flag provided but not defined: -nonsense"):
        EtcdServer(etcd_binary, tmp_path, arguments=["--nonsense"]).start()
    with EtcdServer(etcd_binary, tmp_path, arguments=["--max-request-bytes", "1000"]) as server:
        large = kv(server, "put", f'{{"key": "a2V5", "value": "{"x" * 4000}"}}')
        assert "request is too large" in large


@pytest.fixture
def tls_etcd(etcd_binary: Path, tmp_path: Path, authority: Authority) -> Iterator[EtcdServer]:
    with EtcdServer(
        etcd_binary, tmp_path, tls=authority.server(), client_ca=authority.ca
    ) as server:
        yield server


def context(ca: Path, identity: Identity | None) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=ca)
    if identity:
        made.load_cert_chain(identity.certificate, identity.key)
    return made


def test_etcd_with_tls_serves_clients_of_its_authority_alone(
    tls_etcd: EtcdServer, authority: Authority, tmp_path: Path
) -> None:
    alice = authority.client("alice")
    assert '"revision":"2"' in kv(tls_etcd, "put", PUT, context(authority.ca, alice))
    tls_etcd.restart()
    assert VALUE in kv(tls_etcd, "range", GET, context(authority.ca, alice))
    mallory = Authority.create(tmp_path / "other").client("alice")
    for nobody in (None, mallory):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            kv(tls_etcd, "put", PUT, context(authority.ca, nobody))
    with pytest.raises(ssl.SSLCertVerificationError):
        kv(tls_etcd, "put", PUT, context(mallory.ca, alice))


def test_certificates_stand_up_to_strict_checks(tls_etcd: EtcdServer, authority: Authority) -> None:
    strict = context(authority.ca, authority.client())
    strict.verify_flags |= ssl.VERIFY_X509_STRICT
    assert "revision" in kv(tls_etcd, "put", PUT, strict)


def test_key_of_a_certificate_is_for_its_owner_alone(authority: Authority) -> None:
    assert authority.client("secretive").key.stat().st_mode & 0o777 == 0o600
