"""``python -m tests.nodes [REQUESTS] [remote|relay]``: the books of two nodes, with delay, loss and restarts.

`remote`: a board and a front-end on one node, engines on the other. `relay`: a board, ranks and front-ends on
each. Without a word it does both. Prints what was done and what was seen. It ends with 1 if a sum did not hold, or
is not 0 at rest.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

from tests.nodes.deployment import Deployment
from tests.nodes.machines import why_not
from tests.nodes.relayed import FRONTENDS, RANKS, Relayed
from tests.nodes.traffic import TOKENS
from tests.support import wait_until

CONDITIONS = "10 ms each way, 2 % of chunks 200 ms late"


def cut_until(
    ended: Callable[[], bool], rng: random.Random, cut: Callable[[], int], kill: Callable[[], Any]
) -> str:
    """Cuts connections now and then, and kills a coordinator every 5 to 10 s; says how often."""
    cuts = connections = kills = 0
    next_kill = time.monotonic() + 5
    while not ended():
        time.sleep(rng.uniform(0.1, 1.0))
        cuts += 1
        connections += cut()
        if time.monotonic() >= next_kill:
            next_kill = time.monotonic() + rng.uniform(5, 10)
            kill()
            kills += 1
    return f"cut {cuts} times ({connections} connections), {kills} coordinators killed"


def remote(number: int, rng: random.Random, using: Callable[[Any], Any]) -> bool:
    """A board and a front-end on one node, engines on the other."""
    deployment = Deployment(using, delay_s=0.010, lost=0.02)
    began = time.monotonic()
    deployment.begin(number)

    def kill() -> None:
        deployment.coordinator.kill()
        deployment.start_coordinator()

    done = cut_until(deployment.frontend.ended, rng, lambda: deployment.rows.eval("link.cut()"), kill)
    told = deployment.finish()
    lasted = time.monotonic() - began
    print(
        f"remote: {told.sent} requests in {lasted:.0f} s, {CONDITIONS}, rows {done}: the sum was read "
        f"{told.checked} times, wrong {len(told.wrong)} times {told.wrong or ''}",
        flush=True,
    )
    nothing = [(0, 0, 0, 0)] * 2
    wait_until(lambda: deployment.at_rest() == nothing)
    print("at rest: nothing outstanding, nothing in flight, requests and tokens", flush=True)
    return not told.wrong


def relay(number: int, rng: random.Random, using: Callable[[Any], Any]) -> bool:
    """A board, two ranks and two front-ends on each node, and relays between the boards."""
    made = Relayed(using, delay_s=0.010, lost=0.02)
    began = time.monotonic()
    made.begin(number // FRONTENDS)
    done = cut_until(
        *(made.ended, rng, lambda: made.link.eval("link.cut()"), lambda: made.restart(rng.randrange(2)))
    )
    told = made.finish()
    lasted = time.monotonic() - began
    sent, wrong = sum(of.sent for of in told), [row for of in told for row in of.wrong]
    print(
        f"relay: {sent} requests of {FRONTENDS} front-ends at {RANKS} ranks in {lasted:.0f} s, {CONDITIONS}, "
        f"relays {done}: the sums were read {sum(of.checked for of in told)} times, wrong {len(wrong)} times "
        f"{wrong or ''}; the longest decision took {max(of.slowest_ms for of in told):.2f} ms of CPU "
        "(the collector's apart)",
        flush=True,
    )
    wait_until(made.at_rest)
    received = [made.received(list(range(RANKS)), node) for node in range(2)]
    print(f"at rest: nothing outstanding, nothing in flight on either board; received: {received}", flush=True)
    return not wrong and received == [(sent, sent * TOKENS)] * 2


def main(number: int, which: str = "", seed: int = 0) -> int:
    """Runs them."""
    if (reason := why_not()) is not None:
        print(reason)
        return 2
    good = True
    for run in (remote, relay):
        if which in ("", run.__name__):
            with ExitStack() as stack:
                good &= run(number, random.Random(seed), lambda x: stack.enter_context(closing(x)))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000, "".join(sys.argv[2:3])))
