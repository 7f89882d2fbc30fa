"""Ray Serve with the board's router, on a real Ray cluster of two machines."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack, closing

import pytest

from tests.e2e.test_ray_serve import ENVIRONMENT, HAS_RAY, needs_ray
from tests.nodes.machines import needs_nodes
from tests.nodes.ray_cluster import REPLICAS_A_NODE, Cluster
from tests.support import wait_until

pytestmark = [needs_nodes, pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]
PATIENCE_S = 240.0


@pytest.mark.slow
@pytest.mark.skipif(HAS_RAY, reason="Ray is here: the tests below run by themselves")
def test_in_an_environment_with_ray():
    """Guards against tests of Ray over two machines that never run because Ray is missing."""
    ENVIRONMENT.run(__file__)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The cluster."""
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield Cluster(lambda x: stack.enter_context(closing(x)), tmp_path_factory.mktemp("ray"))


REPLICAS = 2 * REPLICAS_A_NODE


def rests(cluster):
    """Whether both boards have all replicas, and no booking is open."""
    return all(
        cluster.ranks(node, "state").count("idle") == REPLICAS and not any(cluster.ranks(node, "requests"))
        for node in range(2)
    )


@needs_ray
def test_each_machine_has_a_board_with_all_replicas(cluster):
    """Guards against replicas of one machine that the routers of the other one do not see."""
    for caller in cluster.callers:
        assert len(caller.call([1] * 10)) == 10
    wait_until(lambda: rests(cluster), PATIENCE_S)
    for node in range(2):
        assert len(cluster.stat(node)["ranks"]) == REPLICAS
        print(cluster.dpshm(node, "stat"))


@needs_ray
def test_callers_on_two_machines_see_each_other(cluster):
    """Guards against routers that each believe that they are alone: the third of four replicas is the free one."""
    one, other = cluster.callers
    one.begin([8000] * (REPLICAS - 1))
    wait_until(lambda: sum(map(bool, cluster.ranks(1, "requests"))) == REPLICAS - 1, PATIENCE_S)
    free = {rank for _, rank in other.call([1] * 5)}
    assert len(free) == 1
    assert free.isdisjoint(rank for _, rank in one.finish())
    wait_until(lambda: rests(cluster))


@needs_ray
def test_a_boards_actor_dies(cluster):
    """Guards against a relay that nobody starts again, and requests that fail or wait while there is none."""
    before = cluster.coordinator(1)
    os.kill(before[0], signal.SIGKILL)
    assert cluster.hosts[0] in {host for host, _ in cluster.callers[0].call([50] * 20)}
    wait_until(lambda: cluster.coordinator(1)[1] > before[1], PATIENCE_S)
    wait_until(lambda: rests(cluster), PATIENCE_S)
    assert {host for host, _ in cluster.callers[0].call([50] * 20)} == set(cluster.hosts)
    wait_until(lambda: rests(cluster))


@needs_ray
def test_a_cut_cable(cluster):
    """Guards against a router that waits for replicas behind a cut cable, or forgets them when it is mended."""
    cluster.cable.cut()
    try:
        for node in range(2):
            wait_until(lambda node=node: cluster.ranks(node, "state").count("unknown") == REPLICAS_A_NODE)
            assert {host for host, _ in cluster.callers[node].call([1] * 30)} == {cluster.hosts[node]}
    finally:
        cluster.cable.mend()
    wait_until(lambda: rests(cluster), PATIENCE_S)
    for caller in cluster.callers:
        assert {host for host, _ in caller.call([50] * 20)} == set(cluster.hosts)
    wait_until(lambda: rests(cluster))


@needs_ray
def test_a_machine_dies(cluster):
    """Guards against requests without answer and without error, and bookings that stay."""
    cluster.callers[0].begin([1000] * 40)
    wait_until(lambda: any(cluster.ranks(0, "requests")))
    cluster.kill(1)
    assert cluster.hosts[0] in {host for host, _ in cluster.callers[0].finish()}
    assert {host for host, _ in cluster.callers[0].call([1] * 40)} == {cluster.hosts[0]}
    wait_until(lambda: not any(cluster.ranks(0, "requests")))
    states = cluster.ranks(0, "state")
    assert (states.count("idle"), states.count("unknown")) == (REPLICAS_A_NODE, REPLICAS_A_NODE)
