"""The display of a running demo on stderr: a live table on a terminal, else a line every two seconds."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from math import inf
from types import TracebackType

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dpshm.sim.demo.run import Sample

WIDTH_BESIDE = 108
"""Columns that both tables need beside each other."""
REFRESH_S = 0.25
LINE_S = 2.0


class Display(ABC):
    """Shows samples; a context that cleans up after itself."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._next_s = 0.0

    def show(self, sample: Sample) -> None:
        """Shows a sample, unless the last one was shown a moment ago."""
        now = time.monotonic()
        if now >= self._next_s:
            self._next_s = now + self._interval_s
            self._draw(sample)

    @abstractmethod
    def tell(self, line: str) -> None:
        """Prints a line that stays."""

    @abstractmethod
    def _draw(self, sample: Sample) -> None: ...

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return


class Lines(Display):
    """The display for logs and pipes."""

    def __init__(self) -> None:
        super().__init__(LINE_S)
        self._next_s = time.monotonic() + LINE_S

    def _draw(self, sample: Sample) -> None:
        self.tell(headline(sample))

    def tell(self, line: str) -> None:
        typer.echo(f"dpshm demo: {line}", err=True)


class LiveTable(Display):
    """The display for a terminal. It disappears when the demo ends, and the report takes its place."""

    def __init__(self, console: Console) -> None:
        super().__init__(REFRESH_S)
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def tell(self, line: str) -> None:
        self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _draw(self, sample: Sample) -> None:
        self._live.update(render(sample, self._live.console.width), refresh=True)

    def __enter__(self) -> Display:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()


def make_display() -> Display:
    """The display that fits stderr."""
    console = Console(stderr=True)
    return LiveTable(console) if console.is_terminal else Lines()


def headline(sample: Sample) -> str:
    """One line."""
    if sample.elapsed_s < 0:
        return sample.stage
    sent, answered = sum(sample.sent), sum(sample.answered)
    of = f" of {sample.seconds:.4g}" if sample.elapsed_s < sample.seconds < inf else ""
    wave = f"wave {sample.wave} {sample.phase}; " if sample.phase else ""
    return (
        f"{sample.stage}, {sample.elapsed_s:.0f} s{of}; {wave}"
        f"{sent} sent, {answered} answered, {sent - answered} unanswered"
    )


def render(sample: Sample, width: int) -> Group:
    """The headline above a row for each rank and, beside or below them, a row for each front-end."""
    title = Text(headline(sample), style="bold", no_wrap=True, overflow="ellipsis")
    ranks = Table("rank", "state", box=None, header_style="dim", pad_edge=False)
    for name in ("waiting", "running", "in_flight", "KV", "age", "steps"):
        ranks.add_column(name, justify="right", min_width=7)
    if sample.ranks is not None:
        for row in sample.ranks:
            ranks.add_row(
                str(row["dp_rank"]),
                str(row["state"]),
                str(row["waiting"]),
                str(row["running"]),
                str(row["in_flight"]),
                f"{row['kv_cache_usage']:.0%}",
                f"{row['age_ns'] / 1e6:.0f} ms" if row["age_ns"] >= 0 else "-",
                str(row["steps"]),
            )
    frontends = Table("front-end", box=None, header_style="dim", pad_edge=False)
    for name in ("sent", "answered"):
        frontends.add_column(name, justify="right", min_width=7)
    for index, (sent, answered) in enumerate(zip(sample.sent, sample.answered, strict=True)):
        frontends.add_row(str(index), str(sent), str(answered))
    if width < WIDTH_BESIDE:
        return Group(title, ranks, Text(), frontends)
    beside = Table.grid(padding=(0, 4))
    beside.add_row(ranks, frontends)
    return Group(title, beside)
