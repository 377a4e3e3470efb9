"""What etcd does for us, in bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

from micro.errors import Closed, Gap, NotFound, OutOfRange, PermissionDenied, Unavailable
from micro_plugin_etcd import _etcd_pb2 as pb
from micro_plugin_etcd._channel import StaleToken, Stream
from micro_plugin_etcd._client import Client
from micro_plugin_etcd._history import Event, Mark, events, witness_of

#: Entries in one answer: at 64 KiB each they stay below what the client takes.
_PAGE = 256
#: A watch that says nothing for so many seconds is asked whether it lives, and again after each
#: of these: etcd leaves a question without an answer while it looks through its history.
_QUIET = 2.0
_ASKED = (0.5, 0.5, 1.0)


class Found(NamedTuple):
    """Entries under a prefix, key and value, as they were at one mark."""

    mark: Mark
    entries: list[tuple[bytes, bytes]]


class Etcd:
    """The calls that we make.

    Raises:
        Unavailable: no server answers in time. PermissionDenied, Unauthenticated: the user may
            not, or is not known. ResourceExhausted: the server is full.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._watches: set[Stream[pb.WatchResponse]] = set()

    def close(self) -> None:
        """End who watches; the client may have other users."""
        for stream in self._watches:
            stream.end(Closed(f"{self._client.name}: the registry was closed"))

    async def check(self, prefix: bytes) -> None:
        """Whether a server answers, and lets us read under ``prefix``.

        Raises:
            ConfigError: TLS is spoken where it should not be, or the other way, or not trusted.
        """
        request = pb.RangeRequest(key=prefix, range_end=_end(prefix), count_only=True)
        async with self._client.explaining_tls():
            await self._client.call("KV/Range", pb.RangeResponse, request)

    async def read(self, prefix: bytes) -> Found:
        """All entries under ``prefix``, as the leader has them."""
        entries: list[tuple[bytes, bytes]] = []
        newest = pb.KeyValue()
        request = pb.RangeRequest(key=prefix, range_end=_end(prefix), limit=_PAGE)
        while True:
            try:
                answer = await self._client.call("KV/Range", pb.RangeResponse, request)
            except OutOfRange as exc:
                raise Unavailable(f"{exc.detail}, while it was read; try again") from exc
            entries += [(entry.key, entry.value) for entry in answer.kvs]
            newest = max([newest, *answer.kvs], key=lambda entry: entry.mod_revision)
            request.revision = request.revision or answer.header.revision
            if not answer.more:
                witness = witness_of(request.revision, newest) if newest.key else None
                return Found(Mark(request.revision, answer.header.raft_term, witness), entries)
            request.key = answer.kvs[-1].key + b"\0"

    async def grant(self, ttl: int) -> tuple[int, int]:
        """A new lease and its time to live in seconds, which may be longer than ``ttl``."""
        request = pb.LeaseGrantRequest(TTL=ttl)
        answer = await self._client.call("Lease/LeaseGrant", pb.LeaseGrantResponse, request)
        return answer.ID, answer.TTL

    async def keep_alive(self, lease: int) -> bool:
        """Give a lease its whole time again; False when it is gone."""
        request = pb.LeaseKeepAliveRequest(ID=lease)
        # A stream for etcd; of one message each way it is a call.
        method, answer = "Lease/LeaseKeepAlive", pb.LeaseKeepAliveResponse
        return (await self._client.call(method, answer, request)).TTL > 0

    async def revoke(self, lease: int) -> None:
        """End a lease, and with it the entries under it."""
        with suppress(NotFound):
            request = pb.LeaseRevokeRequest(ID=lease)
            await self._client.call("Lease/LeaseRevoke", pb.LeaseRevokeResponse, request)

    async def ensure(self, key: bytes, value: bytes, lease: int) -> None:
        """Have ``key`` hold ``value`` under ``lease``; nobody is told when it does already.

        Raises:
            NotFound: the lease is gone.
            TooLarge: over what the server takes.
        """
        same = [
            pb.Compare(target=pb.Compare.LEASE, key=key, lease=lease),
            pb.Compare(target=pb.Compare.VALUE, key=key, value=value),
        ]
        put = pb.RequestOp(request_put=pb.PutRequest(key=key, value=value, lease=lease))
        request = pb.TxnRequest(compare=same, failure=[put])
        await self._client.call("KV/Txn", pb.TxnResponse, request)

    async def delete(self, key: bytes) -> None:
        """Delete ``key``; one that is not there is no error."""
        request = pb.DeleteRangeRequest(key=key)
        await self._client.call("KV/DeleteRange", pb.DeleteRangeResponse, request)

    async def check_mark(self, prefix: bytes, mark: Mark) -> None:
        """Whether the server has what came after ``mark``; a watch would tell it late, or not.

        Raises:
            Gap: it is compacted, or the server has another history.
        """
        witness = mark.witness
        if witness is None:
            request = pb.RangeRequest(key=prefix, range_end=_end(prefix), revision=mark.revision)
        else:
            request = pb.RangeRequest(key=witness.key, revision=witness.at)
        request.limit = 1
        try:
            answer = await self._client.call("KV/Range", pb.RangeResponse, request)
        except OutOfRange as exc:
            raise Gap(exc.detail) from exc
        self._check_header(answer.header, mark)
        if [witness_of(request.revision, entry) for entry in answer.kvs] != (
            [witness] if witness else []
        ):
            raise Gap(f"{self._client.name}: another history than at {mark.revision}: it lost data")

    async def watch(self, prefix: bytes, mark: Mark) -> AsyncGenerator[Event | None, None]:
        """Every event under ``prefix`` after ``mark``; None first, when the server has agreed.

        Raises:
            Gap: what came after the mark is compacted, or the server has less than the mark.
        """
        create = pb.WatchCreateRequest(
            key=prefix,
            range_end=_end(prefix),
            # Not the next one: until that comes, etcd would not answer whether the watch lives.
            start_revision=mark.revision,
            prev_kv=True,
            fragment=True,
        )
        async with self._watching() as stream:
            await stream.write(pb.WatchRequest(create_request=create), within=_QUIET)
            while True:
                answer = await stream.read()
                self._check_watch(answer, mark)
                if answer.created:
                    yield None
                for event in events(answer, mark):
                    mark = event.mark
                    yield event

    @asynccontextmanager
    async def _watching(self) -> AsyncIterator[Stream[pb.WatchResponse]]:
        async with self._client.stream("Watch/Watch", pb.WatchResponse) as stream:
            self._watches.add(stream)
            asking = asyncio.create_task(self._ask_the_silent(stream), name="micro.etcd watch")
            try:
                yield stream
            finally:
                self._watches.discard(stream)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)

    async def _ask_the_silent(self, stream: Stream[pb.WatchResponse]) -> None:
        """Have a watch end that does not live; one timer for all its messages."""
        while True:
            await asyncio.sleep(_QUIET - max(0.0, stream.silence))
            if stream.silence >= _QUIET and not await self._answers(stream):
                stream.end(Unavailable(f"{self._client.name}: the watch is silent"))
                return

    async def _answers(self, stream: Stream[pb.WatchResponse]) -> bool:
        for within in _ASKED:
            request = pb.WatchRequest(progress_request=pb.WatchProgressRequest())
            await stream.write(request, within=within)
            await asyncio.sleep(within)
            if stream.silence < _QUIET:
                return True
        return False

    def _check_watch(self, answer: pb.WatchResponse, mark: Mark) -> None:
        name = self._client.name
        if answer.compact_revision:
            raise Gap(f"{name}: changes before revision {answer.compact_revision} are compacted")
        if answer.canceled:
            kind = PermissionDenied if "permission denied" in answer.cancel_reason else StaleToken
            raise kind(f"{name}: watch refused: {answer.cancel_reason}")
        self._check_header(answer.header, mark)

    def _check_header(self, header: pb.ResponseHeader, mark: Mark) -> None:
        if header.revision < mark.revision or header.raft_term < mark.term:
            raise Gap(
                f"{self._client.name}: the server is at revision {header.revision} of term "
                f"{header.raft_term}, after {mark.revision} of {mark.term}: it lost data"
            )


def _end(prefix: bytes) -> bytes:
    """The first key after all that begin with ``prefix``."""
    return prefix[:-1] + bytes([prefix[-1] + 1])
