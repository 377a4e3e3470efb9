"""nats-py's key-value buckets, used as the plugin uses one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from importlib import import_module
from typing import Any
from uuid import uuid4

from bench import registries
from bench.load import Job, Point
from bench.peer import main
from bench.peers.raw_etcd import read, record, seen
from bench.registries import SERVICE, TTL, RegistryClient, Seen

from micro.registry import Node

# By name: peers are not installed where types are checked.
nats: Any = import_module("nats")
api: Any = import_module("nats.js.api")
errors: Any = import_module("nats.js.errors")

#: The plugin's default, and where it keeps what has no namespace.
BUCKET, PREFIX = "micro-registry", f"=.{SERVICE}."


class Raw(RegistryClient):
    def __init__(self, port: int) -> None:
        self._url = f"nats://127.0.0.1:{port}"

    async def open(self) -> None:
        self._nats = await nats.connect(self._url)
        self._js = self._nats.jetstream()
        try:
            self._bucket = await self._js.key_value(BUCKET)
        except errors.BucketNotFoundError:
            config = api.KeyValueConfig(bucket=BUCKET, limit_marker_ttl=10)
            self._bucket = await self._js.create_key_value(config)

    async def beat(self, node: Node) -> None:
        subject = f"$KV.{BUCKET}.{PREFIX}{node.id}"
        await self._js.publish(subject, record(node), headers={"Nats-TTL": f"{TTL:g}"})

    async def get(self) -> list[str]:
        name, inbox = uuid4().hex, self._nats.new_inbox()
        messages = await self._nats.subscribe(inbox)
        config = api.ConsumerConfig(
            name=name,
            deliver_subject=inbox,
            deliver_policy=api.DeliverPolicy.LAST_PER_SUBJECT,
            ack_policy=api.AckPolicy.NONE,
            filter_subject=f"$KV.{BUCKET}.{PREFIX}*",
            inactive_threshold=5,
            num_replicas=1,
            mem_storage=True,
        )
        made = await self._js.add_consumer(f"KV_{BUCKET}", config)
        count = made.num_pending + made.delivered.consumer_seq
        found = [read((await messages.next_msg()).data)["id"] for _ in range(count)]
        await messages.unsubscribe()
        await self._nats.publish(f"$JS.API.CONSUMER.DELETE.KV_{BUCKET}.{name}")
        return found

    async def follow(self) -> AsyncIterator[list[Seen]]:
        watcher = await self._bucket.watch(f"{PREFIX}*")
        while True:
            entry = await watcher.updates(timeout=60)
            yield [seen(entry.value)] if entry is not None else []

    async def aclose(self) -> None:
        await self._nats.close()


async def call(job: Job) -> Point:
    return await registries.drive(job, Raw(job.port), Raw(job.port))


if __name__ == "__main__":
    main(registries.serve, call)
