"""Engines on another node: its network, its mounts and its /dev/shm are not those of the board."""

from __future__ import annotations

import json
import sys
import time

import pytest

from tests.nodes.deployment import Deployment
from tests.nodes.machines import needs_nodes
from tests.support import wait_until

pytestmark = [needs_nodes, pytest.mark.slow]

NOTHING = [(0, 0, 0, 0)] * 2


def stat(deployment):
    """What `dpshm stat --json` prints on the board's node."""
    told = deployment.nodes[0].command(
        *(sys.executable, "-m", "dpshm", "stat", "--json", "--group", deployment.group),
        env={"PATH": "/usr/bin:/bin:/usr/sbin"},
    )
    return json.loads(told.stdout)


def test_rows_cross_the_network_and_nothing_else_does(using):
    """Guards against a test of two nodes that share one /dev/shm, which sees nothing of what it tests."""
    deployment = Deployment(using)
    assert deployment.nodes[1].command("ls", "/dev/shm").stdout == ""
    assert "dpshm-nodes" in deployment.nodes[0].command("ls", "/dev/shm").stdout
    # Again and again: `dpshm stat` may take long, and a rank that has work and does not publish is silent.
    deployment.engines[1].begin("while not told(): engine.publish(waiting=3, running=4, prefill_backlog=50)")
    wait_until(lambda: [rank["waiting"] for rank in stat(deployment)["ranks"]] == [0, 3])
    wait_until(lambda: [rank["state"] for rank in stat(deployment)["ranks"]] == ["idle", "running"])


def test_a_cut_cable_makes_ranks_unknown_until_it_is_mended(using):
    """Guards against requests to ranks behind a cut cable, and against rows that stay old after it."""
    deployment = Deployment(using)
    deployment.cable.cut()
    wait_until(lambda: deployment.states() == ["unknown"] * 2)
    deployment.frontend.run(
        "try:\n    frontend.route()\n    found = True\nexcept NoEngineAvailable as e:\n    found = str(e)"
    )
    assert "0 unknown, 1 unknown" in deployment.frontend.eval("found")
    deployment.engines[0].run("engine.publish(waiting=1, running=2)")
    deployment.cable.mend()
    wait_until(lambda: deployment.states() == ["running", "idle"])
    assert deployment.frontend.eval("frontend.route().dp_rank") in (0, 1)


def test_the_books_balance_whatever_happens_to_rows(using):
    """Guards against a booking that is erased or doubled.

    10 ms each way, stalls, cut connections, a new coordinator. At each moment and for each rank: what is
    outstanding and what its row says has finished are together what was booked.
    """
    deployment = Deployment(using, delay_s=0.010, lost=0.05)
    deployment.begin(20_000)
    cut = 0
    for _ in range(4):
        time.sleep(0.4)
        cut += wait_until(lambda: deployment.rows.eval("link.cut()"))  # a busy machine connects late
    assert cut >= 4
    deployment.coordinator.kill()
    deployment.start_coordinator()
    told = deployment.finish()
    assert told.sent == 20_000
    assert told.checked > 50
    assert told.wrong == []
    wait_until(lambda: deployment.at_rest() == NOTHING)


def test_an_engine_that_is_killed_and_started_again(using):
    """Guards against bookings of a dead engine that stay, and a late message that brings its row back."""
    deployment = Deployment(using, delay_s=0.010)
    deployment.frontend.run("routes = [frontend.route(10, dp_rank=0, wake=False) for _ in range(5)]")
    deployment.engines[0].run("engine.publish(waiting=5, running=0)")
    deployment.engines[0].kill()
    deployment.start_engine(0)
    code = "coordinator.board.snapshot()[0][['incarnation', 'state', 'requests', 'in_flight']].item()"
    wait_until(lambda: deployment.coordinator.eval(code) == (2, "idle", 0, 0))
    wait_until(lambda: deployment.states() == ["idle", "idle"])
