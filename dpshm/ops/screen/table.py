"""Formats a frame's ranks and front-ends as lines of a terminal, one line each.

A word and a sign show the state; colour only repeats it (the palette of Okabe and Ito, which colour-blind people
can tell apart). If the terminal is too narrow, the least important columns are left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Generic, NamedTuple, TypeVar

from rich.text import Text

from dpshm.ops.frame import Frame, Frontend, Latency, Rank
from dpshm.ops.screen.text import Glyphs, count, duration
from dpshm.rules.liveness import State

SPARK_MIN = 8
WIDE = 140
"""Columns of a terminal in which bars of the KV cache are long."""
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
WORST_FIRST = (
    *(State.DEAD, State.STALLED, State.STUCK, State.UNKNOWN, State.SILENT, State.ABSENT),
    *(State.WAKING, State.PAUSED, State.DRAINED, State.RUNNING, State.IDLE),
)

T = TypeVar("T", Rank, Frontend)

GONE = ("dead", "absent")
"""States in which a rank has no process: what its row says of requests is what was lost."""


class History:
    """The requests on each rank in the last frames, for sparklines; None for a rank without a process."""

    def __init__(self) -> None:
        self.of: dict[int, deque[float | None]] = {}

    def add(self, frame: Frame) -> None:
        """Adds a frame."""
        for rank in frame.ranks:
            requests = None if rank.state in GONE else rank.requests
            self.of.setdefault(rank.dp_rank, deque(maxlen=HISTORY)).append(requests)

    def top(self, newest: int) -> float:
        """The most requests that a rank had in the newest frames: the one scale of all sparklines."""
        return max((value or 0 for values in self.of.values() for value in list(values)[-newest:]), default=0.0)


class Sort(NamedTuple):
    """The order of rows: by the column of that title."""

    title: str
    reverse: bool = False


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


def share_cell(share: float | None) -> str:
    """A share as a percentage."""
    return "-" if share is None else f"{share:.0%}"


def rank_columns(glyphs: Glyphs, *, wide: bool = False, without: Collection[str] = ()) -> list[Column[Rank]]:
    """The columns of ranks, except the history and those of these titles."""
    kv = 15 if wide else 8
    columns: list[Column[Rank]] = [
        Column("rank", 5, 0, lambda r: r.label, lambda r: r.dp_rank),
        Column(
            "state", 9, 0, lambda r: state_cell(r.state, glyphs), lambda r: WORST_FIRST.index(r.state), left=True
        ),
        Column("wait", 4, 1, lambda r: count(r.waiting), lambda r: -r.waiting),
        Column("run", 4, 1, lambda r: count(r.running), lambda r: -r.running),
        Column("flight", 6, 2, lambda r: count(r.in_flight), lambda r: -r.in_flight),
        Column("backlog", 7, 6, lambda r: count(r.prefill_backlog), lambda r: -r.prefill_backlog),
        Column(
            "KV", kv, 3, lambda r: kv_cell(r.kv_cache_usage, glyphs, kv), lambda r: -r.kv_cache_usage, left=True
        ),
        Column("hit", 4, 8, lambda r: share_cell(r.cached_share), lambda r: -_or_less(r.cached_share)),
        Column("index", 5, 9, lambda r: share_cell(r.index_fill), lambda r: -_or_less(r.index_fill)),
        Column("req/s", 5, 3, lambda r: count(r.requests_per_s), lambda r: -_or_less(r.requests_per_s)),
        Column("tok/s", 5, 3, lambda r: count(r.generation_tokens_per_s), lambda r: -_or_less(_tokens(r))),
        Column("ttft", 5, 4, lambda r: duration(_p50(r.ttft)), lambda r: -_or_less(_p50(r.ttft))),
        Column("p99", 5, 5, lambda r: duration(_p99(r.ttft)), lambda r: -_or_less(_p99(r.ttft))),
        Column("queue", 5, 9, lambda r: duration(_p50(r.queue)), lambda r: -_or_less(_p50(r.queue))),
        Column("tpot", 5, 8, lambda r: duration(_p50(r.per_token)), lambda r: -_or_less(_p50(r.per_token))),
        Column("preempt", 7, 10, lambda r: count(r.preemptions), lambda r: -r.preemptions),
        Column("step", 5, 7, lambda r: duration(_step_s(r)), lambda r: -_or_less(_step_s(r))),
        Column("age", 5, 4, age_cell, lambda r: -_or_less(r.age_s)),
        Column("pid", 7, 11, lambda r: str(r.pid or "-")),
    ]
    return [column for column in columns if column.title not in without]


LATENCIES = frozenset({"ttft", "p99", "queue", "tpot"})
CACHES = frozenset({"hit", "index"})


def has_latencies(frame: Frame) -> bool:
    """Whether a front-end measures how long requests take."""
    return frame.ttft is not None and frame.ttft.count > 0


def unmeasured(frame: Frame) -> frozenset[str]:
    """The titles of columns in which no rank has anything."""
    latencies: frozenset[str] = frozenset() if has_latencies(frame) else LATENCIES
    return latencies if any(rank.num_blocks for rank in frame.ranks) else latencies | CACHES


def _p50(latency: Latency | None) -> float | None:
    return latency.p50_s if latency else None


def _p99(latency: Latency | None) -> float | None:
    return latency.p99_s if latency else None


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
        Column(
            "state", 9, 0, lambda f: state_cell(f.state, glyphs), lambda f: WORST_FIRST.index(f.state), left=True
        ),
        Column("sent", 5, 1, lambda f: count(f.routed), lambda f: -f.routed),
        Column("req/s", 5, 3, lambda f: count(f.routed_per_s), lambda f: -_or_less(f.routed_per_s)),
        Column("flight", 6, 1, lambda f: count(f.in_flight), lambda f: -f.in_flight),
        Column("age", 5, 2, lambda f: duration(f.age_s), lambda f: -_or_less(f.age_s)),
        Column("pid", 7, 5, lambda f: str(f.pid or "-")),
        Column("owner", 18, 4, lambda f: f.owner, lambda f: f.owner, left=True),
    ]


def rank_table(
    history: History, width: int, glyphs: Glyphs, *, without: Collection[str] = (), sort: Sort | None = None
) -> tuple[Text, Callable[[Rank], Text]]:
    """The heading, and the function that makes a rank's line."""
    columns = rank_columns(glyphs, wide=width >= WIDE, without=without)
    columns, rest = _fit(columns, width, spare=SPARK_MIN if history.of else 0)
    spark = min(rest - 1, 60) if history.of else 0
    top = history.top(spark) if spark else 0.0

    def line(rank: Rank) -> Text:
        made = _row(columns, rank, dim=rank.state in GONE)
        if spark:
            made.append(" " + glyphs.spark(list(history.of.get(rank.dp_rank, ())), top, spark), "#009E73")
        return made

    heading = _heading(columns, sort, glyphs)
    if spark:
        heading.append(" " + _scale(top, spark, glyphs).rjust(spark))
    return heading, line


