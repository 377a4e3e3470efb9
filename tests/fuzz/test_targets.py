"""The corpus that fuzzing found, on every run; ``python3 dev.py fuzz`` looks for more."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from micro.errors import DecodeError

from .targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
#: Variations of each input.
_VARIED = 20


def inputs(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


@pytest.mark.parametrize("name", TARGETS)
def test_target_takes_its_corpus(name: str) -> None:
    given = inputs(name)
    assert given
    for data in given:
        TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
def test_target_takes_variations_of_its_corpus(name: str) -> None:
    """What a fuzzer does first: bytes changed, left out, doubled, cut off, and mixed."""
    given = inputs(name)
    for number, data in enumerate(given):
        chance = random.Random(f"{name} {number}")
        for _ in range(_VARIED if len(data) < 5000 else 2):
            TARGETS[name](varied(data, given, chance))


def varied(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(data) + 1)
        until = min(at + chance.choice((1, 2, 4, 16)), len(data))
        changed = bytes(chance.choice((0, 1, 255, chance.randrange(256))) for _ in data[at:until])
        other = chance.choice(others)
        data = chance.choice(
            (
                data[:at] + changed + data[until:],
                data[:at] + data[until:],
                data[:until] + data[at:],
                data[:at],
                data[:at] + other[chance.randrange(len(other) + 1) :],
            )
        )
    return data


def test_corpus_has_no_other_targets() -> None:
    assert {path.name for path in CORPUS.iterdir()} == TARGETS.keys()


@pytest.mark.parametrize("name", ["json", "msgpack", "protobuf", "record"])
def test_target_sees_an_error_that_is_not_promised(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a decoder raised something of a library."""
    monkeypatch.setattr("tests.fuzz.targets.DecodeError", type("Other", (DecodeError,), {}))
    with pytest.raises(DecodeError):
        TARGETS[name](b"\xff\xff nonsense")
