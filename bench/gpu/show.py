"""The result of ``python -m bench gpu`` as tables in Markdown."""

from __future__ import annotations

from typing import Any

from bench.gpu.rank import WAYS


def show(result: dict[str, Any]) -> str:
    """The figures as tables in Markdown."""
    steps, wake, fault = result["steps"], result["wake"], result["fault"]
    places = ", ".join(f"{p['device']} ({p['place']}, {p['backend']})" for p in result["ranks"])
    lines = [
        f"{len(result['ranks'])} ranks: {places}; torch {result['ranks'][0]['torch']}; {result['cores']} cores.",
        "",
        "| figure | p50 | p99 | p99.9 | of |",
        "|---|---|---|---|---|",
    ]

    def row(name: str, q: dict[str, float], unit: str) -> None:
        figures = " | ".join(f"{q[key]:.3f} {unit}" for key in ("p50", "p99", "p99.9"))
        lines.append(f"| {name} | {figures} | {q['count']:,} |")

    for way, text in zip(WAYS, ("no report", "the board", "the PUB path"), strict=True):
        row(f"turn of a busy engine's loop, {text}", steps["turn_ms"][way], "ms")
    row("`publish()` in it", steps["publish_us"], "us")
    row("queueing a PUB report in it", steps["pub_queue_us"], "us")
    row("encoding and sending it in its thread", steps["pub_send_us"], "us")
    row("freshness, from the call of `publish()`", steps["freshness_us"], "us")
    row("freshness, from its last store", steps["freshness_since_stored_us"], "us")
    for name, text in (
        ("arrive", "request at paused ranks: until its engine has it"),
        ("enter", "its engine enters the step"),
        ("others", "the last of the other ranks does (what waking adds)"),
        ("exchange", "all know that"),
        ("wake", "these four together"),
        ("compute", "its first token computed"),
        ("reply", "the reply"),
        ("all", "all together"),
    ):
        row(text, wake["to_first_token_ms"][name], "ms")
    for way, text in (("board", "The board"), ("pub", "The PUB path")):
        a = steps["adds_ms"][way]
        lines += [
            "",
            f"{text} adds {a['median']:+.3f} ms to a turn (95 %: {a['low']:+.3f} to {a['high']:+.3f}; "
            f"{a['rounds']} rounds).",
        ]
    lines += [
        "",
        f"{wake['waves']} pause/wake cycles, {wake['requests']} requests at random times, {wake['hangs']} hangs. "
        f"Of {wake['of_them_to_sleeping_ranks_alone']} requests that woke the ranks, {wake['start_came_first']} "
        "came to their engine after START and waited for the end of a step without them.",
        "",
        f"A rank killed in mid-step: called dead after {fault['killed_rank_dead_ms']:.1f} ms; `route()` raises "
        f"after {fault['route_raises_ms']:.1f} ms: {fault['route_says']!r}. The survivors ended with exit status "
        f"{fault['survivors_exit_status']}. New ranks on the same board took {fault['restart_s']:.1f} s to start "
        f"and answered {fault['answered_after_restart']} requests.",
    ]
    return "\n".join(lines)
