"""The suite of registries on mdns, whose times are seconds."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Awaitable, Callable

import pytest

from micro.backends._mdns_wire import Zone
from micro.backends.mdns import MDNSRegistry
from micro.registry import Node
from micro.testing import RegistrySuite


class TestMDNSRegistry(RegistrySuite):
    backend = MDNSRegistry
    model_examples = 3
    model_steps = 8

    @pytest.fixture
    def domain(self) -> str:
        return uuid.uuid4().hex[:3]

    @pytest.fixture
    def url(self, domain: str, request: pytest.FixtureRequest) -> str:
        # Two hundred answers take a busy machine longer than those should wait who find nothing.
        patience = "3s" if "200" in request.node.name else "0.5s"
        return f"mdns:///{domain}?timeout={patience}"

    @pytest.fixture
    def namespaced_url(self, domain: str) -> str:
        return f"mdns:///{domain}x?timeout=0.5"

    @pytest.fixture
    def garbage(self, domain: str) -> Callable[[str], Awaitable[None]]:
        async def shout(service: str) -> None:
            zone = Zone(domain, "liar")
            card = zone.card(Node(service=service, id="liar", address="127.0.0.1:1"))
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                here = socket.inet_aton("127.0.0.1")
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, here)
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 0)
                for broken in (card._replace(text=b"\x09not zlib"), card._replace(port=0)):
                    sock.sendto(zone.announcement(broken, ttl=30), ("224.0.0.251", 5353))

        return shout
