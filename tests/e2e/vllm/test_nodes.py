"""Real servers over two nodes: a launcher on each, in namespaces of their own, and a real network between them.

With internal load balancing the second launcher is headless: its ranks find no board, and send their rows to the
coordinator. With hybrid load balancing the second node gets a board of its own.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, closing

import pytest

from tests.e2e.vllm import checks
from tests.e2e.vllm.server import NO_MODEL, Server
from tests.nodes.machines import needs_nodes, two_nodes
from tests.support import wait_until

pytestmark = needs_nodes
RPC_PORT = 29_777


def start(stack, folder, common, own):
    """Two nodes with a launcher on each, once both serve."""
    *nodes, cable = two_nodes(lambda x: stack.enter_context(closing(x)))
    common = ["--data-parallel-size", "4", "--data-parallel-size-local", "2", *NO_MODEL, *common]
    common += ["--data-parallel-address", cable.addresses[0], "--data-parallel-rpc-port", str(RPC_PORT)]
    servers = []
    for node, address, arguments in zip(nodes, cable.addresses, own, strict=True):
        where = {"VLLM_HOST_IP": address, "GLOO_SOCKET_IFNAME": "eth0", "DPSHM_DIR": "/dev/shm"}
        server = Server(folder.mktemp("vllm"), "moe", *common, *arguments, within=node.within, **where)
        stack.callback(server.stop)
        servers.append(server)
    try:
        for node, server, arguments in zip(nodes, servers, own, strict=True):
            if "--headless" not in arguments:
                node.call(server.wait_ready)
    except AssertionError as e:
        raise AssertionError(f"{e}\n\nThe other node:\n{servers[1].log[-8000:]}") from None
    return nodes, servers


@pytest.fixture
def internal(tmp_path_factory):
    """API servers on the first node alone."""
    with ExitStack() as stack:
        own = (["--api-server-count", "2"], ["--headless", "--data-parallel-start-rank", "2"])
        yield start(stack, tmp_path_factory, [], own)


@pytest.fixture
def hybrid(tmp_path_factory):
    """Two API servers on each node, which choose among its ranks."""
    with ExitStack() as stack:
        own = (["--data-parallel-start-rank", "0"], ["--data-parallel-start-rank", "2"])
        yield start(stack, tmp_path_factory, ["--data-parallel-hybrid-lb"], own)


def stat(node, group):
    """What `dpshm stat` prints on a node."""
    told = node.command(
        *(sys.executable, "-m", "dpshm", "stat", "--json", "--group", group),
        env={"PATH": "/usr/bin:/bin", "DPSHM_DIR": "/dev/shm"},
    )
    return json.loads(told.stdout)


def test_ranks_of_both_nodes_are_on_the_board(internal):
    """Guards against ranks of another node that are stock ones to the board, whose bookings each report erases."""
    nodes, servers = internal
    assert servers[1].log.count("sends its row to tcp://10.77.0.1:") == 2
    assert nodes[1].command("ls", "/dev/shm").stdout.count("dpshm") == 0
    before = stat(nodes[0], servers[0].group)
    assert [rank["stock"] for rank in before["ranks"]] == [False] * 4
    nodes[0].call(lambda: checks.answers_a_burst(servers[0]))
    wait_until(lambda: all(r["state"] == "idle" for r in stat(nodes[0], servers[0].group)["ranks"]))
    after = stat(nodes[0], servers[0].group)
    finished = [rank["requests_finished"] for rank in after["ranks"]]
    assert sum(finished) == len(checks.BURST)
    assert min(finished) > 0
    for name in ("requests", "in_flight", "prefill_backlog"):
        assert [rank[name] for rank in after["ranks"]] == [0] * 4, name
    print(json.dumps(after["ranks"], indent=1))


def test_each_node_of_hybrid_balancing_has_a_board(hybrid):
    """Guards against a second node that routes by the broadcast, 100 ms old, and whose tools see nothing."""
    nodes, servers = hybrid
    assert servers[1].log.count("on this node follows the coordinator at tcp://10.77.0.1:") == 1
    for node, server, ranks in zip(nodes, servers, ((0, 1), (2, 3)), strict=True):
        assert server.log.count(f"to the board of group '{server.group}'") == 2
        assert server.log.count("chooses by the board") == 2
        node.call(lambda server=server: checks.answers_a_burst(server))

        def at_rest(node=node, server=server, ranks=ranks):
            told = stat(node, server.group)["ranks"]
            return all(told[rank]["state"] == "idle" for rank in ranks) and told

        told = wait_until(at_rest)
        assert sum(told[rank]["requests_finished"] for rank in ranks) == len(checks.BURST)
        assert [rank["requests"] for rank in told] == [0] * 4
        print(json.dumps(told, indent=1))
    told = stat(nodes[0], servers[0].group)["ranks"]
    assert sum(rank["requests_finished"] for rank in told) == 2 * len(checks.BURST)
    assert [rank["stock"] for rank in told] == [False] * 4
