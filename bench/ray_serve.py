"""``python -m bench ray``: Ray Serve's own router beside `dpshm.ray.router.BoardRouter`, in one run.

Two deployments of equal replicas live side by side, one with each router. A replica takes one request at a time,
and a request takes as long as its size says. The board's router is told the size (``cost``), as the length of a
prompt is known. Callers are processes with a handle of each deployment, and each draws its arrivals. A round loads
one deployment and then the other with the same arrivals, in changing order.

Needs ``pip install 'dpshm[ray,bench]'``. Ray and all replicas share this machine; replicas sleep.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from typing import Any

import numpy as np

ARMS = ("ray", "board")
SIGMA = 1.0
LOAD = 0.8


def sizes_ms(generator: np.random.Generator, mean_ms: float, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Service times: lognormal, at most 30 times the mean."""
    drawn = generator.lognormal(-SIGMA * SIGMA / 2, SIGMA, count)
    return np.minimum(drawn, 30) * mean_ms


def cost(size_ms: float) -> int:
    """What the router is told of a request: its length in tokens, a tenth of a millisecond each."""
    return max(1, round(size_ms * 10))


class Model:
    """A replica: one request at a time, first come, first served."""

    def __init__(self, arm: str) -> None:
        if arm == "board":
            from dpshm.ray.replica import register

            register(self)
        self._free = asyncio.Lock()

    async def __call__(self, size_ms: float) -> None:
        """Serves a request."""
        async with self._free:
            await asyncio.sleep(size_ms / 1000)


class Caller:
    """A process that sends. Both arms get the same arrivals in one round."""

    def __init__(self) -> None:
        from ray import serve

        self._handles = {arm: serve.get_app_handle(arm) for arm in ARMS}

    async def load(self, arm: str, seed: int, rate: float, mean_ms: float, seconds: float) -> list[float]:
        """The latency of each request, ms, in order of arrival."""
        generator = np.random.default_rng(seed)
        count = round(rate * seconds)
        at = np.cumsum(generator.exponential(1 / rate, count))
        sizes = sizes_ms(generator, mean_ms, count)
        began = time.perf_counter()

        async def one(due: float, size_ms: float) -> float:
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            await self._handles[arm].remote(size_ms)
            return (time.perf_counter() - began - due) * 1000

        return await asyncio.gather(*(one(float(t), float(size)) for t, size in zip(at, sizes, strict=True)))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole comparison, on a local Ray."""
    import ray
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from dpshm.ray.board_actor import end_boards
    from dpshm.ray.router import BoardRouter

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        routers = {
            "ray": RequestRouterConfig(),
            "board": RequestRouterConfig(
                request_router_class=BoardRouter, request_router_kwargs={"cost": "bench.ray_serve:cost"}
            ),
        }
        deployment = serve.deployment(
            num_replicas=options.replicas, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}
        )(Model)
        for arm in ARMS:
            chosen = deployment.options(request_router_config=routers[arm])
            serve.run(chosen.bind(arm), name=arm, route_prefix=None)
            print(f"{options.replicas} replicas of {arm} are there", file=sys.stderr, flush=True)
        actor = ray.remote(num_cpus=0)(Caller)
        callers = [actor.remote() for _ in range(options.callers)]
        rounds = [_round(ray, callers, number, options) for number in range(-1, options.rounds)]
        return {
            "ray": ray.__version__,
            "replicas": options.replicas,
            "callers": options.callers,
            "mean_ms": options.mean_ms,
            "rounds": rounds[1:],
        }
    finally:
        serve.shutdown()
        end_boards()
        ray.shutdown()


def _round(ray: Any, callers: list[Any], number: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """One round; round -1 warms up."""
    mean_ms = options.mean_ms
    rate = LOAD * options.replicas / (mean_ms / 1000) / len(callers)
    measured = {}
    for arm in ARMS if number % 2 else ARMS[::-1]:
        seconds = options.seconds if number >= 0 else 3.0
        seeds = [1000 * (number + 1) + i for i in range(len(callers))]
        refs = [c.load.remote(arm, seed, rate, mean_ms, seconds) for c, seed in zip(callers, seeds, strict=True)]
        latencies = np.concatenate(ray.get(refs))
        measured[arm] = {
            "requests": len(latencies),
            "mean_ms": float(latencies.mean()),
            "p50_ms": float(np.percentile(latencies, 50)),
            "p99_ms": float(np.percentile(latencies, 99)),
        }
        print(f"round {number + 1}, {arm}: {measured[arm]}", file=sys.stderr, flush=True)
    return measured


def table(result: dict[str, Any]) -> str:
    """For people: each arm's medians over the rounds, and the ratio within rounds with its range."""
    lines = [f"{'':8} {'mean ms':>9} {'p50 ms':>9} {'p99 ms':>9}"]
    rounds = result["rounds"]
    for arm in ARMS:
        cells = (f"{np.median([r[arm][name] for r in rounds]):9.1f}" for name in ("mean_ms", "p50_ms", "p99_ms"))
        lines.append(f"{arm:8} {' '.join(cells)}")
    ratios = []
    for name in ("mean_ms", "p50_ms", "p99_ms"):
        each = [r["board"][name] / r["ray"][name] for r in rounds]
        ratios.append(f"{np.median(each):.2f} ({min(each):.2f} to {max(each):.2f})")
    lines.append(f"ratio    mean {ratios[0]}, p50 {ratios[1]}, p99 {ratios[2]}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser("python -m bench ray", description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=8, help="of each deployment (8)")
    parser.add_argument("--callers", type=int, default=4, help="processes that send (4)")
    parser.add_argument(
        "--mean-ms",
        type=float,
        default=250.0,
        help="a request's mean service time (250): short ones cost more CPU",
    )
    parser.add_argument("--rounds", type=int, default=3, help="(3)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load an arm and round (60)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and no table")
    options = parser.parse_args(argv)
    result = run(options)
    print(json.dumps(result) if options.json else table(result))
    return 0
