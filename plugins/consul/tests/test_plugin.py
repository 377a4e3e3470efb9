"""What holds of the plugin without a server."""

from __future__ import annotations

from micro.settings import Settings
from micro_plugin_consul import ConsulRegistry, micro_backends


def test_the_hook_gives_the_registry() -> None:
    assert micro_backends() == [ConsulRegistry]


def test_what_selects_consul_for_go_micro_does_so_here() -> None:
    environment = {"MICRO_REGISTRY": "consul", "MICRO_REGISTRY_ADDRESS": "10.0.0.1:8500,b:8500"}
    url = Settings(environment=environment).url("registry", None, "mdns")
    assert (url.scheme, url.hosts, url.path) == ("consul", ("10.0.0.1:8500", "b:8500"), "")
