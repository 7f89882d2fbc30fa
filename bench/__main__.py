"""``python -m bench``: the comparison. the studies are ``python -m bench STUDY``.

The comparison needs no argument and takes some minutes. ``--quick`` takes less than one, shows that every part
works, and gives rough figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path

STUDIES = {
    "vllm": "bench.vllm.main",
    "vllm-step": "bench.vllm_step",
    "vllm-cache": "bench.vllm_cache",
    "vllm-adapters": "bench.vllm.adapters",
    "routing": "bench.routing",
    "gpu": "bench.gpu.main",
    "gpu-compare": "bench.gpu.compare",
    "faults": "bench.faults",
    "death": "bench.death",
    "ray": "bench.ray_serve",
    "nodes": "bench.nodes",
}


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    if argv and argv[0] in STUDIES:
        return int(import_module(STUDIES[argv[0]]).main(argv[1:]) or 0)
    parser = argparse.ArgumentParser("python -m bench", description="dpshm's board side by side with its peers.")
    parser.add_argument(
        "--quick", action="store_true", help="run small sizes in under a minute, to see that it works"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and no table")
    parser.add_argument(
        "--markdown", action="store_true", help="print a table of the aims and the figures that were measured"
    )
    parser.add_argument("--plot", metavar="DIR", type=Path, help="draw the charts into this folder")
    parser.add_argument("--vllm-python", metavar="PATH", type=Path, help="an interpreter that has vLLM 0.32")
    parser.add_argument("--rounds", metavar="N", type=int, help="measure everything so many times")
    parser.add_argument("--frontends", metavar="N,N", help="numbers of front-ends for freshness, the first is 1")
    parser.add_argument("--from", metavar="FILE", dest="result", type=Path, help="show an earlier --json instead")
    options = parser.parse_args(argv)

    from bench.comparison import FULL, QUICK, progress, run

    if options.result is not None:
        result = json.loads(options.result.read_text(encoding="utf-8"))
    else:
        sizes = QUICK if options.quick else FULL
        if options.rounds is not None:
            sizes = sizes._replace(rounds=max(1, options.rounds))
        if options.frontends is not None:
            sizes = sizes._replace(frontends=tuple(int(n) for n in options.frontends.split(",")))
        result = run(sizes, options.vllm_python, progress())
    if options.plot is not None:
        from bench.plot import plot

        for path in plot(result, options.plot):
            print(path, file=sys.stderr)
    if options.json:
        json.dump(result, sys.stdout, indent=1)
        print()
    elif options.markdown:
        from bench.report import markdown

        print(markdown(result))
    else:
        from bench.report import show

        show(result)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
