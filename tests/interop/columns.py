"""The columns of the matrix: a registry, and a version of Go Micro that shares it with us."""

from __future__ import annotations

from dataclasses import dataclass

REGISTRIES = ("mdns", "etcd", "consul", "nats")
#: The recipe that makes the program of each version.
VERSIONS = {"v4.11.0": "gomicro", "v5.0.0": "gomicro5", "v3.7.1": "gomicro3"}


@dataclass(frozen=True)
class Column:
    """What both sides are set to."""

    registry: str
    version: str
    #: Seconds: of what is registered, and between two heartbeats.
    ttl: int = 3
    interval: int = 1

    @property
    def fixtures(self) -> list[str]:
        """What has to be there: the program, and a server if the registry has one."""
        server = [] if self.registry == "mdns" else [self.registry]
        return [f"{VERSIONS[self.version]}_binary", *server]

    @property
    def cannot(self) -> str:
        """Why there is no such fleet; nothing if there is one."""
        if self.version == "v5.0.0" and self.registry != "mdns":
            return (
                "Go Micro 5.0.0 has this registry as a plugin alone, and the plugin, v1.0.2, "
                "does not build with it: it needs a package that came with 5.2.0"
            )
        return ""

    @property
    def crash(self) -> float:
        """Seconds within which a client of ours no longer has a node of ours that was killed."""
        return {"consul": 2 * self.ttl + 1.0, "mdns": self.ttl + 3.0}.get(
            self.registry, self.ttl + 1.0
        )

    @property
    def go_crash(self) -> float:
        """Seconds within which a client of ours no longer has a node of Go's that was killed."""
        # Go Micro announces it for 120 s, whatever its settings are.
        return 120.0 + 3.0 if self.registry == "mdns" else self.crash

    def environment(self, address: str) -> dict[str, str]:
        """The variables that both sides read; ``address`` is that of the server."""
        variables = {
            "MICRO_REGISTRY": self.registry,
            "MICRO_REGISTRY_ADDRESS": address,
            "MICRO_REGISTER_TTL": str(self.ttl),
            "MICRO_REGISTER_INTERVAL": str(self.interval),
        }
        return {name: value for name, value in variables.items() if value}

    def __str__(self) -> str:
        return f"{self.registry} {self.version}"
