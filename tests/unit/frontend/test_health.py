"""Tests of `dpshm.frontend.health`: what a front-end answers to a health check."""

from __future__ import annotations

import asyncio
import json
import math

import pytest

from dpshm import Coordinator, Engine, Frontend, SettingError, StartupTimeout, State
from tests.support import Remote, wait_until


def test_health_follows_the_group(group, using):
    """Guards against a health check that is good while no request can be routed, or cannot be serialised."""
    coordinator = using(Coordinator(group=group, dp_size=2, waves=False))
    frontend = using(Frontend.attach(group))
    expected = {
        "ok": False,
        "routable": [],
        "ranks": ["absent", "absent"],
        "coordinator": True,
        "linked": True,
    }
    wait_until(lambda: frontend.health().to_dict() == expected)  # a busy machine may hold its beat up
    using(Engine.attach(group, 0))
    remote = using(Remote())
    remote.run("engine = Engine.attach(group, 1)", group=group)
    health = frontend.health()
    assert (health.ok, health.routable, health.ranks) == (True, [0, 1], [State.IDLE, State.IDLE])
    coordinator.drain(0)
    assert frontend.health().routable == [1]
    remote.kill()
    wait_until(lambda: frontend.health().ranks == [State.DRAINED, State.DEAD])
    wait_until(lambda: not frontend.health().ok)  # 0.1 s later where the coordinator's beat was held up
    assert json.loads(json.dumps(frontend.health().to_dict()))["ranks"] == ["drained", "dead"]
    coordinator.close()
    wait_until(lambda: not frontend.health().coordinator)
    assert not frontend.health().linked


def test_a_server_waits_for_its_ranks(group, using):
    """Guards against a server that takes requests before its ranks are there, or waits for another server's."""
    using(Coordinator(group=group, dp_size=3, waves=False))
    frontend = using(Frontend.attach(group, ranks=[0, 2]))
    with pytest.raises(StartupTimeout, match=r"without a row: \[0, 2\]; 0 may be chosen"):
        asyncio.run(frontend.wait_ready(0.01))
    engines = [using(Engine.attach(group, 0))]
    asyncio.run(frontend.wait_ready(30, min_ranks=1))
    with pytest.raises(StartupTimeout, match=r"without a row: \[2\]; 1 may be chosen"):
        asyncio.run(frontend.wait_ready(0))
    with pytest.raises(SettingError, match="timeout_s is nan"):  # a wait that compares with it never ends
        asyncio.run(frontend.wait_ready(math.nan))

    async def attach_meanwhile():
        waiting = asyncio.create_task(frontend.wait_ready(30))
        await asyncio.sleep(0)
        engines.append(using(Engine.attach(group, 2)))
        await waiting

    asyncio.run(attach_meanwhile())
