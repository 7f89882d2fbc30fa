"""Formats a frame as lines of a terminal: the headline, then a row for each rank or for each front-end.

A word and a sign show the state; colour only repeats it (the palette of Okabe and Ito, which colour-blind people
can tell apart). If the terminal is too narrow, the least important columns are left out.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from rich.text import Text

from dpshm.ops.frame import Frame, Frontend, Rank
from dpshm.ops.screen.text import Glyphs, count, duration
from dpshm.rules.liveness import State

SPARK_MIN = 8
HISTORY = 240
"""Samples kept of each rank."""

STATES = {  # sign, the same in ASCII, style
    "running": ("▶", ">", "#56B4E9"),
    "idle": ("·", ".", "dim"),
    "waking": ("↑", "^", "#F0E442"),
    "paused": ("‖", "=", "#CC79A7"),
    "drained": ("◌", "o", "#CC79A7"),
    "silent": ("?", "?", "#E69F00"),
    "stalled": ("!", "!", "bold #E69F00"),
    "stuck": ("!", "!", "bold #E69F00"),
    "unknown": ("?", "?", "bold #E69F00"),
    "dead": ("✕", "x", "bold #D55E00"),
    "absent": ("-", "-", "dim"),
    "alive": ("▶", ">", "#56B4E9"),
}
_BAD = (
    *(State.DEAD, State.STALLED, State.STUCK, State.UNKNOWN, State.SILENT, State.ABSENT),
    *(State.WAKING, State.PAUSED, State.DRAINED, State.RUNNING, State.IDLE),
)

T = TypeVar("T", Rank, Frontend)


class History:
    """The requests on each rank in the last frames, for sparklines."""

    def __init__(self) -> None:
        self.of: dict[int, deque[float]] = {}

    def add(self, frame: Frame) -> None:
        """Adds a frame."""
        for rank in frame.ranks:
            self.of.setdefault(rank.dp_rank, deque(maxlen=HISTORY)).append(rank.requests)

    def top(self) -> float:
        """The most requests that a rank had: the common scale of all sparklines."""
        return max((max(values) for values in self.of.values() if values), default=0.0)


class Column(NamedTuple, Generic[T]):
    """One column.

    Attributes:
        keep: columns with the lowest number stay longest.
        key: the sort key, or None.
        left: whether the column is aligned to the left.
    """

    title: str
    width: int
    keep: int
    cell: Callable[[T], str | Text]
    key: Callable[[T], float | str] | None = None
    left: bool = False


def _or_less(value: float | None) -> float:
    return -1.0 if value is None else value


def state_cell(state: str, glyphs: Glyphs) -> Text:
    """A state's sign and word."""
    sign, plain, style = STATES.get(state, ("?", "?", ""))
    return Text(f"{sign if glyphs.unicode else plain} {state}", style)


def age_cell(rank: Rank) -> Text:
    """How old the newest report is; in colour if the rank has work and should have published since."""
    return Text(duration(rank.age_s), STATES[rank.state][2] if rank.state in ("silent", "stalled") else "")


def kv_cell(usage: float, glyphs: Glyphs, width: int) -> Text:
    """A bar and its percentage."""
    style = "#D55E00" if usage >= 0.95 else "#E69F00" if usage >= 0.8 else "#56B4E9"
    text = Text(glyphs.bar(usage, width - 5), style)
    return text.append(f" {usage:4.0%}", "default")


def hit_cell(rank: Rank) -> str:
    """The share of prompt tokens that were cached."""
    return "-" if rank.cached_share is None else f"{rank.cached_share:.0%}"


