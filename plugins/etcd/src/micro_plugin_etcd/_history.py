"""What happened, and up to where it is known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from micro.errors import Gap
from micro_plugin_etcd import _etcd_pb2 as pb


class Witness(NamedTuple):
    """What a key held ``at`` a revision. A server that lost its data has something else there."""

    at: int
    key: bytes
    revision: int
    lease: int


class Mark(NamedTuple):
    """Up to where changes are known; without a witness nothing was there."""

    revision: int
    term: int
    witness: Witness | None


class Event(NamedTuple):
    """What happened to one key: its value, None when it was deleted, and the value before."""

    mark: Mark
    key: bytes
    now: bytes | None
    before: bytes | None


def events(answer: pb.WatchResponse, since: Mark) -> Iterator[Event]:
    """The events of an answer. A revision that is not whole yet is not yet the mark.

    Raises:
        Gap: a compaction has taken what the key held before.
    """
    revisions = [event.kv.mod_revision for event in answer.events]
    known = since.revision
    following = [*revisions[1:], revisions[-1] if answer.fragment else 0] if revisions else []
    for event, revision, after in zip(answer.events, revisions, following, strict=True):
        if revision <= known:
            continue
        if event.kv.version != 1 and not event.HasField("prev_kv"):
            raise Gap(f"etcd: what a key held before revision {revision} is compacted")
        is_put, term = event.type == pb.Event.PUT, answer.header.raft_term
        if after == revision:
            since = Mark(revision - 1, term, since.witness)
        elif is_put:
            since = Mark(revision, term, witness_of(revision, event.kv))
        else:
            since = Mark(revision, term, witness_of(revision - 1, event.prev_kv))
        yield Event(
            mark=since,
            key=event.kv.key,
            now=event.kv.value if is_put else None,
            before=event.prev_kv.value if event.HasField("prev_kv") else None,
        )


def witness_of(at: int, entry: pb.KeyValue) -> Witness:
    return Witness(at, entry.key, entry.mod_revision, entry.lease)
