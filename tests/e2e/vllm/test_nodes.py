"""Internal load balancing over two nodes: a launcher on each, in namespaces of their own, and a real network.

The second launcher is headless: its ranks find no board, and send their rows to the coordinator.
"""

from __future__ import annotations

import json
import sys

import pytest

from tests.e2e.vllm import checks
from tests.e2e.vllm.server import NO_MODEL, Server
from tests.nodes.machines import needs_nodes, two_nodes
from tests.support import wait_until

pytestmark = needs_nodes
RPC_PORT = 29_777


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    """Both nodes and both launchers, the one with the API servers first."""
    from contextlib import ExitStack, closing

    with ExitStack() as stack:
        *nodes, cable = two_nodes(lambda x: stack.enter_context(closing(x)))
        common = ["--data-parallel-size", "4", "--data-parallel-size-local", "2", *NO_MODEL]
        common += ["--data-parallel-address", cable.addresses[0], "--data-parallel-rpc-port", str(RPC_PORT)]
        servers = []
        own = (["--api-server-count", "2"], ["--headless", "--data-parallel-start-rank", "2"])
        for node, address, arguments in zip(nodes, cable.addresses, own, strict=True):
            where = {"VLLM_HOST_IP": address, "GLOO_SOCKET_IFNAME": "eth0", "DPSHM_DIR": "/dev/shm"}
            folder = tmp_path_factory.mktemp("vllm")
            server = Server(folder, "moe", *common, *arguments, within=node.within, **where)
            stack.callback(server.stop)
            servers.append(server)
        try:
            nodes[0].call(servers[0].wait_ready)
        except AssertionError as e:
            raise AssertionError(f"{e}\n\nThe other node:\n{servers[1].log[-8000:]}") from None
        yield nodes, servers


def stat(node, group):
    """What `dpshm stat` prints on a node."""
    told = node.command(
        *(sys.executable, "-m", "dpshm", "stat", "--json", "--group", group),
        env={"PATH": "/usr/bin:/bin", "DPSHM_DIR": "/dev/shm"},
    )
    return json.loads(told.stdout)


def test_ranks_of_both_nodes_are_on_the_board(deployment):
    """Guards against ranks of another node that are stock ones to the board, whose bookings each report erases."""
    nodes, servers = deployment
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
    tokens = [rank["prompt_tokens"] for rank in after["ranks"]]
    assert sum(tokens) == sum(prompt for prompt, _ in checks.BURST)
    print(json.dumps(after["ranks"], indent=1))