def rank_columns(glyphs: Glyphs, *, wide: bool = False) -> list[Column[Rank]]:
    """The columns of ranks, except the history."""
    kv = 15 if wide else 8
    return [
        Column("rank", 4, 0, lambda r: str(r.dp_rank), lambda r: r.dp_rank),
        Column("state", 9, 0, lambda r: state_cell(r.state, glyphs), lambda r: _BAD.index(r.state), left=True),
        Column("wait", 4, 1, lambda r: count(r.waiting), lambda r: -r.waiting),
        Column("run", 4, 1, lambda r: count(r.running), lambda r: -r.running),
        Column("flight", 6, 2, lambda r: count(r.in_flight), lambda r: -r.in_flight),
        Column("backlog", 7, 4, lambda r: count(r.prefill_backlog), lambda r: -r.prefill_backlog),
        Column(
            "KV", kv, 3, lambda r: kv_cell(r.kv_cache_usage, glyphs, kv), lambda r: -r.kv_cache_usage, left=True
        ),
        Column("hit", 4, 7, hit_cell, lambda r: -_or_less(r.cached_share)),
        Column("req/s", 5, 5, lambda r: count(r.requests_per_s), lambda r: -_or_less(r.requests_per_s)),
        Column("tok/s", 5, 4, lambda r: count(r.generation_tokens_per_s), lambda r: -_or_less(_tokens(r))),
        Column("step", 5, 6, lambda r: duration(_step_s(r)), lambda r: -_or_less(_step_s(r))),
        Column("age", 5, 3, age_cell, lambda r: -_or_less(r.age_s)),
        Column("pid", 7, 8, lambda r: str(r.pid or "-")),
    ]


def _tokens(rank: Rank) -> float | None:
    return rank.generation_tokens_per_s


def _step_s(rank: Rank) -> float | None:
    """The duration of the mean step, or of the present step if that is already longer."""
    mean = None if rank.step_ms is None else rank.step_ms / 1e3
    if rank.step_age_s is not None and rank.step_age_s > 2 * (mean or 0.0) + 0.1:
        return rank.step_age_s
    return mean


def frontend_columns(glyphs: Glyphs) -> list[Column[Frontend]]:
    """The columns of front-ends, except those with an item for each rank."""
    return [
        Column("fe", 3, 0, lambda f: str(f.index), lambda f: f.index),
        Column("state", 9, 0, lambda f: state_cell(f.state, glyphs), lambda f: _BAD.index(f.state), left=True),
        Column("sent", 5, 1, lambda f: count(f.routed), lambda f: -f.routed),
        Column("req/s", 5, 3, lambda f: count(f.routed_per_s), lambda f: -_or_less(f.routed_per_s)),
        Column("flight", 6, 1, lambda f: count(f.in_flight), lambda f: -f.in_flight),
        Column("age", 5, 2, lambda f: duration(f.age_s), lambda f: -_or_less(f.age_s)),
        Column("pid", 7, 5, lambda f: str(f.pid or "-")),
        Column("owner", 18, 4, lambda f: f.owner, lambda f: f.owner, left=True),
    ]


def screen(frame: Frame, history: History, width: int, glyphs: Glyphs) -> list[Text]:
    """All lines of a frame: headline, ranks, front-ends."""
    title, rank_line = rank_table(history, width, glyphs)
    lines = [*headline(frame, width, glyphs), Text(), title, *map(rank_line, frame.ranks)]
    if frame.frontends:
        title, frontend_line = frontend_table(width, glyphs)
        lines += [Text(), title, *map(frontend_line, frame.frontends)]
    return lines


def headline(frame: Frame, width: int, glyphs: Glyphs) -> list[Text]:
    """The group, its totals and its problems, one line each."""
    c, dot = frame.coordinator, glyphs.separator
    states = Counter(rank.state for rank in frame.ranks)
    wave = f"wave {frame.wave} {frame.phase}" if frame.waves else "no waves (dense)"
    first = [frame.group, wave]
    if frame.waves and frame.waves_per_minute is not None:
        first.append(f"{count(frame.waves_per_minute)} waves/min")
    first.append(f"balance {frame.balance:.2f}" if frame.balance is not None else "balance -")
    first.append(f"coordinator {c.state}" + (f" (pid {c.pid})" if c.state != "none" else ""))
    totals = [
        f"{frame.dp_size} ranks: " + ", ".join(f"{states[s]} {s}" for s in _BAD if states[s]),
        f"{count(sum(r.waiting for r in frame.ranks))} waiting",
        f"{count(sum(r.running for r in frame.ranks))} running",
        f"{count(sum(r.in_flight for r in frame.ranks))} in flight",
    ]
    if frame.rates_over_s is not None:
        totals.append(f"{count(sum(r.requests_per_s or 0 for r in frame.ranks))} req/s")
        totals.append(f"{count(sum(r.generation_tokens_per_s or 0 for r in frame.ranks))} tok/s")
    lines = [_cut(Text(dot.join(first), "bold"), width, glyphs), _cut(Text(dot.join(totals)), width, glyphs)]
    return lines + [_cut(Text(f"! {w}", "bold #D55E00"), width, glyphs) for w in warnings(frame)]


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
    return found[:2]


