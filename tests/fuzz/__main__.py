"""``python -m tests.fuzz``: hostile messages to every socket of a real coordinator, which has to stay alive.

The coordinator is a process of its own. A round sends messages to its three sockets through ZMQ, and rubbish over
plain connections; then a whole wave has to go round between honest engines and a front-end. Exit status 1 if it
does not, if the process ended or grew without bound, or if it logged an error of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from random import Random
from typing import Any

import zmq

from dpshm import Board, CoordinatorProcess
from dpshm.coordinator.flood_guard import MAX_GROWTH_BYTES
from tests.fuzz.messages import frames
from tests.hostile import Honest, dial, frame, resident_bytes, send_while_taken
from tests.support import wait_until

ROUND = 10_000
"""Messages between two looks whether all is well."""
RAW = 10
"""Plain connections a round."""
KINDS = (b"XSUB", b"XSUB", b"PUSH")


def main(argv: list[str]) -> int:
    """Runs what the command line says; gives the exit status."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--messages", type=int, default=1_000_000, help="how many (1000000)")
    parser.add_argument("--seed", type=int, default=0, help="of the messages (0)")
    parser.add_argument("--json", action="store_true", help="print the result for machines")
    options = parser.parse_args(argv)
    group = f"fuzz{os.getpid()}"
    with tempfile.TemporaryFile() as log:
        stderr = os.dup(2)
        os.dup2(log.fileno(), 2)  # the coordinator's log, which it inherits
        try:
            with CoordinatorProcess(group=group, dp_size=2) as coordinator:
                os.dup2(stderr, 2)
                result = fuzz(coordinator, group, options.messages, options.seed)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        log.seek(0)
        errors = [line for line in log.read().decode(errors="replace").splitlines() if _is_error(line)]
    result["errors_logged"] = errors[:5]
    result["fine"] = not errors and result["grown_bytes"] < MAX_GROWTH_BYTES
    print(
        json.dumps(result) if options.json else "\n".join(f"{name:18} {value}" for name, value in result.items())
    )
    return 0 if result["fine"] else 1


def fuzz(coordinator: CoordinatorProcess, group: str, messages: int, seed: int) -> dict[str, Any]:
    """Sends so many messages and more; what came of it."""
    rng = Random(seed)
    addresses = (coordinator.stats_publish_address, *coordinator.engine_addresses)
    context = zmq.Context()
    sockets = [context.socket(kind) for kind in (zmq.XSUB, zmq.XSUB, zmq.PUSH)]
    for s, address in zip(sockets, addresses, strict=True):
        s.linger = 0
        s.sndhwm = 0
        s.connect(address)
    honest, board = Honest(group), Board.attach(group)
    before = resident_bytes(coordinator.proc.pid)
    began = last = time.monotonic()
    sent = raw = rounds = most = 0
    try:
        while sent < messages:
            for _ in range(ROUND):
                rng.choice(sockets).send_multipart(frames(rng))
            sent += ROUND
            for _ in range(RAW):
                which = rng.randrange(3)
                with dial(addresses[which], rng.choice((None, KINDS[which]))) as raw_socket:
                    parts = [
                        rng.randbytes(rng.randrange(200)),
                        *(b"".join(map(frame, frames(rng))) for _ in range(5)),
                    ]
                    rng.shuffle(parts)
                    send_while_taken(raw_socket, parts)
                raw += 1
            quiet(board)
            honest.go_round()
            rounds += 1
            most = max(most, resident_bytes(coordinator.proc.pid))
            if time.monotonic() > last + 5:
                last = time.monotonic()
                sys.stderr.write(f"{last - began:6.1f} s  {sent} messages, all well\n")
    finally:
        honest.close()
        context.destroy(linger=0)
    words = board.words
    result = {
        "messages": sent,
        "plain_connections": raw,
        "rounds": rounds,
        "seconds": round(time.monotonic() - began, 1),
        "received": words[board.index("messages_received")],
        "dropped": words[board.index("messages_dropped")],
        "epoch": int(board.epoch[0]),
        "grown_bytes": most - before,
        "seed": seed,
    }
    board.close()
    return result


def quiet(board: Board) -> None:
    """Waits until the coordinator has heard all that was sent."""
    at = board.index("messages_received")
    last = [-1]

    def settled() -> bool:
        time.sleep(0.02)
        before, last[0] = last[0], board.words[at]
        return before == last[0]

    wait_until(settled, 120.0)


def _is_error(line: str) -> bool:
    return any(word in line for word in (" ERROR ", "Traceback", "Assertion", "error of its own"))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
