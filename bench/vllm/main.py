"""``python -m bench vllm``: the real vLLM, with its own coordinator and with dpshm, on the same requests.

    python -m bench vllm --side-by-side --out result.jsonl     # on a quiet machine with 24 cores or more
    python -m bench vllm --from result.jsonl                   # the tables again
    python -m bench vllm --carry DIR                           # what a machine without a network needs

`bench/vllm/README.md` says what is measured, and when a run may be believed.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from bench.comparison import machine_facts
from bench.vllm.lane import Sizes
from bench.vllm.prompts import trace_lines
from bench.vllm.ratios import STOCK
from bench.vllm.rounds import Plan, Rounds, load_of
from bench.vllm.scenarios import SCENARIOS
from bench.vllm.table import line, show
from dpshm.sim.workloads.agents import BLOCK_TOKENS
from tests.e2e.vllm import environment


def main(argv: list[str]) -> int:
    """Runs what the command line says; gives the exit status."""
    options = _parser().parse_args(argv)
    if options.predict:
        from bench.vllm.predict import compare

        print(compare(_plan(options, Path()), _read(options.earlier)[1]))
    elif options.earlier:
        _show_earlier(options)
    elif options.write is not None:
        _write(_plan(options, options.write), options.write)
    elif reason := environment.why_not():
        print(reason, file=sys.stderr)
        return 2
    elif options.carry is not None:
        from bench.vllm.carry import carry

        carry(options.carry)
    else:
        _run(options)
    return 0


def _show_earlier(options: argparse.Namespace) -> None:
    machine, runs = _read(options.earlier)
    print(show(machine, runs))
    if options.plot is not None:
        from bench.vllm.plot import plot

        plot(machine, runs, options.plot)


def _run(options: argparse.Namespace) -> None:
    """Runs the plan, and ends the servers also when it is told to end."""
    environment.install_dpshm(environment.folder())
    lock, began = threading.Lock(), time.monotonic()
    machine = _machine()
    runs: list[dict[str, Any]] = []

    def keep(record: dict[str, Any]) -> None:
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def give(figures: dict[str, Any]) -> None:
        with lock:
            runs.append(figures)
            keep({"run": figures})
            tell(line(figures))

    def tell(text: str) -> None:
        sys.stderr.write(f"bench vllm: {time.monotonic() - began:.0f} s: {text}\n")

    keep({"machine": machine})
    with tempfile.TemporaryDirectory(prefix="dpshm-bench-") as folder:
        rounds = Rounds(_plan(options, Path(folder)), give, tell)

        def end(number: int, _: object) -> NoReturn:
            raise SystemExit(128 + number)  # what was interrupted may hold a lock, so nothing is ended in here

        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
        rounds.run()
    print(show(machine, runs))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m bench vllm", description="The real vLLM, with its own coordinator and with dpshm."
    )
    add = parser.add_argument
    add("--scenarios", default=",".join(SCENARIOS), help="which, by commas (%(default)s)")
    add("--arms", default="default,least_loaded", help="beside stock: default, or policies (%(default)s)")
    add("--trace", action="append", default=[], metavar="SCENARIO=FILE", help="recorded arrivals for a scenario")
    add("--rounds", type=int, default=3)
    add("--first-round", type=int, default=1, help="the number of the first round, which is its seed")
    add("--ranks", type=int, default=8, help="rates are made for 8; fewer get a share")
    add("--api-servers", type=int, default=8)
    add("--players", type=int, default=3, help="processes that generate the load of a server")
    add("--stream-interval", type=int, default=50, help="tokens an answer's messages have")
    add("--seconds", type=float, help="for how long requests come, in place of each scenario's own length")
    add("--side-by-side", action="store_true", help="all servers at once, each on a share of the cores")
    add("--budget-s", type=float, default=float("inf"), help="begin no round that would end later than that")
    add("--out", type=Path, metavar="FILE", help="append each result to it, a JSON object a line")
    add(
        "--from",
        dest="earlier",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="show earlier results instead",
    )
    add("--write", type=Path, metavar="DIR", help="write the requests as traces for the laboratory; run nothing")
    add("--predict", action="store_true", help="what the laboratory says of these rounds; beside --from")
    add("--plot", type=Path, metavar="FILE", help="with --from: draw the ratios to stock")
    add("--carry", type=Path, metavar="DIR", help="make the files with which this runs where there is no network")
    return parser


def _plan(options: argparse.Namespace, folder: Path) -> Plan:
    names = options.scenarios.split(",")
    traces = dict(text.split("=", 1) for text in options.trace)
    if unknown := {*names, *traces} - SCENARIOS.keys():
        sys.exit(f"there is no scenario {', '.join(sorted(unknown))}: choose {', '.join(SCENARIOS)}")
    return Plan(
        names,
        [STOCK, *options.arms.split(",")],
        options.rounds,
        options.first_round,
        Sizes(options.ranks, options.api_servers, options.players, options.stream_interval),
        options.seconds,
        {name: Path(path) for name, path in traces.items()},
        options.side_by_side,
        options.budget_s,
        folder,
    )


def _write(plan: Plan, folder: Path) -> None:
    """Writes the requests of each scenario and round."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in plan.scenarios:
        for number in range(plan.first_round, plan.first_round + plan.rounds):
            load = load_of(plan, SCENARIOS[name], number)
            text = "\n".join(trace_lines(load.arrivals, load.block_tokens or BLOCK_TOKENS))
            (folder / f"{name}-{number}.jsonl").write_text(text + "\n", encoding="utf-8")


def _machine() -> dict[str, Any]:
    facts = machine_facts()
    kept = {name: facts[name] for name in ("date", "cpu", "cores", "kernel", "python")}
    return kept | {"vLLM": ".".join(map(str, environment.installed()))}


def _read(paths: list[Path]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The machine of the first of some files, and the runs of all."""
    machine: dict[str, Any] = {}
    runs = []
    for path in paths:
        for text in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(text)
            machine = machine or record.get("machine", {})
            runs += [record["run"]] if "run" in record else []
    return machine, runs
