"""A board on each of two nodes, and one coordinator of waves: `dpshm.coordinator.follower`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.nodes.machines import needs_nodes, two_nodes
from tests.support import RemoteError, wait_until

pytestmark = [needs_nodes, pytest.mark.slow]
GROUP = "nodes"
SETTINGS = {"group": GROUP, "dp_size": 4, "dp_size_local": 2, "balancing": "hybrid", "insecure": True}


class Hybrid:
    """Ranks 0 and 1 and the head on the first node, 2 and 3 and a follower on the second; a front-end on each."""

    def __init__(self, using, **settings) -> None:
        self._using = using
        *nodes, self.cable = two_nodes(using)
        self.nodes = nodes
        self.settings = SETTINGS | settings
        self.coordinators = [None, None]
        self.start(0, host=self.cable.addresses[0])
        self.start(1, head=self.coordinators[0].eval("coordinator.head_addresses"))
        self.engines = [using(self.nodes[rank // 2].process()) for rank in range(4)]
        for rank, engine in enumerate(self.engines):
            engine.run(f"engine = Engine.attach('{GROUP}', {rank})")
        self.frontends = [using(node.process()) for node in nodes]
        for node, frontend in enumerate(self.frontends):
            ranks = [2 * node, 2 * node + 1]
            frontend.run(f"frontend = Frontend.attach('{GROUP}', ranks={ranks}, policy='least_loaded')")

    def start(self, node, **settings):
        """Starts a node's coordinator, for the first time or again."""
        self.coordinators[node] = self._using(self.nodes[node].process())
        self.coordinators[node].run("coordinator = Coordinator(**settings)", settings=self.settings | settings)

    def states(self, node):
        """What a node's board says of each rank."""
        return self.coordinators[node].eval("coordinator.board.snapshot()['state'].tolist()")

    def waves(self):
        """Wave and phase on both boards."""
        return [c.eval("(coordinator.board.wave, coordinator.board.phase.name)") for c in self.coordinators]

    def running(self):
        """Which engines step."""
        return [engine.eval("engine.poll(5)") for engine in self.engines]


@pytest.fixture
def hybrid(using):
    """The two nodes, at rest."""
    made = Hybrid(using)
    for coordinator in made.coordinators:
        coordinator.run("coordinator.wait_ready(50)")
    return made


def test_one_wave_runs_over_both_nodes(hybrid):
    """Guards against ranks of another node that sleep while the others wait for them, in either direction."""
    for wave, node in enumerate((1, 0, 1)):
        assert hybrid.frontends[node].eval("frontend.route().dp_rank") // 2 == node
        wait_until(lambda: hybrid.running() == [True] * 4)
        wait_until(lambda: hybrid.waves() == [(wave, "RUNNING")] * 2)  # noqa: B023 - called in this turn
        for engine in hybrid.engines:
            engine.run("engine.wave_complete()")
        wait_until(lambda: hybrid.waves() == [(wave + 1, "PAUSED")] * 2)  # noqa: B023
    assert hybrid.coordinators[0].eval("coordinator.dropped") == {}
    assert hybrid.coordinators[1].eval("coordinator.dropped") == {}


def test_each_node_has_its_own_ranks_and_the_head_has_all(hybrid):
    """Guards against a node whose tools see nothing, and against a head that cannot repair the waves of all."""
    hybrid.engines[3].run("engine.publish(waiting=2, running=5)")
    wait_until(lambda: hybrid.states(0) == ["idle"] * 4)
    assert hybrid.states(1) == ["absent", "absent", "idle", "idle"]
    wait_until(lambda: hybrid.coordinators[0].eval("int(coordinator.board.snapshot()['running'][3])") == 5)
    stat = [sys.executable, "-m", "dpshm", "stat", "--json", "--group", GROUP]
    for node in hybrid.nodes:
        told = json.loads(node.command(*stat, env={"PATH": "/usr/bin:/bin"}).stdout)
        assert told["ranks"][3]["running"] == 5
    drain = [sys.executable, "-m", "dpshm", "drain", "3", "--no-wait", "--group", GROUP]
    hybrid.nodes[1].command(*drain, env={"PATH": "/usr/bin:/bin"})
    assert {hybrid.frontends[1].eval("frontend.route().dp_rank") for _ in range(4)} == {2}
    for node, rank in ((0, 2), (1, 0)):
        with pytest.raises(subprocess.CalledProcessError) as refused:
            hybrid.nodes[node].command(*drain[:4], str(rank), *drain[5:], env={"PATH": "/usr/bin:/bin"})
        assert f"run `dpshm drain {rank}`" in refused.value.stderr
        with pytest.raises(RemoteError, match=f"run `dpshm drain {rank}`"):
            hybrid.coordinators[node].run(f"coordinator.drain({rank})")


