"""Many nodes come and go while their registry's server fails: watches soon say what reads say."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.faults.backends import BACKENDS, SLACK, Backend, each
from tests.faults.churn import Bounds, Churn, Plan
from tests.faults.conftest import FIGURES, SEED
from tests.faults.faults import Fault
from tests.faults.observers import Journal
from tests.faults.world import real

from micro import follow
from micro.testing.servers import EtcdServer

#: As many nodes as a plan has, and their time to live; a sample has fewer, with as many heartbeats.
FULL, SAMPLE = (200, 18.0), (64, 6.0)
#: Seconds in which one process registers them all anew, while others have the machine's cores, too.
BACK = 30.0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "run" in metafunc.fixturenames:
        config = metafunc.config
        runs = config.getoption("--seeds", None) or (5 if config.getoption("--full", False) else 1)
        metafunc.parametrize("run", range(runs))


@each
@pytest.mark.asyncio
@pytest.mark.timeout(180)
async def test_churn(
    request: pytest.FixtureRequest, tmp_path: Path, full: bool, backend: Backend, run: int
) -> None:
    seed = request.config.stash[SEED] + run
    plan = planned(seed, backend, full=full)
    options = f"--seed {seed} --seeds 1{' --full' if full else ''}"
    journal = Journal(f"repeat it by: {options} -k 'churn and {backend.scheme}'")
    server = backend.made(request, tmp_path / backend.program)
    bounds = Bounds(agree=backend.agrees, back=BACK, silence=backend.silence, slack=SLACK)
    try:
        async with real(backend, server, journal, seed) as world:
            churn = Churn(world, plan, bounds, journal)
            await churn.run()
    except Exception as exc:  # whatever it is, what led to it is told
        exc.add_note(journal.text)
        raise
    figures = (
        f"{backend.scheme}: {len(plan.outages)} outages, {churn.changes} changes, "
        f"no difference for more than {churn.slowest:.2f} s"
    )
    request.node.user_properties.append((FIGURES, figures))


@pytest.mark.full
@pytest.mark.asyncio
@pytest.mark.timeout(120)
async def test_finds_a_view_that_keeps_its_mark_after_a_gap(
    etcd_binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(Exception): ...

    monkeypatch.setattr(follow, "Gap", Other)
    journal, server = Journal(""), EtcdServer(etcd_binary, tmp_path)
    plan = Plan(1, 16, rate=0.0, ttl=6.0, calm=0.5, outages=((Fault("lose data", 0.5),),))
    async with real(BACKENDS["etcd"], server, journal, 1) as world:
        with pytest.raises(AssertionError, match="is stale"):
            await Churn(world, plan, Bounds(), journal).run()


def planned(seed: int, backend: Backend, *, full: bool) -> Plan:
    """Each kind of fault; a sample has two of them."""
    chance = random.Random(f"{backend.scheme} {seed}")
    faults = [
        Fault("kill", chance.uniform(0.1, 3)),
        Fault("pause", chance.choice([1, backend.silence + SLACK + 1]) if full else 1),
        Fault("lose data", chance.uniform(0.1, 2)),
        Fault(chance.choice(["refuse", "blackhole"]), chance.uniform(1, 5), "callers"),
        Fault(chance.choice(["refuse", "blackhole"]), chance.uniform(1, 5), "nodes"),
    ]
    chance.shuffle(faults)
    chosen = faults if full else faults[:2]
    nodes, ttl = FULL if full else SAMPLE
    outages = tuple((fault,) for fault in chosen)
    return Plan(seed, nodes, rate=10.0, ttl=ttl, calm=1.0, outages=outages)