def _scale(top: float, width: int, glyphs: Glyphs) -> str:
    """What the sparklines show, and the number of requests that their highest sign stands for."""
    most = f"{'≤' if glyphs.unicode else '<='}{count(top)}"
    names = (f"requests {most}", f"history {most}", f"hist {most}", most)
    return next((name for name in names if len(name) <= width), "")


def frontend_table(
    width: int, glyphs: Glyphs, sort: Sort | None = None
) -> tuple[Text, Callable[[Frontend], Text]]:
    """The same for front-ends. At the right: requests in flight to each rank, and the share sent to each rank."""
    columns, rest = _fit(frontend_columns(glyphs), width, spare=22)
    half = max(0, (rest - 2) // 2)

    def line(frontend: Frontend) -> Text:
        made = _row(columns, frontend, dim=frontend.state in GONE)
        for values, style in ((frontend.in_flight_by_rank, "#E69F00"), (frontend.sent_by_rank, "#009E73")):
            made.append(" " + _by_rank(values, half, glyphs).ljust(half), style)
        return made

    heading = _heading(columns, sort, glyphs)
    all_names = (("in flight by rank", "sent by rank"), ("in flight", "sent to"), ("flight", "sent"), ("", ""))
    names = next(pair for pair in all_names if len(pair[0]) <= half)
    return heading.append(f" {names[0]:<{half}} {names[1]}"[: rest + 1]), line


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


def _heading(columns: Sequence[Column[T]], sort: Sort | None, glyphs: Glyphs) -> Text:
    """The titles; a sign stands beside that of the column by which the rows are sorted."""
    heading = Text(style="dim", no_wrap=True)
    for i, column in enumerate(columns):
        marked = sort is not None and sort.title == column.title
        sign = glyphs.sort_sign(reverse=sort.reverse) if sort is not None and marked else ""
        title = column.title + sign if column.left else sign + column.title
        width = column.width + (0 if column.left or not i else 1)  # the gap before it is free for the sign
        cell = title.ljust(width) if column.left else title.rjust(width)
        if i and column.left:
            cell = " " + cell
        heading.append(cell, "bold not dim" if marked else "")
    return heading


def _row(columns: Sequence[Column[T]], item: T, *, dim: bool) -> Text:
    line = Text(no_wrap=True)
    for i, column in enumerate(columns):
        value = column.cell(item)
        cell = value if isinstance(value, Text) else Text(value, "dim" if dim else "")
        cell.truncate(column.width)
        padding = " " * (column.width - cell.cell_len)
        if i:
            line.append(" ")
        if column.left:
            line.append_text(cell).append(padding)
        else:
            line.append(padding).append_text(cell)
    return line