def test_a_node_that_loses_the_head_goes_on_routing(hybrid):
    """Guards against a node that stops serving because another one, or the cable to it, is gone."""
    hybrid.cable.cut()
    wait_until(lambda: hybrid.states(0)[2:] == ["unknown"] * 2)
    assert hybrid.states(1)[2:] == ["idle"] * 2
    assert {hybrid.frontends[1].eval("frontend.route(wake=False).dp_rank") for _ in range(2)} <= {2, 3}
    hybrid.cable.mend()
    wait_until(lambda: hybrid.states(0) == ["idle"] * 4)
    hybrid.frontends[1].run("frontend.wake()")
    wait_until(lambda: hybrid.running() == [True] * 4)


def test_either_coordinator_is_killed_and_replaced(hybrid):
    """Guards against a wave that none begins after a node's coordinator was replaced, and against a lost row."""
    hybrid.coordinators[1].kill()
    hybrid.start(1, head=hybrid.coordinators[0].eval("coordinator.head_addresses"))
    hybrid.coordinators[0].kill()
    hybrid.start(0, host=hybrid.cable.addresses[0])
    wait_until(lambda: hybrid.states(0) == ["idle"] * 4)
    hybrid.frontends[1].run("frontend.wake()")
    wait_until(lambda: hybrid.running() == [True] * 4)
    wait_until(lambda: hybrid.waves() == [(0, "RUNNING")] * 2)


def test_a_rank_of_the_other_node_dies(hybrid):
    """Guards against a dead rank that its own node routes to, or that the head believes to live."""
    hybrid.engines[2].kill()
    wait_until(lambda: hybrid.states(1)[2] == "dead")
    wait_until(lambda: hybrid.states(0)[2] == "unknown")
    assert {hybrid.frontends[1].eval("frontend.route(wake=False).dp_rank") for _ in range(4)} == {3}
    hybrid.engines[3].run("engine.close()")
    wait_until(lambda: hybrid.states(0)[3] == "absent")


@pytest.mark.parametrize("waves", [True, False])
def test_a_node_dies_with_all_its_processes_and_starts_anew(using, waves):
    """Guards against dead ranks that the head's board keeps as alive, and a node that cannot come back."""
    made = Hybrid(using, waves=waves)
    wait_until(lambda: made.states(0) == ["idle"] * 4)
    for process in (made.frontends[1], *made.engines[2:], made.coordinators[1]):
        process.kill()
    wait_until(lambda: made.states(0) == ["idle", "idle", "unknown", "unknown"])
    assert {made.frontends[0].eval("frontend.route(wake=False).dp_rank") for _ in range(2)} <= {0, 1}
    made.start(1, head=made.coordinators[0].eval("coordinator.head_addresses"))
    assert made.states(1) == ["absent"] * 4  # all that had the old board were dead: a new one
    assert made.states(0)[2:] == ["unknown"] * 2
    for rank in (2, 3):
        made.engines[rank] = using(made.nodes[1].process())
        made.engines[rank].run(f"engine = Engine.attach('{GROUP}', {rank})")
    wait_until(lambda: made.states(0) == ["idle"] * 4)
    assert made.states(1) == ["absent", "absent", "idle", "idle"]
    if waves:
        made.frontends[0].run("frontend.wake()")
        wait_until(lambda: made.running() == [True] * 4)


def test_a_head_needs_balancing_by_node(using):
    """Guards against a board on which bookings of the head's front-ends are missing, and no error says so."""
    nodes = two_nodes(using)
    process = using(nodes[0].process())
    with pytest.raises(RemoteError, match="balancing hybrid or external"):
        process.run("Coordinator(group='g', dp_size=2, head='tcp://a:1,tcp://a:2,tcp://a:3')")
