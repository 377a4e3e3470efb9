"""Real servers for tests: a process with data and ports of its own, on loopback."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from micro.testing.ports import HOST, unused_ports

if TYPE_CHECKING:
    from micro.testing.certificates import Identity


class Server(ABC):
    r"""A server process that belongs to one test, or to one module of tests.

    ::

        class RedisServer(Server):
            scheme = "redis"

            def command(self, data, ports):
                return ["redis-server", "--port", str(ports[0]), "--dir", str(data)]

            def answers(self):
                with socket.create_connection((HOST, self.port), timeout=1) as client:
                    client.sendall(b"PING\r\n")
                    return client.recv(5) == b"+PONG"

        with RedisServer(tmp_path) as server:
            assert server.url == f"redis://127.0.0.1:{server.port}"

    Its folder has the data in ``data``, and in ``log`` what the process says. Its ports are chosen
    at the first start and stay the same. What waits here, blocks: a test of asyncio calls it by
    ``asyncio.to_thread``. The process ends with the ``with`` block, or else with the test run.
    """

    scheme: ClassVar[str]
    #: How many ports it listens on; the first is for its clients.
    port_count: ClassVar[int] = 1
    #: Seconds until it answers, and until SIGTERM has ended it.
    starts_within: ClassVar[float] = 30.0
    stops_within: ClassVar[float] = 10.0

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._data = self._folder / "data"
        self.log: Path = self._folder / "log"
        self._ports: tuple[int, ...] = ()
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = False
        self._said = 0

    @abstractmethod
    def command(self, data: Path, ports: Sequence[int]) -> Sequence[str | Path]:
        """The command line: data in the folder ``data``, ports on 127.0.0.1, in the foreground."""

    @abstractmethod
    def answers(self) -> bool:
        """Whether it answers one request, within a second or two; an OSError is a no."""

    @property
    def port(self) -> int:
        """The port for clients."""
        if not self._ports:
            raise RuntimeError(f"{type(self).__name__} has no port before its first start")
        return self._ports[0]

    @property
    def address(self) -> str:
        """``127.0.0.1:port``."""
        return f"{HOST}:{self.port}"

    @property
    def url(self) -> str:
        """``scheme://127.0.0.1:port``."""
        return f"{self.scheme}://{self.address}"

    @property
    def running(self) -> bool:
        """Whether the process is there, paused or not."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process.

        Raises:
            RuntimeError: it does not run.
        """
        if self._process is None or not self.running:
            raise RuntimeError(f"{type(self).__name__} does not run")
        return self._process.pid

    def start(self) -> None:
        """Run it, or resume it if it runs; it answers when this returns.

        Raises:
            RuntimeError: it does not answer in time, or has ended; the text has the end of its log.
        """
        if self._process is not None and self.running:
            self.resume()
            self._wait_until_it_answers(self._process)
        elif self._ports:
            self._launch()
        else:
            self._launch_on_other_ports(attempts=5)

    def stop(self) -> None:
        """End it by SIGTERM, or by SIGKILL when it takes longer than ``stops_within``."""
        if self._process is not None and self.running:
            self._process.terminate()
            with suppress(RuntimeError):  # it may have ended already
                self.resume()
            try:
                self._process.wait(self.stops_within)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End it by SIGKILL, paused or not, as a crash would; it is gone when this returns."""
        if self._process is not None:
            _end(self._process)

    def restart(self, *, keep_data: bool = True) -> None:
        """Kill it and start it again, on its data or with none."""
        self.kill()
        if not keep_data and self._data.exists():
            shutil.rmtree(self._data)
        self.start()

    def pause(self) -> None:
        """Stop it by SIGSTOP: connections stay open, nothing answers.

        Raises:
            RuntimeError: it does not run.
        """
        pid = self.pid
        if not self._paused:
            os.kill(pid, signal.SIGSTOP)
            # The kernel tells us, its parent, once the last of its threads has stopped.
            if not _wait(lambda: os.waitpid(pid, os.WUNTRACED | os.WNOHANG)[0] == pid, within=10):
                raise RuntimeError(f"{type(self).__name__} runs on, 10 s after SIGSTOP")
            self._paused = True

    def resume(self) -> None:
        """Let it go on; quiet when it is not paused.

        Raises:
            RuntimeError: it does not run.
        """
        os.kill(self.pid, signal.SIGCONT)
        self._paused = False

    def _launch_on_other_ports(self, attempts: int) -> None:
        self._ports = unused_ports(self.port_count)
        try:
            self._launch()
        except RuntimeError as exc:
            self._ports = ()
            # Somebody may have been quicker to listen on one of them.
            if attempts == 1 or "already in use" not in str(exc):
                raise
            self._launch_on_other_ports(attempts - 1)

    def _launch(self) -> None:
        self._data.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._said = log.tell()
            self._process = subprocess.Popen(  # noqa: S603 - a test starts what it wants
                self.command(self._data, self._ports),
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._paused = False
        weakref.finalize(self, _end, self._process)
        try:
            self._wait_until_it_answers(self._process)
        except BaseException:
            self.kill()
            raise

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        def settled() -> bool:
            try:
                return process.poll() is not None or self.answers()
            except OSError:
                return False

        why = "" if _wait(settled, within=self.starts_within) else "does not answer"
        if process.poll() is not None:
            why = f"ended with status {process.returncode}"
        if why:
            raise RuntimeError(
                f"{type(self).__name__} {why}; the end of {self.log}:\n{self._tail()}"
            )

    def _tail(self) -> str:
        """The last of what the process has said since it was started."""
        with self.log.open("rb") as log:
            log.seek(max(self._said, self.log.stat().st_size - 4000))
            return log.read().decode(errors="replace")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


class EtcdServer(Server):
    """One etcd, of quick elections.

    ``tls`` is what it shows to clients; with ``client_ca`` they must show a certificate of that
    authority, and so must its own be, since etcd is a client of itself. ``arguments`` are more of
    its flags.
    """

    scheme = "etcd"
    port_count = 2

    def __init__(
        self,
        binary: Path,
        folder: Path,
        *,
        tls: Identity | None = None,
        client_ca: Path | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        super().__init__(folder)
        self._binary = binary.absolute()
        self._tls = tls
        self._client_ca = client_ca
        self._arguments = arguments

    def command(self, data: Path, ports: Sequence[int]) -> Sequence[str | Path]:
        clients = f"{'https' if self._tls else 'http'}://{HOST}:{ports[0]}"
        peers = f"http://{HOST}:{ports[1]}"
        flags: dict[str, str | Path] = {
            "--name": "test",
            "--data-dir": data,
            "--listen-client-urls": clients,
            "--advertise-client-urls": clients,
            "--listen-peer-urls": peers,
            "--initial-advertise-peer-urls": peers,
            "--initial-cluster": f"test={peers}",
            # Milliseconds. The least time to live of a lease follows from the second.
            "--heartbeat-interval": "10",
            "--election-timeout": "100",
        }
        if self._tls:
            flags |= {"--cert-file": self._tls.certificate, "--key-file": self._tls.key}
        if self._client_ca:
            flags |= {"--client-cert-auth": "true", "--trusted-ca-file": self._client_ca}
        said = (f"{name}={value}" for name, value in flags.items())
        return [self._binary, *said, *self._arguments]

    def answers(self) -> bool:
        # It reads, through a leader.
        return _http_status(self.port, "GET", "/health", self._tls) == http.HTTPStatus.OK


class ConsulServer(Server):
    """One agent of Consul that is its own cluster, of quick elections.

    ``tls`` and ``client_ca`` are as of ``EtcdServer``, and ``hcl`` more lines of its configuration.
    """

    scheme = "consul"
    port_count = 3

    def __init__(
        self,
        binary: Path,
        folder: Path,
        *,
        tls: Identity | None = None,
        client_ca: Path | None = None,
        hcl: Sequence[str] = (),
    ) -> None:
        super().__init__(folder)
        self._binary = binary.absolute()
        self._tls = tls
        self._hcl = ["performance { raft_multiplier = 1 }", "disable_update_check = true", *hcl]
        if tls:
            files = f'cert_file = "{tls.certificate}", key_file = "{tls.key}"'
            if client_ca:
                files += f', ca_file = "{client_ca}", verify_incoming = true'
            self._hcl.append(f"tls {{ https {{ {files} }} }}")

    def command(self, data: Path, ports: Sequence[int]) -> Sequence[str | Path]:
        flags: dict[str, str | Path | int] = {
            "-data-dir": data,
            "-node": "test",
            "-bind": HOST,
            "-client": HOST,
            "-http-port": -1 if self._tls else ports[0],
            "-https-port": ports[0] if self._tls else -1,
            "-serf-lan-port": ports[1],
            "-server-port": ports[2],
            # Not needed by tests, and else at fixed ports.
            "-serf-wan-port": -1,
            "-dns-port": -1,
            "-grpc-port": -1,
            "-grpc-tls-port": -1,
        }
        said = [f"{name}={value}" for name, value in flags.items()]
        said += [f"-hcl={line}" for line in self._hcl]
        return [self._binary, "agent", "-server", "-bootstrap-expect=1", *said]

    def answers(self) -> bool:
        # It writes, through a leader. Reads wait for one for a long time; with ACLs both are 403.
        return _http_status(self.port, "PUT", "/v1/kv/answers", self._tls) in (200, 403)


class NatsServer(Server):
    """One NATS server with JetStream.

    ``tls`` and ``client_ca`` are as of ``EtcdServer``, and ``arguments`` more of its flags.
    """

    scheme = "nats"

    def __init__(
        self,
        binary: Path,
        folder: Path,
        *,
        tls: Identity | None = None,
        client_ca: Path | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        super().__init__(folder)
        self._binary = binary.absolute()
        self._arguments: list[str | Path] = [*arguments]
        if tls:
            self._arguments += ["--tls", "--tlscert", tls.certificate, "--tlskey", tls.key]
        if client_ca:
            self._arguments += ["--tlsverify", "--tlscacert", client_ca]

    def command(self, data: Path, ports: Sequence[int]) -> Sequence[str | Path]:
        listen = ("-a", HOST, "-p", str(ports[0]))
        return [self._binary, *listen, "-js", "-sd", data, *self._arguments]

    def answers(self) -> bool:
        with socket.create_connection((HOST, self.port), timeout=1) as client:
            client.settimeout(1)
            return client.recv(5) == b"INFO "  # it says so once JetStream has its data


def _http_status(port: int, method: str, path: str, tls: Identity | None) -> int:
    """What an HTTP server answers, which shows ``tls`` and is shown it; 0 when that is no HTTP."""
    client = http.client.HTTPConnection(HOST, port, timeout=1)
    if tls:
        context = ssl.create_default_context(cafile=tls.ca)
        context.check_hostname = False  # a test may want it for another host
        context.load_cert_chain(tls.certificate, tls.key)
        client = http.client.HTTPSConnection(HOST, port, timeout=1, context=context)
    try:
        client.request(method, path)
        return client.getresponse().status
    except http.client.HTTPException:
        return 0
    finally:
        client.close()


def _wait(condition: Callable[[], bool], *, within: float) -> bool:
    """Whether ``condition`` came true within that many seconds."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # nothing, if it has ended
    process.wait(10)
