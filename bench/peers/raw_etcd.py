"""grpc.aio towards etcd, with the requests that the plugin makes, and nothing around them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from importlib import import_module
from typing import Any

import msgspec
from bench import registries
from bench.load import Job, Point
from bench.peer import main
from bench.registries import SERVICE, TTL, RegistryClient, Seen

from micro.registry import Node

# By name: peers are not installed where types are checked.
grpc: Any = import_module("grpc")
pb: Any = import_module("micro_plugin_etcd._etcd_pb2")

PREFIX = f"/micro/registry/{SERVICE}/".encode()
END = PREFIX[:-1] + b"0"
TIMEOUT = 5.0


class Raw(RegistryClient):
    def __init__(self, port: int) -> None:
        self._port = port
        self._leases: dict[str, int] = {}

    async def open(self) -> None:
        # Else it would share a connection with the one that makes the changes.
        alone = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{self._port}", options=alone)
        self._grant = self._method("Lease/LeaseGrant", pb.LeaseGrantResponse)
        self._keep = self._method("Lease/LeaseKeepAlive", pb.LeaseKeepAliveResponse)
        self._txn = self._method("KV/Txn", pb.TxnResponse)
        self._range = self._method("KV/Range", pb.RangeResponse)

    def _method(self, name: str, answer: Any) -> Any:
        return self._channel.unary_unary(
            f"/etcdserverpb.{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )

    async def beat(self, node: Node) -> None:
        lease = self._leases.get(node.id)
        if lease is None:
            made = await self._grant(pb.LeaseGrantRequest(TTL=int(TTL)), timeout=TIMEOUT)
            lease = self._leases[node.id] = made.ID
        else:
            request = pb.LeaseKeepAliveRequest(ID=lease)
            assert (await self._keep(request, timeout=TIMEOUT)).TTL > 0
        key, value = PREFIX + node.id.encode(), record(node)
        same = [
            pb.Compare(target=pb.Compare.LEASE, key=key, lease=lease),
            pb.Compare(target=pb.Compare.VALUE, key=key, value=value),
        ]
        put = pb.RequestOp(request_put=pb.PutRequest(key=key, value=value, lease=lease))
        await self._txn(pb.TxnRequest(compare=same, failure=[put]), timeout=TIMEOUT)

    async def get(self) -> list[str]:
        request = pb.RangeRequest(key=PREFIX, range_end=END)
        answer = await self._range(request, timeout=TIMEOUT)
        return [read(entry.value)["id"] for entry in answer.kvs]

    async def follow(self) -> AsyncIterator[list[Seen]]:
        now = await self._range(pb.RangeRequest(key=PREFIX, range_end=END), timeout=TIMEOUT)
        yield [seen(entry.value) for entry in now.kvs]
        stream = self._channel.stream_stream(
            "/etcdserverpb.Watch/Watch",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=pb.WatchResponse.FromString,
        )()
        create = pb.WatchCreateRequest(
            key=PREFIX,
            range_end=END,
            start_revision=now.header.revision + 1,
            prev_kv=True,
            fragment=True,
        )
        await stream.write(pb.WatchRequest(create_request=create))
        while True:
            answer = await stream.read()
            for event in answer.events:
                yield [seen(event.kv.value)]

    async def aclose(self) -> None:
        await self._channel.close()


def record(node: Node) -> bytes:
    """Go Micro's."""
    fields = ("request", "response", "metadata", "name")
    return msgspec.json.encode(
        {
            "name": node.service,
            "version": node.version,
            "metadata": None,
            "endpoints": [{name: getattr(one, name) for name in fields} for one in node.endpoints],
            "nodes": [{"metadata": node.metadata, "id": node.id, "address": node.address}],
        }
    )


def read(value: bytes) -> Any:
    return msgspec.json.decode(value)["nodes"][0]


def seen(value: bytes) -> Seen:
    one = read(value)
    return Seen(one["id"], one["metadata"]["change"])


async def call(job: Job) -> Point:
    return await registries.drive(job, Raw(job.port), Raw(job.port))


if __name__ == "__main__":
    main(registries.serve, call)
