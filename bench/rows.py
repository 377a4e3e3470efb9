"""What takes part, what is measured, and what is compared: the whole benchmark as tables."""

from __future__ import annotations

import msgspec


class Peer(msgspec.Struct, frozen=True):
    """Who takes part: a program of bench/peers, and options that both its sides are told."""

    program: str
    options: tuple[str, ...] = ()
    #: On the second Python, where a row is shown beside the goals'.
    beside: bool = False
    #: The server that it needs, as tools/servers calls it.
    server: str = ""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured, of whom. ``base`` is whom its table compares all with."""

    title: str
    about: str
    #: What the client does, see bench/load.py and the peers; or another way to measure.
    kind: str
    callers: int = 1
    peers: tuple[str, ...]
    base: str


class Measure(msgspec.Struct, frozen=True, kw_only=True):
    """A figure of a Point: its title, how it is written, whether more of it is better."""

    title: str
    form: str
    more: bool = False
    #: How a ratio of two such figures is written; None where none is shown.
    ratio: str | None = None


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A promise: ``measure`` of ``peer`` over that of ``base``, or by itself, under a load.

    Where more is better the ratio must reach goal and floor, else not pass them. A floor that is
    missed fails the run if the row ``gates``: those rows do that do not depend on how busy the
    machine is.
    """

    what: str
    load: str
    measure: str
    peer: str
    base: str | None
    goal: float
    floor: float
    gates: bool = False


MEASURES = {
    "calls_per_s": Measure(title="a second", form="{:,.0f}", more=True, ratio="{:.2f}"),
    "p50_us": Measure(title="p50 us", form="{:,.0f}"),
    "p99_us": Measure(title="p99 us", form="{:,.0f}"),
    "client_us": Measure(title="CPU us client", form="{:,.1f}"),
    "server_us": Measure(title="CPU us server", form="{:,.1f}"),
    "cpu_us": Measure(title="CPU us both", form="{:,.1f}", ratio="1/{:.1f}"),
    "wall_ms": Measure(title="wall ms", form="{:,.0f}", ratio="{:.2f}"),
    "cpu_ms": Measure(title="CPU ms", form="{:,.0f}", ratio="{:.2f}"),
    "kib": Measure(title="KiB", form="{:,.1f}", ratio="{:.2f}"),
    "pick_ns": Measure(title="CPU ns", form="{:,.0f}", ratio="{:.2f}"),
    "first_ms": Measure(title="first ms", form="{:,.1f}"),
    "p50_ms": Measure(title="p50 ms", form="{:,.1f}"),
    "p999_ms": Measure(title="p99.9 ms", form="{:,.1f}"),
    "last_ms": Measure(title="last ms", form="{:,.1f}"),
}

EVERYTHING = "micro, everything on"
BARE = "micro, bare"
HTTP = "micro, http"
HTTP_EVERYTHING = "micro, http, everything on"
MANY = "micro, bare, 64 connections"
OLD_EVERYTHING = "micro, everything on, CPython 3.11"
OLD_BARE = "micro, bare, CPython 3.11"
OLD_HTTP = "micro, http, CPython 3.11"
DATACLASSES = "micro, everything on, dataclasses"
LARGE = "micro, large bodies"
GRPC = "grpc.aio"
GRPC_UVLOOP = "grpc.aio, uvloop"
FASTAPI = "FastAPI + uvicorn"
ECHO = "naive echo, uvloop"
GO_HTTP = "Go Micro, http"
GO_GRPC = "Go Micro, grpc plugins"
GO_PLAIN = "Go net/http"
STOCK = "micro, asyncio loop"
FASTAPI_STOCK = "FastAPI + uvicorn, asyncio loop"

