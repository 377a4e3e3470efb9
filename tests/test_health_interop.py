"""``micro health`` and ``micro bench`` on a fleet that has an unmodified Go Micro service in it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.interop.gophers import Gopher
from tests.interop.ours import caller, new_name, our_service

from micro.testing import eventually

PATIENCE = 30
#: The Go program has no handler Debug.
SAYS_NO_MORE = "answers, and has no Debug.Health to say more"


def micro(*words: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "micro", *words, "--json"],
        text=True,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.asyncio
async def test_health_and_bench_take_nodes_of_go_as_ours(gomicro_binary: Path) -> None:
    name = new_name()
    with Gopher(gomicro_binary, name):
        async with our_service(name), caller(name) as (_, watch):
            await eventually(lambda: len(watch.nodes) == 2, within=10)
            told = await asyncio.to_thread(micro, "health", name)
            assert [node["healthy"] for node in told["nodes"]] == [True, True]
            assert sorted(node["detail"] for node in told["nodes"]) == ["", SAYS_NO_MORE]
            request = '{"name": "Alice"}'
            words = (name, "Helloworld.Call", request, "-c", "4", "-d", "300ms")
            told = await asyncio.to_thread(micro, "bench", *words)
            assert (told["failed"], told["calls"] > 0) == (0, True)
