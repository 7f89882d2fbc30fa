"""``python -m tests.soak``: the soak at the length that you like; exit status 1 if anything does not add up."""

from __future__ import annotations

import argparse
import json
import sys
import time

from tests.soak.soak import Soak


def main(argv: list[str]) -> int:
    """Runs what the command line says; gives the exit status."""
    parser = argparse.ArgumentParser(
        "python -m tests.soak", description="A group under load whose processes are killed."
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (10)")
    parser.add_argument("--engines", type=int, default=16, help="engine processes (16)")
    parser.add_argument("--stock", type=int, default=2, help="of them, how many speak vLLM's messages alone (2)")
    parser.add_argument("--readers", type=int, default=2, help="processes that only read the board (2)")
    parser.add_argument("--frontends", type=int, default=16, help="front-end processes (16)")
    parser.add_argument("--seed", type=int, default=0, help="of the lots who is killed when (0)")
    parser.add_argument("--json", action="store_true", help="print the result for machines")
    options = parser.parse_args(argv)
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {line}", file=sys.stderr, flush=True)

    result = Soak(
        options.minutes * 60,
        engines=options.engines,
        stock=options.stock,
        frontends=options.frontends,
        readers=options.readers,
        seed=options.seed,
        say=say,
    ).run()
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            if name != "problems":
                print(f"{name:26} {value}")
        for problem in result["problems"]:
            print("PROBLEM", problem)
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