PEERS = {
    EVERYTHING: Peer("ours", ("native", "everything", "uvloop")),
    BARE: Peer("ours", ("native", "uvloop")),
    MANY: Peer("ours", ("native", "64-connections", "uvloop")),
    DATACLASSES: Peer("ours", ("native", "everything", "dataclasses", "uvloop")),
    LARGE: Peer("ours", ("native", "large", "uvloop")),
    HTTP: Peer("ours", ("http", "uvloop")),
    HTTP_EVERYTHING: Peer("ours", ("http", "everything", "uvloop")),
    STOCK: Peer("ours", ("native",)),
    OLD_EVERYTHING: Peer("ours", ("native", "everything", "uvloop"), beside=True),
    OLD_BARE: Peer("ours", ("native", "uvloop"), beside=True),
    OLD_HTTP: Peer("ours", ("http", "uvloop"), beside=True),
    GRPC: Peer("grpc_aio"),
    GRPC_UVLOOP: Peer("grpc_aio", ("uvloop",)),
    FASTAPI: Peer("fastapi_uvicorn", ("uvloop",)),
    FASTAPI_STOCK: Peer("fastapi_uvicorn"),
    ECHO: Peer("echo", ("uvloop",)),
    GO_HTTP: Peer("go", ("micro-http",)),
    GO_GRPC: Peer("go", ("micro-grpc",)),
    GO_PLAIN: Peer("go", ("net-http",)),
}

#: Registries with a server: each plugin, and its raw client, which does the same without checks.
REGISTRIES = {
    "etcd": "grpc.aio raw, etcd",
    "consul": "aiohttp raw, consul",
    "nats": "nats-py raw, nats",
    "nats-kv": "nats-py raw, nats-kv",
}
_PLUGIN = "micro, {}"
for scheme, raw in REGISTRIES.items():
    server = scheme.removesuffix("-kv")
    PEERS[_PLUGIN.format(scheme)] = Peer("registry", (scheme,), server=server)
    PEERS[raw] = Peer(f"raw_{scheme.replace('-', '_')}", (scheme,), server=server)

#: What a registry is asked to do, by the kind of its load.
ASKED = {
    "beat": ("heartbeats", "16 callers keep a node each."),
    "get": ("reads", "16 callers read the 3 nodes of a service."),
    "follow": (
        "changes that are seen",
        "16 callers change a node each, by the raw client, and wait until a follower was told.",
    ),
}

#: What `import` runs, by the names of its rows.
IMPORTS = {
    "python": "pass",
    "import asyncio": "import asyncio",
    # The peers bring typing_extensions: msgspec loads it where it is, micro does not need it.
    "import micro": "import sys; sys.modules['typing_extensions'] = None; import micro",
    "import micro, with typing_extensions": "import micro",
}

#: From how many nodes `pick` picks, by the names of its rows.
PICKED = {"3 nodes": "3", "10,000 nodes": "10000"}

_SMALL = '`{"name":"Alice"}` -> `{"message":"Hello Alice"}`.'
_PLAIN = (EVERYTHING, BARE, HTTP, GRPC, GRPC_UVLOOP, ECHO, FASTAPI)

