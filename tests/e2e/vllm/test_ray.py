"""vLLM's Ray backend: the ranks are Ray actors, which get none of the launcher's environment but vLLM's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import ExitStack, closing

import pytest

from dpshm.rules.waves import Phase
from tests.e2e.vllm import checks, environment
from tests.e2e.vllm.server import ENVIRONMENT, NO_MODEL, Server, free_port
from tests.e2e.vllm.test_nodes import stat
from tests.nodes.machines import needs_nodes
from tests.nodes.ray_cluster import Machines
from tests.support import wait_until

pytestmark = pytest.mark.skipif(
    os.environ.get("DPSHM_TEST_RAY") != "1",
    reason="Ray is too large to be installed unasked: DPSHM_TEST_RAY=1 runs this",
)
SITE = environment.ROOT / "tests" / "e2e" / "vllm" / "ray_site"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Ray of one node for these tests: (folder of the environment, the variables that lead to it, its host)."""
    where = environment.with_ray()
    python = str(where / "bin" / "python")
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("DPSHM", "VLLM", "RAY"))},
        **{k: v for k, v in os.environ.items() if k == "DPSHM_DIR"},  # vLLM gives actors none of dpshm's
        **ENVIRONMENT,
        "PYTHONPATH": f"{SITE}{os.pathsep}{environment.ROOT}",
        "RAY_AUTH_MODE": "disabled",
    }
    ask = "import ray; print(ray.util.get_node_ip_address())"
    host = subprocess.run([python, "-c", ask], env=env, capture_output=True, text=True, check=True).stdout.strip()
    port = free_port()
    command = [
        python,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        "--port",
        str(port),
        "--num-cpus",
        "4",
    ]
    command += ["--include-dashboard", "false", "--disable-usage-stats"]
    log = tmp_path_factory.mktemp("ray") / "log"
    with log.open("wb") as out:
        ray = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        wait_until(lambda: "Ray runtime started" in log.read_text(), 120)
        yield (
            where,
            {"RAY_ADDRESS": f"{host}:{port}", **{k: env[k] for k in ("PYTHONPATH", "RAY_AUTH_MODE")}},
            host,
        )
    finally:
        ray.send_signal(signal.SIGTERM)
        ray.wait(60)


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_actors_take_part(cluster, tmp_path, model):
    """Guards against ranks that Ray starts and that find no board: they would be stock engines."""
    where, env, host = cluster
    server = Server(
        tmp_path, model, *NO_MODEL,
        *("--data-parallel-backend", "ray", "--data-parallel-size", "2", "--data-parallel-size-local", "2"),
        *("--data-parallel-address", host, "--api-server-count", "2"),
        where=where, **env,
    )  # fmt: skip
    try:
        server.wait_ready()
        checks.answers_a_burst(server)
        with server.board() as board:
            wait_until(lambda: checks.is_idle(board) and (model == "dense" or board.phase is Phase.PAUSED))
            assert board.snapshot()["verdict"].tolist() == ["alive"] * 2
            assert int(board.requests_finished[:2].sum()) == len(checks.BURST)
            assert min(board.requests_finished[:2]) > 0
            assert (board.wave > 0) == (model == "moe")
    finally:
        server.stop()
    assert server.left() == []


@needs_nodes
def test_actors_on_another_machine_take_part(tmp_path):
    """Guards against an actor without a board that is a stock engine, and variables that do not reach it."""
    where = environment.with_ray()
    path = {"PYTHONPATH": f"{SITE}{os.pathsep}{environment.ROOT}", "RAY_AUTH_MODE": "disabled"}
    with ExitStack() as stack:
        machines = Machines(
            lambda x: stack.enter_context(closing(x)),
            tmp_path,
            str(where / "bin" / "python"),
            **ENVIRONMENT | path,
        )
        host, node = machines.hosts[0], machines.nodes[0]
        server = Server(
            tmp_path, "dense", *NO_MODEL,
            *("--data-parallel-backend", "ray", "--data-parallel-size", "2", "--data-parallel-size-local", "1"),
            *("--data-parallel-address", host, "--api-server-count", "2"),
            where=where, within=node.within, **path,
            RAY_ADDRESS=machines.address, VLLM_HOST_IP=host, GLOO_SOCKET_IFNAME="eth0",
            DPSHM_DIR="/dev/shm",
        )  # fmt: skip
        stack.callback(server.stop)
        node.call(server.wait_ready)
        assert server.log.count("does not pass DPSHM_DIR to Ray actors") == 1
        assert machines.nodes[1].command("ls", "/dev/shm").stdout.count("dpshm") == 0
        node.call(lambda: checks.answers_a_burst(server))
        wait_until(lambda: [rank["state"] for rank in stat(node, server.group)["ranks"]] == ["idle"] * 2)
        ranks = stat(node, server.group)["ranks"]
        assert [rank["stock"] for rank in ranks] == [False] * 2
        assert sum(rank["requests_finished"] for rank in ranks) == len(checks.BURST)
        assert min(rank["requests_finished"] for rank in ranks) > 0
        assert [rank["requests"] for rank in ranks] == [0] * 2
        print(json.dumps(ranks, indent=1))
