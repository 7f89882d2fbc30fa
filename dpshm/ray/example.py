"""``python -m dpshm.ray.example``: eight replicas on a local Ray, and a thousand uneven requests by the board."""

from __future__ import annotations

import asyncio
import random
import time

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from dpshm.ray.board_actor import end_boards
from dpshm.ray.replica import register
from dpshm.ray.router import BoardRouter


def tokens(prompt: list[int]) -> int:
    """What the router counts for a request."""
    return len(prompt)


class Model:
    """Sleeps a tenth of a millisecond a token, one request at a time."""

    def __init__(self) -> None:
        register(self)
        self._free = asyncio.Lock()

    async def __call__(self, prompt: list[int]) -> int:
        """Serves a request."""
        async with self._free:
            await asyncio.sleep(len(prompt) * 1e-4)
        return len(prompt)


def main() -> None:
    """Runs it."""
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    router = RequestRouterConfig(
        request_router_class=BoardRouter, request_router_kwargs={"cost": "dpshm.ray.example:tokens"}
    )
    deployment = serve.deployment(num_replicas=8, max_ongoing_requests=100, request_router_config=router)(Model)
    model = serve.run(deployment.bind())
    began = time.perf_counter()
    sent = [model.remote([0] * int(random.expovariate(1 / 500))) for _ in range(1000)]
    served = sum(response.result() for response in sent)
    print(f"{served} tokens in {time.perf_counter() - began:.1f} s; see: dpshm stat")
    serve.shutdown()
    end_boards()


if __name__ == "__main__":
    main()