LOADS = {
    "import": Load(
        title="Import",
        about="Process start to exit.",
        kind="import",
        peers=tuple(IMPORTS),
        base="import asyncio",
    ),
    "start": Load(
        title="Start to serving",
        about="Process start to the first `POST /Helloworld/Call` answered.",
        kind="start",
        peers=(BARE, STOCK, FASTAPI, FASTAPI_STOCK),
        base=FASTAPI,
    ),
    "one": Load(
        title="Small calls, one caller",
        about=_SMALL,
        kind="call",
        peers=(*_PLAIN, GO_HTTP, GO_GRPC),
        base=GRPC,
    ),
    "small": Load(
        title="Small calls, 64 callers",
        about=_SMALL,
        kind="call",
        callers=64,
        peers=(
            *_PLAIN,
            *(HTTP_EVERYTHING, MANY, OLD_EVERYTHING, OLD_BARE, OLD_HTTP, GO_HTTP, GO_GRPC),
        ),
        base=GRPC,
    ),
    "pause": Load(
        title="A handler that suspends once",
        about="Small calls, 64 callers; the handler awaits `asyncio.sleep(0)`.",
        kind="pause",
        callers=64,
        peers=(EVERYTHING, BARE, HTTP, OLD_BARE),
        base=BARE,
    ),
    "many": Load(
        title="Small calls, 256 callers",
        about=_SMALL,
        kind="call",
        callers=256,
        peers=_PLAIN,
        base=GRPC,
    ),
    "wrk": Load(
        title="Servers under wrk",
        about="64 connections, the server on one core; the request is what a Go Micro "
        "client sends.",
        kind="wrk",
        callers=64,
        peers=(HTTP, HTTP_EVERYTHING, BARE, GO_HTTP, GO_PLAIN),
        base=GO_PLAIN,
    ),
    "order": Load(
        title="10 kB messages",
        about="Orders of 96 lines, 10 kB as JSON, sent back whole; 64 callers.",
        kind="order",
        callers=64,
        peers=(EVERYTHING, DATACLASSES, HTTP, GRPC, GRPC_UVLOOP),
        base=GRPC,
    ),
    "blob": Load(
        title="16 MiB bodies",
        about="Raw bytes, sent back whole; 2 callers.",
        kind="blob",
        callers=2,
        peers=(LARGE, GRPC, GRPC_UVLOOP),
        base=GRPC,
    ),
    "watch": Load(
        title="Server stream",
        about="One stream of small messages.",
        kind="watch",
        peers=(EVERYTHING, BARE, GRPC, GRPC_UVLOOP),
        base=GRPC,
    ),
    "chat": Load(
        title="Bidirectional stream",
        about="One stream of small messages, each answered.",
        kind="chat",
        peers=(EVERYTHING, BARE, GRPC, GRPC_UVLOOP),
        base=GRPC,
    ),
    "idle": Load(
        title="Idle connections",
        about="Memory (PSS) of a server for each of 1,000 connections that made one call.",
        kind="idle",
        callers=1000,
        peers=(BARE, HTTP, GRPC),
        base=GRPC,
    ),
    "pick": Load(
        title="Choosing a node",
        about="What a client does in each call to choose one of the nodes, by default.",
        kind="pick",
        peers=tuple(PICKED),
        base="3 nodes",
    ),
    "late": Load(
        title="Deadlines",
        about="How late 10,000 calls, 1,000 at a time, with a deadline of 0.5 s end when "
        "the server is stopped (SIGSTOP).",
        kind="late",
        callers=1000,
        peers=(EVERYTHING, HTTP, GRPC),
        base=GRPC,
    ),
}

for scheme, raw in REGISTRIES.items():
    for kind, (title, about) in ASKED.items():
        LOADS[f"{scheme}-{kind}"] = Load(
            title=f"Registry {scheme}: {title}",
            about=about,
            kind=kind,
            callers=16,
            peers=(_PLUGIN.format(scheme), raw),
            base=raw,
        )

_ALL = "native, everything on, 64 callers"