def rank_table(history: History, width: int, glyphs: Glyphs) -> tuple[Text, Callable[[Rank], Text]]:
    """The heading, and the function that makes a rank's line."""
    columns, rest = _fit(rank_columns(glyphs, wide=width >= 110), width, spare=SPARK_MIN if history.of else 0)
    spark = min(rest - 1, 60) if history.of else 0
    top = history.top()

    def line(rank: Rank) -> Text:
        made = _row(columns, rank)
        if spark:
            made.append(" " + glyphs.spark(list(history.of.get(rank.dp_rank, ())), top, spark), "#009E73")
        return made

    return _heading(columns, "history" if spark else "", spark), line


def frontend_table(width: int, glyphs: Glyphs) -> tuple[Text, Callable[[Frontend], Text]]:
    """The same for front-ends. At the right: requests in flight to each rank, and the share sent to each rank."""
    columns, rest = _fit(frontend_columns(glyphs), width, spare=22)
    half = max(0, (rest - 2) // 2)

    def line(frontend: Frontend) -> Text:
        made = _row(columns, frontend)
        for values, style in ((frontend.in_flight_by_rank, "#E69F00"), (frontend.sent_by_rank, "#009E73")):
            made.append(" " + _by_rank(values, half, glyphs).ljust(half), style)
        return made

    heading = _heading(columns, "", 0)
    names = ("in flight by rank", "sent by rank") if half >= 17 else ("in flight", "sent to")
    return heading.append(f" {names[0]:<{half}} {names[1]}"), line


def _by_rank(values: Sequence[int], width: int, glyphs: Glyphs) -> str:
    """The numbers if they fit, else one cell for each rank, else one cell for several ranks."""
    numbers = " ".join(count(v) for v in values)
    if len(numbers) <= width:
        return numbers
    per_cell = -(-len(values) // max(1, width))
    cells = [max(values[i : i + per_cell]) for i in range(0, len(values), per_cell)]
    return glyphs.spark(cells, max(cells), len(cells))


def _fit(columns: list[Column[T]], width: int, spare: int = 0) -> tuple[list[Column[T]], int]:
    """The columns that fit beside `spare` cells, and the cells that are left."""
    kept = list(columns)
    while len(kept) > 2 and sum(c.width + 1 for c in kept) - 1 > width - spare:
        kept.remove(max(kept, key=lambda c: c.keep))
    return kept, width - (sum(c.width + 1 for c in kept) - 1)


def _heading(columns: Sequence[Column[T]], last: str, last_width: int) -> Text:
    cells = [c.title.ljust(c.width) if c.left else c.title.rjust(c.width) for c in columns]
    return Text(" ".join(cells) + (" " + last.rjust(last_width)[-last_width:] if last_width else ""), "dim")


def _row(columns: Sequence[Column[T]], item: T) -> Text:
    line = Text(no_wrap=True)
    for i, column in enumerate(columns):
        value = column.cell(item)
        cell = value if isinstance(value, Text) else Text(value)
        cell.truncate(column.width)
        padding = " " * (column.width - cell.cell_len)
        if i:
            line.append(" ")
        if column.left:
            line.append_text(cell).append(padding)
        else:
            line.append(padding).append_text(cell)
    return line


def _cut(text: Text, width: int, glyphs: Glyphs) -> Text:
    text.truncate(width, overflow="ellipsis" if glyphs.unicode else "crop")
    text.no_wrap = True
    return text
