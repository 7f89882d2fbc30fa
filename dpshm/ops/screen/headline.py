"""The lines above and below the rows: the group, its totals, latencies and problems; front-ends and events.

A line that is too long for the terminal goes on in the next one, so nothing of the group is cut off.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from rich.text import Text

from dpshm.board.events import Event
from dpshm.ops.frame import Frame, Latency
from dpshm.ops.screen.table import (
    GONE,
    WORST_FIRST,
    History,
    frontend_table,
    has_latencies,
    rank_table,
    unmeasured,
)
from dpshm.ops.screen.text import Glyphs, count, duration

MIN_EVENTS = 3
_BAD_EVENTS = ("died", "stalled", "stuck", "lost", "gone", "silent", "ended")


def screen(frame: Frame, history: History, width: int, glyphs: Glyphs) -> list[Text]:
    """All lines of a frame: headline, ranks, front-ends."""
    title, rank_line = rank_table(history, width, glyphs, without=unmeasured(frame))
    lines = [*headline(frame, width, glyphs), Text(), title, *map(rank_line, frame.ranks)]
    if frame.frontends:
        title, frontend_line = frontend_table(width, glyphs)
        lines += [Text(), title, *map(frontend_line, frame.frontends)]
    return lines


def headline(frame: Frame, width: int, glyphs: Glyphs, height: int | None = None) -> list[Text]:
    """The group, its totals, its latencies and its problems.

    Args:
        frame: the frame.
        width: of the terminal.
        glyphs: the characters that the terminal can show.
        height: of the terminal, if it is one. On a low one each of these is one line, cut off where it has to be.
    """
    parts = [(_group(frame), "bold"), (_totals(frame), "")]
    if has_latencies(frame):
        parts.append((_latencies(frame), ""))
    problems = [Text(f"! {w}", "bold #D55E00") for w in warnings(frame)]
    lines = [Text(line, style) for words, style in parts for line in _packed(words, width, glyphs)] + problems
    most = len(lines) if height is None else max(2, height // 3)
    if len(lines) > most:
        lines = [Text(glyphs.separator.join(words), style) for words, style in parts[:2]] + problems
    return [_cut(line, width, glyphs) for line in lines[:most]]


def _group(frame: Frame) -> list[str]:
    c = frame.coordinator
    parts = [frame.group, f"wave {frame.wave} {frame.phase}" if frame.waves else "no waves (dense)"]
    if frame.waves and frame.waves_per_minute is not None:
        parts.append(f"{count(frame.waves_per_minute)} waves/min")
    parts.append(f"balance {frame.balance:.2f}" if frame.balance is not None else "balance -")
    parts.append(f"coordinator {c.state}" + (f" (pid {c.pid})" if c.state != "none" else ""))
    return parts


def _totals(frame: Frame) -> list[str]:
    states = Counter(rank.state for rank in frame.ranks)
    living = [rank for rank in frame.ranks if rank.state not in GONE]
    lost = sum(rank.requests for rank in frame.ranks if rank.state in GONE)
    parts = [
        f"{frame.dp_size} ranks: " + ", ".join(f"{states[s]} {s}" for s in WORST_FIRST if states[s]),
        f"{count(sum(r.waiting for r in living))} waiting",
        f"{count(sum(r.running for r in living))} running",
        f"{count(sum(r.in_flight for r in living))} in flight",
    ]
    if lost:
        parts.append(f"{count(lost)} lost")
    if frame.rates_over_s is not None:
        parts.append(f"{count(sum(r.requests_per_s or 0 for r in living))} req/s")
        parts.append(f"{count(sum(r.generation_tokens_per_s or 0 for r in living))} tok/s")
    return parts


def _latencies(frame: Frame) -> list[str]:
    def both(latency: Latency | None) -> str:
        return f"{duration(latency.p50_s)}/{duration(latency.p99_s)}" if latency and latency.count else "-"

    over = "since the start" if frame.latency_over_s is None else f"over {duration(frame.latency_over_s)}"
    preempted = sum(rank.preemptions for rank in frame.ranks)
    return [
        f"p50/p99 {over}: ttft {both(frame.ttft)}",
        f"queue {both(frame.queue)}",
        f"tpot {both(frame.per_token)}",
        *([f"{count(preempted)} preempted"] if preempted else []),
    ]


def _packed(parts: Sequence[str], width: int, glyphs: Glyphs) -> list[str]:
    """The parts in as few lines as they need. A part that is wider than the terminal is broken at its commas."""
    lines: list[str] = []
    for part in parts:
        separator = glyphs.separator
        for piece in [part] if len(part) <= width else part.split(", "):
            if lines and len(lines[-1]) + len(separator) + len(piece) <= width:
                lines[-1] += separator + piece
            else:
                lines.append(piece)
            separator = ", "
    return lines


def warnings(frame: Frame) -> list[str]:
    """The most urgent problems, at most two lines. `dpshm doctor` says more."""
    found = []
    if not frame.linked:
        found.append("this group has ended, or its segment was unlinked: no process can attach any more")
    elif frame.coordinator.state == "none":
        found.append("no coordinator: routing goes on; start one: dpshm coordinator --group " + frame.group)
    elif frame.coordinator.state == "silent":
        found.append(f"coordinator pid {frame.coordinator.pid} hangs or is stopped: verdicts are old")
    bad = [f"{r.dp_rank} {r.state}" for r in frame.ranks if r.state in ("dead", "stalled", "stuck", "unknown")]
    if bad:
        found.append(f"out of routing: rank {', '.join(bad[:6])}{' ...' if len(bad) > 6 else ''}: dpshm doctor")
    if frame.beyond:
        ranks = f"rank{'s' * (len(frame.beyond) > 1)} " + ", ".join(map(str, frame.beyond[:6]))
        found.append(f"{ranks} attached, and the group has 0 to {frame.dp_size - 1}: dpshm doctor")
    return found[:2]


def below(
    frame: Frame, events: Sequence[Event], width: int, height: int, glyphs: Glyphs, *, frontends: bool
) -> list[Text]:
    """What the free lines below the rows hold: front-ends, and the newest events first.

    Args:
        frame: the frame.
        events: the oldest first.
        width: of the terminal.
        height: how many lines are free.
        glyphs: the characters that the terminal can show.
        frontends: whether front-ends are to be shown; else they are the rows above.
    """
    lines: list[Text] = []
    if frontends and frame.frontends:
        for_events = 2 + min(MIN_EVENTS, len(events)) if events else 0
        shown = frame.frontends[: max(0, height - 2 - for_events)]
        if len(shown) == len(frame.frontends) or len(shown) > 1:  # else no line but "more" would be left
            title, line = frontend_table(width, glyphs)
            lines += [Text(), title, *map(line, shown)]
            if len(shown) < len(frame.frontends):
                lines[-1] = Text(f"... {len(frame.frontends) - len(shown) + 1} more: Tab", "dim")
    room = height - len(lines) - 2
    if events and room > 0:
        lines += [Text(), Text("events", "dim")]
        lines += [_cut(_event(event), width, glyphs) for event in list(events)[: -room - 1 : -1]]
    return lines


def _event(event: Event) -> Text:
    bad = event.kind.rpartition("_")[2] in _BAD_EVENTS
    text = Text(time.strftime("%H:%M:%S  ", time.localtime(event.time)), "dim")
    return text.append(event.text, "#D55E00" if bad else "not dim")


def _cut(text: Text, width: int, glyphs: Glyphs) -> Text:
    text.truncate(width, overflow="ellipsis" if glyphs.unicode else "crop")
    text.no_wrap = True
    return text
