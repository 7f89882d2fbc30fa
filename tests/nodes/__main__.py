"""``python -m tests.nodes [REQUESTS]``: the books of two nodes over many requests, with delay, loss and restarts.

Prints what was done and what was seen. It ends with 1 if a sum did not hold, or is not 0 at rest.
"""

from __future__ import annotations

import random
import sys
import time
from contextlib import ExitStack, closing

from tests.nodes.deployment import Deployment
from tests.nodes.machines import why_not
from tests.support import wait_until


def main(number: int, seed: int = 0) -> int:
    """Runs it."""
    if (reason := why_not()) is not None:
        print(reason)
        return 2
    rng = random.Random(seed)
    with ExitStack() as stack:
        deployment = Deployment(lambda x: stack.enter_context(closing(x)), delay_s=0.010, lost=0.02)
        began = time.monotonic()
        deployment.begin(number)
        cuts = connections = takeovers = 0
        next_takeover = began + 5
        while not deployment.frontend.ended():
            time.sleep(rng.uniform(0.1, 1.0))
            cuts += 1
            connections += deployment.rows.eval("link.cut()")
            if time.monotonic() >= next_takeover:
                next_takeover = time.monotonic() + rng.uniform(5, 10)
                deployment.coordinator.kill()
                deployment.start_coordinator()
                takeovers += 1
        told = deployment.finish()
        lasted = time.monotonic() - began
        print(
            f"{told.sent} requests in {lasted:.0f} s, 10 ms each way, 2 % of chunks 200 ms late, rows cut {cuts} "
            "times "
            f"({connections} connections), {takeovers} coordinators killed: the sum was read "
            f"{told.checked} times, wrong {len(told.wrong)} times {told.wrong or ''}"
        )
        nothing = [(0, 0, 0, 0)] * 2
        wait_until(lambda: deployment.at_rest() == nothing)
        print("at rest: nothing outstanding, nothing in flight, requests and tokens")
    return 1 if told.wrong else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000))
