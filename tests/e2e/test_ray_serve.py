"""Ray Serve with the board's router, on a real local Ray: replicas, callers, and what happens when one dies.

Ray is too large for the environment of the other tests (`tests.e2e.own_environment`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from importlib.util import find_spec

import pytest

from dpshm import Board
from dpshm.board import files
from tests.e2e.own_environment import OwnEnvironment
from tests.support import wait_until

NEEDS = (
    "ray[serve]==2.60.0",
    "numpy",
    "pyzmq",
    "msgspec",
    "typer",
    "rich",
    "pytest",
    "pytest-timeout",
    "hypothesis",
)
ENVIRONMENT = OwnEnvironment(
    *("ray", "DPSHM_TEST_RAY", "DPSHM_RAY_ENV", NEEDS),
    imports="ray.serve, pytest_timeout, hypothesis, msgspec, zmq, typer",
)
HAS_RAY = find_spec("ray") is not None
needs_ray = pytest.mark.skipif(
    not HAS_RAY, reason="runs in an environment of its own: see test_in_an_environment_with_ray"
)
REPLICAS = 4
pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]


@pytest.mark.slow
@pytest.mark.skipif(HAS_RAY, reason="Ray is here: the tests below run by themselves")
def test_in_an_environment_with_ray():
    """Guards against tests of Ray Serve that never run because Ray is missing."""
    ENVIRONMENT.run(__file__)


class Model:
    """A replica: one request at a time, which takes as many milliseconds as it says."""

    def __init__(self):
        from dpshm.ray.replica import register

        self.rank = register(self).dp_rank
        self._free = asyncio.Lock()

    async def __call__(self, ms: int) -> tuple[int, int]:
        """Serves a request; the rank and the process that did."""
        async with self._free:
            await asyncio.sleep(ms / 1000)
        return self.rank, os.getpid()


def size(ms: int) -> int:
    """What the router counts."""
    return ms


@pytest.fixture(scope="module")
def model():
    """A handle of a deployment with the board's router."""
    import ray
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from dpshm.ray.board_actor import end_boards
    from dpshm.ray.router import BoardRouter

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        router = RequestRouterConfig(
            request_router_class=BoardRouter, request_router_kwargs={"cost": "tests.e2e.test_ray_serve:size"}
        )
        deployment = serve.deployment(
            num_replicas=REPLICAS,
            max_ongoing_requests=1000,
            ray_actor_options={"num_cpus": 0},
            health_check_period_s=1,
            request_router_config=router,
        )(Model)
        yield serve.run(deployment.bind(), route_prefix=None)
    finally:
        serve.shutdown()
        end_boards()
        ray.shutdown()


@pytest.fixture
def board(model):
    """The board of the deployment."""
    model.remote(0).result()  # the router has attached
    (group,) = (group for group in files.groups() if group.startswith("ray-Model-"))
    with Board.attach(group) as board:
        yield board


def at_rest(board):
    """Whether no booking is open."""
    return board.snapshot()["in_flight"].tolist() == [0] * board.dp_size


@needs_ray
def test_requests_go_to_the_least_work(model, board):
    """Guards against a router that does not know what it sent itself, or not how long it takes."""
    long = model.remote(2000)
    wait_until(lambda: not at_rest(board))
    short = [model.remote(10) for _ in range(30)]
    served = [response.result() for response in short]
    assert long.result()[0] not in {rank for rank, _ in served}
    assert {rank for rank, _ in served} | {long.result()[0]} == set(range(REPLICAS))
    wait_until(lambda: at_rest(board))


@needs_ray
def test_two_callers_see_each_other(model, board):
    """Guards against routers that each believe that they are alone."""
    import ray
    from ray import serve

    @ray.remote(num_cpus=0)
    class Caller:
        def __init__(self):
            self._handle = serve.get_app_handle("default")

        async def call(self, ms):
            return await self._handle.remote(ms)

    callers = [Caller.remote() for _ in range(2)]
    held = [callers[0].call.remote(3000)]
    for _ in range(REPLICAS - 2):
        before = sum(board.snapshot()["in_flight"])
        held.append(callers[len(held) % 2].call.remote(3000))
        wait_until(lambda before=before: sum(board.snapshot()["in_flight"]) > before)
    free = {ray.get(callers[1].call.remote(1))[0] for _ in range(5)}
    assert len(free) == 1
    assert free.isdisjoint(rank for rank, _ in ray.get(held))
    wait_until(lambda: at_rest(board))


@needs_ray
def test_the_board_actor_dies(model, board):
    """Guards against requests that fail or wait while the coordinator is gone, and one that does not come back."""
    pid, epoch = int(board.coordinator_pid[0]), int(board.epoch[0])
    os.kill(pid, signal.SIGKILL)
    assert len({model.remote(5).result()[0] for _ in range(40)}) == REPLICAS
    wait_until(lambda: board.epoch[0] > epoch and board.coordinator_alive())
    assert len({model.remote(5).result()[0] for _ in range(40)}) == REPLICAS
    wait_until(lambda: at_rest(board))


@needs_ray
def test_a_replica_dies(model, board):
    """Guards against requests for a dead replica, bookings that stay there, and a successor without a row."""
    from ray.exceptions import RayError

    rank, pid = model.remote(1).result()
    os.kill(pid, signal.SIGKILL)
    pids = set()
    deadline = time.monotonic() + 120
    while len(pids) < REPLICAS:
        try:
            _, now_pid = model.remote(20).result()
        except RayError:  # the one that was in flight
            continue
        assert now_pid != pid
        pids.add(now_pid)
        assert time.monotonic() < deadline, f"rank {rank} did not come back: {pids}"
    wait_until(lambda: at_rest(board))


@needs_ray
def test_a_cancelled_request_gives_its_booking_back(model, board):
    """Guards against a booking that outlives its caller."""
    response = model.remote(5000)
    wait_until(lambda: not at_rest(board))
    response.cancel()
    wait_until(lambda: at_rest(board))