ROWS = (
    Row(what=f"{_ALL}: calls/s over grpc.aio", load="small", measure="calls_per_s",
        peer=EVERYTHING, base=GRPC, goal=18, floor=12),
    Row(what=f"{_ALL}: CPU of both sides over grpc.aio", load="small", measure="cpu_us",
        peer=EVERYTHING, base=GRPC, goal=1 / 35, floor=1 / 25, gates=True),
    Row(what="native, bare, 256 callers: calls/s over grpc.aio", load="many", measure="calls_per_s",
        peer=BARE, base=GRPC, goal=40, floor=25),
    Row(what="native, bare, 256 callers: calls/s over a naive uvloop echo", load="many",
        measure="calls_per_s", peer=BARE, base=ECHO, goal=1.1, floor=0.8),
    Row(what="native, one caller: p50 over grpc.aio", load="one", measure="p50_us",
        peer=EVERYTHING, base=GRPC, goal=1 / 6.5, floor=1 / 5),
    Row(what="native, one caller: p99 over grpc.aio", load="one", measure="p99_us",
        peer=EVERYTHING, base=GRPC, goal=1 / 3.5, floor=1 / 2.5),
    Row(what="Go Micro wire, 64 callers: calls/s over grpc.aio", load="small",
        measure="calls_per_s", peer=HTTP, base=GRPC, goal=15, floor=10),
    Row(what="Go Micro wire, 64 callers: calls/s over Go Micro's http form", load="small",
        measure="calls_per_s", peer=HTTP, base=GO_HTTP, goal=15, floor=10),
    Row(what="our http server under wrk: calls/s over Go Micro's server", load="wrk",
        measure="calls_per_s", peer=HTTP, base=GO_HTTP, goal=15, floor=8),
    Row(what="our http server under wrk: calls/s over Go's net/http + json", load="wrk",
        measure="calls_per_s", peer=HTTP, base=GO_PLAIN, goal=1.4, floor=0.9),
    Row(what=f"{_ALL}: calls/s over Go Micro's grpc plugin", load="small", measure="calls_per_s",
        peer=EVERYTHING, base=GO_GRPC, goal=1.8, floor=1.2),
    Row(what="native, bare, 64 callers: calls/s over Go Micro's grpc plugin", load="small",
        measure="calls_per_s", peer=BARE, base=GO_GRPC, goal=4, floor=2.5),
    Row(what="10 kB message, 64 callers: calls/s over grpc.aio", load="order",
        measure="calls_per_s", peer=EVERYTHING, base=GRPC, goal=4.5, floor=3),
    Row(what="16 MiB body: calls/s over grpc.aio", load="blob", measure="calls_per_s",
        peer=LARGE, base=GRPC, goal=2.5, floor=1.5),
    Row(what="server stream: messages/s over grpc.aio", load="watch", measure="calls_per_s",
        peer=EVERYTHING, base=GRPC, goal=28, floor=15),
    Row(what="bidirectional stream: messages/s over grpc.aio", load="chat", measure="calls_per_s",
        peer=EVERYTHING, base=GRPC, goal=30, floor=15),
    Row(what="memory of an idle connection over grpc.aio's", load="idle", measure="kib",
        peer=BARE, base=GRPC, goal=0.15, floor=0.3, gates=True),
    Row(what="start to serving over FastAPI + uvicorn: time", load="start", measure="wall_ms",
        peer=BARE, base=FASTAPI, goal=0.3, floor=0.4),
    Row(what="start to serving over FastAPI + uvicorn: CPU", load="start", measure="cpu_ms",
        peer=BARE, base=FASTAPI, goal=0.3, floor=0.4, gates=True),
    Row(what="import micro over import asyncio: time", load="import", measure="wall_ms",
        peer="import micro", base="import asyncio", goal=1.3, floor=1.5),
    Row(what="import micro over import asyncio: CPU", load="import", measure="cpu_ms",
        peer="import micro", base="import asyncio", goal=1.3, floor=1.5, gates=True),
    Row(what="pick from 10,000 nodes over pick from 3", load="pick", measure="pick_ns",
        peer="10,000 nodes", base="3 nodes", goal=1.2, floor=1.5, gates=True),
    Row(what="calls to a stopped server: p99.9 of how late they end, ms", load="late",
        measure="p999_ms", peer=EVERYTHING, base=None, goal=50, floor=50),
    *(
        Row(what=f"registry {scheme}, {title}: calls/s over its raw client",
            load=f"{scheme}-{kind}", measure="calls_per_s", peer=_PLUGIN.format(scheme),
            base=raw, goal=0.9, floor=0.8)
        for scheme, raw in REGISTRIES.items()
        for kind, (title, _) in ASKED.items()
    ),
)  # fmt: skip
