"""The routing study: runs the scenarios behind ``bench/ROUTING.md`` and writes its tables.

    python bench/routing.py --out build/routing                    run what is not there yet, then print the tables
    python bench/routing.py --out build/routing --only slow,skew   some scenarios
    python bench/routing.py --out build/routing --tables           print the tables of what is there

Each scenario is one comparison of ``dpshm simulate``, and writes one JSON file. Traces are read from the
folder that ``--traces`` or ``DPSHM_TRACES`` names; scenarios whose trace is absent are skipped, and say so.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from dpshm.sim.lab.figures import Comparison, Estimate, Result
from dpshm.sim.lab.plant import COST, Plant
from dpshm.sim.lab.study import SimulationSettings, compare
from dpshm.sim.step_cost import FLAT_COST

CODE = "AzureLLMInferenceTrace_code.csv"
CHAT = "mooncake_conversation_trace.jsonl"
CHAT_RATE_PER_S = 5.0
FOUR = ("vllm", "round_robin", "least_loaded", "least_work")
SLOW = ((3, 2.0),)
BROADCAST_KINDS = ("broadcast", "broadcast:10", "broadcast-keep", "immediate", "scrape", "live-unbooked", "live")
SEEDS = 8
FLAT = FLAT_COST._replace(kv_tokens=1_000_000)
CODE_RATE = 10.0
"""Of the code trace, in the scenarios whose table is not about its load."""


INDEXED = (
    *("vllm", "least_loaded", "least_work", "affinity"),
    *("bounded_hashing@live", "sticky", "lmetric", "least_loaded@live-index"),
    *(
        "least_work@live-index",
        "least_work@live-index-sent",
        "least_work@live-index:100",
        "least_work@live-index:1000",
    ),
)
AHEAD = ("least_work@live-index-ahead", "lmetric@live-index-sent")
"""With and without the prefix index, live and late, and the rivals; and what is about to be cached."""


class Scenario(NamedTuple):
    """One comparison: what it is called, in which table it stands, and what it runs."""

    name: str
    table: str
    label: str
    settings: dict[str, Any]
    trace: str | None = None


def flat(**plant: Any) -> Plant:
    """A plant in which a request costs the same whatever its context: that of the older tables."""
    return Plant(**{"cost": FLAT, **plant})


def chat(name: str, table: str, label: str, rate_per_s: float, plant: dict[str, Any], **more: Any) -> Scenario:
    """A scenario on the built-in chat workload."""
    usual = {
        "policies": FOUR,
        "requests": 4000,
        "seeds": SEEDS,
        "oracle": False,
        "rate": rate_per_s / CHAT_RATE_PER_S,
    }
    return Scenario(name, table, label, {"plant": flat(**plant), **usual, **more})


def traced(name: str, table: str, label: str, trace: str, rate: float, **more: Any) -> Scenario:
    """A scenario on a recorded trace."""
    usual = {"policies": FOUR, "seeds": SEEDS, "oracle": False, "rate": rate}
    return Scenario(name, table, label, {"plant": flat(), **usual, **more}, trace)


def scenarios() -> list[Scenario]:
    """All of them, in the order of the tables."""
    return [*chats(), *traces(), *prefixes(), *defaults(), *decoding()]


def chats() -> list[Scenario]:
    """Those on the built-in chat workload."""
    found = [
        chat("capacity", "capacity", "640 clients, closed loop", 5, {"clients": 640}),
        chat("capacity-slow", "capacity", "640 clients, closed loop, one slow", 5, {"clients": 640, "slow": SLOW}),
    ]
    for rate in (15.8, 26.4, 36.9, 44.8, 55.0, 62.0, 69.0, 80.0):
        found.append(chat(f"load-{rate:g}", "load", f"{rate:g}/s", rate, {}, oracle=30 < rate < 60))
    for rate in (44.8, 52.0, 60.0, 75.0):
        found.append(chat(f"slow-{rate:g}", "slow", f"{rate:g}/s", rate, {"slow": SLOW}, oracle=rate < 55))
    for frontends in (1, 4, 16):
        plant: dict[str, Any] = {"frontends": frontends}
        found.append(chat(f"frontends-{frontends}", "frontends", f"{frontends} front-ends", 44.8, plant))
    for skew in (1.0, 2.0):
        found.append(chat(f"skew-{skew:g}", "skew", f"skew {skew:g}", 44.8, {}, skew=skew))
    for policy in ("vllm", "least_loaded", "least_work"):
        only = {"policies": (policy,), "information": BROADCAST_KINDS}
        found.append(chat(f"ablation-{policy}", "ablation", policy, 44.8, {}, **only))
    for coefficients in ("none", "learnt", "true"):
        for slow, name in (((), ""), (SLOW, ", one slow")):
            plant = {"coefficients": coefficients, "slow": slow}
            found.append(
                chat(
                    f"coefficients-{coefficients}{name[-4:]}",
                    "coefficients",
                    f"{coefficients}{name}",
                    44.8,
                    plant,
                    policies=("vllm", "least_work"),
                )
            )
    for clients in (100, 200, 400):
        found.append(chat(f"closed-{clients}", "closed", f"{clients} clients", 5, {"clients": clients}))
    for rate in (15.8, 26.4, 36.9):
        found.append(chat(f"lockstep-{rate:g}", "lockstep", f"{rate:g}/s", rate, {"lockstep": True}))
    found.append(chat("restart", "restart", "44.8/s", 44.8, {"restart": (3, 40.0, 10.0)}))
    return found


def traces() -> list[Scenario]:
    """Those on the recorded traces."""
    found = []
    for rate in (3.0, 10.0, 20.0, 25.0, 30.0):
        found.append(traced(f"code-{rate:g}", "code", f"{rate:g}x ({rate * 2.567:.1f}/s)", CODE, rate))
    for label, plant, skew in (
        ("one slow", flat(slow=SLOW), 0.0),
        ("1 front-end", flat(frontends=1), 0.0),
        ("4 front-ends", flat(frontends=4), 0.0),
        ("16 front-ends", flat(frontends=16), 0.0),
        ("skew 2", flat(), 2.0),
        ("one restarted", flat(restart=(3, 40.0, 10.0)), 0.0),
    ):
        name = "code-" + label.replace(" ", "-")
        found.append(
            traced(name, "code-plants", f"10x, {label}", CODE, CODE_RATE, plant=plant, skew=skew, requests=4000)
        )
    for rate in (6.0, 12.0):
        found.append(
            traced(
                f"code-lockstep-{rate:g}",
                "code-lockstep",
                f"{rate:g}x",
                CODE,
                rate,
                plant=flat(lockstep=True),
                requests=4000,
            )
        )
    pinned = (*FOUR, "affinity", "affinity:epsilon=1000000")
    for rate in (1.0, 2.0, 3.0):
        found.append(
            traced(
                f"mooncake-{rate:g}",
                "mooncake",
                f"{rate:g}x ({rate * 3.4:.1f}/s)",
                CHAT,
                rate,
                policies=pinned,
                requests=3000,
            )
        )
    return found


def prefixes() -> list[Scenario]:
    """Those whose prompts share prefixes, with and without the prefix index."""
    usual: dict[str, Any] = {"policies": INDEXED, "requests": 3000, "seeds": 3, "oracle": True}
    found = [
        traced(f"index-{rate:g}", "index", f"{rate:g}x ({rate * 3.4:.1f}/s)", CHAT, rate, **usual)
        for rate in (1.0, 2.0, 3.0)
    ]
    for workload in ("agents", "fan-out"):
        for rate in (20.0, 40.0):
            more = usual | {"workload": workload, "policies": INDEXED + AHEAD}
            found.append(chat(f"{workload}-{rate:g}", workload, f"{rate:g}/s", rate, {}, **more))
    return found


def defaults() -> list[Scenario]:
    """What a user gets without choosing, with and without noise, beside counting requests and vLLM."""
    three: dict[str, Any] = {"policies": ("vllm", "least_loaded", "least_work"), "requests": 3000, "seeds": 4}
    found = []
    for noise in (0.0, 0.3):
        for rate in (26.4, 44.8, 69.0):
            plant = {"noise": noise}
            found.append(
                chat(
                    f"default-chat-{rate:g}-{noise:g}",
                    "default",
                    f"chat {rate:g}/s, noise {noise:g}",
                    rate,
                    plant,
                    **three,
                )
            )
        for rate in (3.0, 10.0, 25.0):
            found.append(
                traced(
                    f"default-code-{rate:g}-{noise:g}",
                    "default",
                    f"code {rate:g}x, noise {noise:g}",
                    CODE,
                    rate,
                    plant=flat(noise=noise),
                    **three,
                )
            )
    return found


def decoding() -> list[Scenario]:
    """With steps that pay for the context that requests hold: in lockstep and with independent ranks."""
    usual: dict[str, Any] = {
        "policies": ("vllm", "least_loaded", "lmetric@live", "shortest_kv", "br_0", "least_work"),
        "requests": 1000,
        "seeds": 6,
    }
    longer = {**usual, "workload": "long-context"}
    held = COST._replace(max_running=256)
    lockstep, dense = {"cost": held, "lockstep": True}, {"cost": held}
    bursty = {"cost": held._replace(base_s=20e-3, max_step_tokens=2048)}
    found = [
        chat("decode-lockstep-chat", "decode", "lockstep, chat 25/s", 25.0, lockstep, **usual),
        chat("decode-lockstep-long", "decode", "lockstep, long contexts 6/s", 6.0, lockstep, **longer),
        chat("decode-chat", "decode", "chat 60/s", 60.0, dense, **usual),
        chat("decode-long", "decode", "long contexts 12/s", 12.0, dense, **longer),
        chat("decode-fan-out", "decode", "bursts 20/s, 20 ms steps", 20.0, bursty, **usual, workload="fan-out"),
    ]
    found += [
        traced(f"decode-code-{rate:g}", "decode", f"code {rate:g}x", CODE, rate, plant=Plant(cost=held), **usual)
        for rate in (3.0, 10.0)
    ]
    flat_too = chat("decode-flat", "decode", "lockstep, chat 21/s, flat", 21.0, {"lockstep": True}, **usual)
    return [*found, flat_too]


def figure(e: Estimate, digits: int = 2) -> str:
    """A value with its interval."""
    return f"{e.value:.{digits}f}" + (f" ±{e.plus_minus:.{digits}f}" if e.plus_minus is not None else "")


HEAD = (
    *("scenario", "policy", "information", "TTFT mean, ms", "p99, ms", "mean, ratio", "p99, ratio"),
    *("per token, ms", "total, ms", "tokens/s", "imbalance", "prefix hits", "regret"),
)


def table(rows: list[tuple[Scenario, Comparison]]) -> str:
    """One table in Markdown: a row for each scenario and combination, without columns that are empty."""
    lines = [HEAD, *(row(scenario.label, result) for scenario, c in rows for result in c.results)]
    shown = [i for i in range(len(HEAD)) if any(line[i] for line in lines[1:])]
    lines.insert(1, ("---",) * len(HEAD))
    return "\n".join("| " + " | ".join(line[i] for i in shown) + " |" for line in lines)


def row(label: str, r: Result) -> tuple[str, ...]:
    """One row of it, a text for each of `HEAD`."""
    times = (f"{r.ttft_ms.mean:.1f}", f"{r.ttft_ms.p99:.0f}")
    ratios = (figure(r.ratio.mean), figure(r.ratio.p99)) if r.ratio else ("", "")
    hits = "" if r.prefix_hit_rate is None else f"{r.prefix_hit_rate:.1%}"
    regret = "" if r.regret is None else f"{r.regret:+.1%}"
    rest = (
        f"{r.tpot_ms:.1f}",
        f"{r.e2e_ms.mean:.0f}",
        f"{r.tokens_per_s:.0f}",
        f"{r.imbalance:.1f}",
        hits,
        regret,
    )
    return (label, r.policy, r.information, *times, *ratios, *rest)


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description="The routing study behind bench/ROUTING.md.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--traces", type=Path, default=os.environ.get("DPSHM_TRACES"), help="folder of the traces")
    parser.add_argument("--only", default="", help="names of tables or scenarios, with commas")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tables", action="store_true", help="run nothing")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    only = set(filter(None, given.only.split(",")))
    chosen = [s for s in scenarios() if not only or s.name in only or s.table in only]
    for scenario in () if given.tables else chosen:
        file = given.out / f"{scenario.name}.json"
        if file.exists():
            continue
        settings = dict(scenario.settings)
        if scenario.trace:
            path = Path(given.traces or "") / scenario.trace
            if given.traces is None or not path.exists():
                print(
                    f"skipped {scenario.name}: no {scenario.trace}; name its folder with --traces", file=sys.stderr
                )
                continue
            settings["trace"] = path
        began = time.monotonic()
        comparison = compare(SimulationSettings(**settings), given.processes)
        file.write_bytes(msgspec.json.encode(comparison))
        print(f"{scenario.name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    tables: dict[str, list[tuple[Scenario, Comparison]]] = {}
    for scenario in chosen:
        file = given.out / f"{scenario.name}.json"
        if file.exists():
            comparison = msgspec.json.decode(file.read_bytes(), type=Comparison)
            tables.setdefault(scenario.table, []).append((scenario, comparison))
    for name, rows in tables.items():
        print(f"\n### {name}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
