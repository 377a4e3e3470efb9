"""What of TLS is of etcd alone; the rest is in test_conformance_access.py."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from micro.errors import ConfigError
from micro.testing.certificates import Authority
from micro.testing.ports import HOST
from micro.testing.servers import EtcdServer
from micro_plugin_etcd import EtcdRegistry

Connected = Callable[..., AbstractAsyncContextManager[EtcdRegistry]]


@pytest.mark.asyncio
async def test_without_ca_a_folder_of_authorities_of_the_system_is_trusted(
    connected: Connected, etcd_binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority.create(tmp_path / "authority")
    folder = tmp_path / "system"
    folder.mkdir()
    shutil.copy(authority.ca, folder / "0123abcd.0")  # files of such names count
    monkeypatch.setenv("SSL_CERT_FILE", "/none.pem")
    monkeypatch.setenv("SSL_CERT_DIR", str(folder))
    with EtcdServer(etcd_binary, tmp_path, tls=authority.server()) as server:
        async with connected(f"{server.url}?tls=true") as registry:
            assert await registry.services() == ()


@pytest.mark.asyncio
async def test_tls_to_the_port_for_peers_which_speaks_none(
    connected: Connected, etcd: EtcdServer, tmp_path: Path
) -> None:
    etcd.start()
    peers = f"{HOST}:{etcd._ports[1]}"  # it answers in plain HTTP/1.1
    ca = Authority.create(tmp_path).ca
    with pytest.raises(ConfigError, match="the server does not speak TLS; leave tls, ca, cert"):
        async with connected(f"etcd://{peers}?ca={ca}&timeout=3s"):
            pass
