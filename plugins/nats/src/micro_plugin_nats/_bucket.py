"""A key-value bucket of JetStream, as far as a registry needs it.

Source: https://github.com/nats-io/nats-architecture-and-design, ADR-8 (KV) and
ADR-43 (time to live of a message).
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, NamedTuple
from uuid import uuid4

from micro.errors import AlreadyExists, ConfigError, MicroError, NotFound, Unsupported
from micro_plugin_nats import _api
from micro_plugin_nats._client import Client
from micro_plugin_nats._link import Link
from micro_plugin_nats._stream import Entry, Stream

_SECOND = 1_000_000_000
#: Seconds for which the server remembers that a key was deleted, so that who follows hears of it.
_MARKER = 10
#: Seconds between two signs of life of a stream, and of one that is read once.
_HEARTBEAT = 2.0
_READ_HEARTBEAT = 0.5
#: Seconds after which the server gives up a stream that nobody listens to.
_FORGOTTEN = 5


class Settings(NamedTuple):
    """Whether each entry has a time to live of its own; the seconds that none outlives, or 0."""

    each: bool
    longest: float


class Bucket:
    """The bucket ``name``, which is made where there is none."""

    def __init__(self, client: Client, name: str, ttl: float) -> None:
        self.settings: Settings = Settings(each=True, longest=0)
        self._client = client
        self._name = name
        self._stream = f"KV_{name}"
        self._prefix = f"$KV.{name}."
        self._ttl = math.ceil(ttl)
        self._streams: set[Stream] = set()

    def close(self, error: MicroError) -> None:
        """End all who follow."""
        for stream in tuple(self._streams):
            stream.end(error)

    async def ensure(self) -> None:
        """Have the bucket, and know its settings.

        Raises:
            ConfigError: there is one that cannot hold nodes.
            PermissionDenied: there is none, and the user may not make it.
        """
        async with self._client.call() as link:
            await self._ensure(link)

    async def put(self, key: str, value: bytes, ttl: float) -> None:
        """Keep ``value`` for ``ttl`` seconds.

        Raises:
            Unsupported: the bucket does not keep it that long, or much longer.
            TooLarge: over what the server takes.
        """
        async with self._client.call() as link:
            try:
                await self._store(link, key, value, self._lifetime(ttl))
            except NotFound:
                await self._ensure(link)
                await self._store(link, key, value, self._lifetime(ttl))

    async def delete(self, key: str) -> None:
        """Delete ``key``; one that is not there is no error."""
        headers = {"KV-Operation": "PURGE", "Nats-Rollup": "sub"}
        if self.settings.each:
            headers["Nats-TTL"] = str(_MARKER)
        async with self._client.call() as link:
            try:
                await self._store(link, key, b"", headers)
            except NotFound:
                await self._ensure(link)

    async def read(self, pattern: str) -> list[Entry]:
        """All entries whose keys fit ``pattern``."""
        async with (
            self._client.call() as link,
            self._streamed(link, pattern, _READ_HEARTBEAT) as stream,
        ):
            return await stream.first()

    @asynccontextmanager
    async def watching(self, pattern: str) -> AsyncIterator[tuple[list[Entry], Stream]]:
        """All entries whose keys fit, and the stream of what changes from then on."""
        async with AsyncExitStack() as stack:
            async with self._client.call() as link:
                stream = await stack.enter_async_context(self._streamed(link, pattern, _HEARTBEAT))
                entries = await stream.first()
            yield entries, stream

    # -- the API of JetStream

    async def _ensure(self, link: Link) -> None:
        try:
            said = await _api.ask(link, f"STREAM.INFO.{self._stream}")
        except NotFound:
            said = await self._make(link)
        self.settings = self._checked(said["config"])

    async def _make(self, link: Link) -> dict[str, Any]:
        level = (await _api.ask(link, "INFO")).get("api", {}).get("level", 0)
        config: dict[str, object] = {
            "name": self._stream,
            "description": "nodes of micro",
            "subjects": [f"{self._prefix}>"],
            "retention": "limits",
            "max_consumers": -1,
            "max_msgs": -1,
            "max_bytes": -1,
            "max_msg_size": -1,
            "max_msgs_per_subject": 1,
            "discard": "new",
            "storage": "file",
            "num_replicas": 1,
            "allow_rollup_hdrs": True,
            "allow_direct": True,
            "deny_delete": True,
        }
        if level:
            config |= {"allow_msg_ttl": True, "subject_delete_marker_ttl": _MARKER * _SECOND}
        else:
            config["max_age"] = self._ttl * _SECOND
            config["duplicate_window"] = min(120, self._ttl) * _SECOND
        try:
            return await _api.ask(link, f"STREAM.CREATE.{self._stream}", config)
        except AlreadyExists:  # somebody was quicker, with settings of their own
            return await _api.ask(link, f"STREAM.INFO.{self._stream}")

    def _checked(self, config: dict[str, Any]) -> Settings:
        longest = config.get("max_age", 0) / _SECOND
        each = bool(config.get("allow_msg_ttl"))
        why = ""
        if not config.get("allow_rollup_hdrs"):
            why = "entries cannot be deleted (allow_rollup_hdrs)"
        elif each and not config.get("subject_delete_marker_ttl"):
            why = "nobody is told of what expires (limit_marker_ttl)"
        elif not each and not longest:
            why = "entries live for ever (ttl, or limit_marker_ttl)"
        if why:
            raise ConfigError(
                f"{self._client.name}: bucket {self._name!r} was not made for nodes: {why}; "
                "name another with bucket=, which is made, or delete this one"
            )
        return Settings(each, longest)

    def _lifetime(self, ttl: float) -> dict[str, str]:
        each, longest = self.settings
        if longest and not (ttl <= longest and (each or longest <= 2 * ttl)):
            least = 0 if each else longest / 2
            raise Unsupported(
                f"nats-kv: a time to live of {ttl:g} s: bucket {self._name!r} keeps entries for "
                f"{longest:g} s; set register_ttl between {least:g} s and {longest:g} s, or make "
                "another bucket, on a server of 2.11 or later if each is to have its own"
            )
        return {"Nats-TTL": str(math.ceil(ttl))} if each else {}

    async def _store(self, link: Link, key: str, value: bytes, headers: dict[str, str]) -> None:
        await _api.store(link, f"{self._prefix}{key}", value, headers)

    # -- streams

    @asynccontextmanager
    async def _streamed(self, link: Link, pattern: str, heartbeat: float) -> AsyncIterator[Stream]:
        """What stands under the keys that fit, and all that comes to stand there."""
        stream = Stream(link.where, len(self._prefix))
        name = uuid4().hex
        config: dict[str, object] = {
            "name": name,
            "deliver_subject": f"_INBOX.{name}",
            "deliver_policy": "last_per_subject",
            "ack_policy": "none",
            "max_deliver": 1,
            "filter_subject": f"{self._prefix}{pattern}",
            "replay_policy": "instant",
            "idle_heartbeat": int(heartbeat * _SECOND),
            "inactive_threshold": _FORGOTTEN * _SECOND,
            "num_replicas": 1,
            "mem_storage": True,
        }
        async with link.listening(f"_INBOX.{name}", stream.take, stream.end):
            self._streams.add(stream)
            try:
                said = await self._consume(link, config)
                stream.expect(said["delivered"]["consumer_seq"] + said["num_pending"])
                yield stream
            finally:
                self._streams.discard(stream)
                with suppress(MicroError):  # it has ended, or the server forgets it by itself
                    await link.publish(f"$JS.API.CONSUMER.DELETE.{self._stream}.{name}", b"")

    async def _consume(self, link: Link, config: dict[str, object]) -> dict[str, Any]:
        request = {"stream_name": self._stream, "config": config}
        subject = f"{self._stream}.{config['name']}.{config['filter_subject']}"
        try:
            return await _api.ask(link, f"CONSUMER.CREATE.{subject}", request)
        except NotFound:
            await self._ensure(link)
            return await _api.ask(link, f"CONSUMER.CREATE.{subject}", request)
