"""vLLM's Ray backend: the ranks are Ray actors, which get none of the launcher's environment but vLLM's own."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from dpshm.rules.waves import Phase
from tests.e2e.vllm import checks, environment
from tests.e2e.vllm.server import ENVIRONMENT, NO_MODEL, Server, free_port
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
