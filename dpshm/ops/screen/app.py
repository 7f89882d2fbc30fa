"""The screen of ``dpshm top``: draws frames at an interval, with keys to arrange them and to drain ranks.

`dpshm.ops.screen.table` makes the lines of the rows, as for ``--once``; here they scroll under a cursor. The lines
that they leave free hold the front-ends and the newest events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import Footer, Input, Static

from dpshm.board.events import Event, EventReader
from dpshm.errors import DpshmError, SettingError
from dpshm.ops.drain import check_some_stay, set_drained
from dpshm.ops.frame import Frontend, Rank
from dpshm.ops.screen.filter import arrange, number
from dpshm.ops.screen.headline import below, headline
from dpshm.ops.screen.help import help_text
from dpshm.ops.screen.table import (
    CACHES,
    LATENCIES,
    Column,
    History,
    Sort,
    frontend_columns,
    frontend_table,
    rank_columns,
    rank_table,
    unmeasured,
)
from dpshm.ops.screen.text import Glyphs
from dpshm.ops.screen.widgets import Confirm, Filter, Help, Rows
from dpshm.ops.watcher import Watcher

T = TypeVar("T", Rank, Frontend)

EVENTS = 100
FEWEST_BELOW = 3
"""Fewer free lines below the rows stay empty."""


class Top(App[None]):
    """Draws a group until told to quit.

    Args:
        watcher: the watcher of the group.
        events: the reader of its events.
        interval_s: time between frames.
        glyphs: the characters that the terminal can show.
    """

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    Rows { overflow-x: hidden; scrollbar-size-vertical: 1; }
    #head { height: auto; }
    #title { height: 1; text-style: bold; }
    #filter { height: 1; border: none; padding: 0; display: none; }
    #mode { height: 1; dock: bottom; margin-bottom: 1; }
    #below { height: auto; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("ctrl+c", "quit", show=False, priority=True),  # also where a question or the help is open
        Binding("s", "sort", "Sort"),
        Binding("r", "reverse", "Reverse"),
        Binding("slash", "filter", "Filter", priority=True),  # before the next key is sent on
        Binding("tab", "switch", "View", priority=True),
        Binding("space", "pause", "Pause", key_display="spc"),
        Binding("d", "steer(True)", "Drain"),
        Binding("u", "steer(False)", "Undrain"),
        Binding("question_mark", "explain", "Help", key_display="?"),
        Binding("escape", "clear", show=False),
    ]

    def __init__(self, watcher: Watcher, events: EventReader, interval_s: float, glyphs: Glyphs) -> None:
        super().__init__()
        self._watcher = watcher
        self._event_reader = events
        self._events: deque[Event] = deque(maxlen=EVENTS)
        self._interval_s = interval_s
        self._glyphs = glyphs
        self._history = History()
        self._frame = watcher.read()
        self._without = LATENCIES | CACHES  # columns in which nothing was seen so far
        self._read_events()
        self._frontends = False
        self._sort = 0
        self._sorted_by: Column[Any] = rank_columns(glyphs)[0]
        self._reverse = False
        self._paused = False
        self._filter = ""
        self._message = ""
        self._shown: list[int] = []

    def compose(self) -> ComposeResult:
        """Makes the headline, the heading, the rows, the filter's line, the line for messages and the keys."""
        with Vertical(id="head"):
            yield Static(id="headline")
        yield Static(id="title")
        yield Rows()
        yield Static(id="below")
        yield Static(id="mode")
        yield Filter(id="filter", placeholder="filter: 3, 4-7, dead, part of an owner", compact=True)
        yield Footer(compact=True)

    def on_mount(self) -> None:
        """Starts the timer that draws frames."""
        self.theme = "ansi-dark"  # the terminal's own colours, whatever its background
        self.query_one(Rows).focus()
        self.set_interval(self._interval_s, self._read_frame)
        self.call_after_refresh(self._draw)

    def on_resize(self) -> None:
        """Chooses the columns again for the new width."""
        self.call_after_refresh(self._draw)

    def _read_frame(self) -> None:
        if not self._paused:
            self._frame = self._watcher.read()
            self._history.add(self._frame)
            self._read_events()
            self._draw()

    def _read_events(self) -> None:
        # Waves come and go many times a second, and would push out what an operator looks for.
        self._events.extend(e for e in self._event_reader.read() if not e.kind.startswith("wave"))

    def _draw(self) -> None:
        frame, glyphs, screen = self._frame, self._glyphs, self.screen_stack[0]
        rows = screen.query_one(Rows)
        width = rows.width
        self._without &= unmeasured(frame)
        if self._frontends:
            frontends = self._arrange(frame.frontends, frontend_columns(glyphs))
            title, frontend_line = frontend_table(width, glyphs, self._order)
            rows.show(len(frontends), lambda i: frontend_line(frontends[i]))
            self._shown = [number(f) for f in frontends]
        else:
            ranks = self._arrange(frame.ranks, rank_columns(glyphs, without=self._without))
            title, rank_line = rank_table(*(self._history, width, glyphs), without=self._without, sort=self._order)
            rows.show(len(ranks), lambda i: rank_line(ranks[i]))
            self._shown = [number(r) for r in ranks]
        head = headline(frame, self.size.width, glyphs, self.size.height)
        screen.query_one("#headline", Static).update(Text("\n").join(head))
        screen.query_one("#title", Static).update(title)
        self._draw_below(rows, len(head))
        screen.query_one("#mode", Static).update(Text(self._mode(), "dim"))

    def _draw_below(self, rows: Rows, head: int) -> None:
        """Gives the rows the lines that they need, and fills the free ones."""
        around = head + 3 + self.query_one(Filter).display  # title, mode, keys
        room = max(1, self.size.height - around)
        free = room - len(self._shown)
        rows.styles.height = max(1, len(self._shown)) if free >= FEWEST_BELOW else room
        lines = (
            below(
                *(self._frame, self._events, self.size.width, free, self._glyphs),
                frontends=not self._frontends,
            )
            if free >= FEWEST_BELOW
            else []
        )
        self.screen_stack[0].query_one("#below", Static).update(Text("\n").join(lines))

    @property
    def _order(self) -> Sort:
        return Sort(self._sorted_by.title, self._reverse)

    def _arrange(self, rows: Sequence[T], columns: list[Column[T]]) -> list[T]:
        self._sorted_by = columns[self._sort % len(columns)]
        return arrange(rows, self._sorted_by, reverse=self._reverse, text=self._filter)

    def _mode(self) -> str:
        """The active filter, shown so that a part of the rows is not taken for all."""
        parts = [f"by {self._sorted_by.title}" + (" reversed" if self._reverse else "")]
        if self._filter:
            of = self._frame.frontends if self._frontends else self._frame.ranks
            parts.append(f"filter {self._filter!r}: {len(self._shown)} of {len(of)}")
        if self._paused:
            parts.append("PAUSED")
        # Last: a narrow screen cuts it.
        row = self._under_cursor()
        if row is not None:
            what = f"rank {row.dp_rank}" if isinstance(row, Rank) else f"front-end {row.index} {row.owner}"
            if isinstance(row, Rank) and row.remote:
                what += " on another node"
            parts.append(f"{what}: pid {row.pid or '-'}, incarnation {row.incarnation}, dpshm {row.version}")
        return self._message or self._glyphs.separator.join(parts)

    def _under_cursor(self) -> Rank | Frontend | None:
        at = self.screen_stack[0].query_one(Rows).cursor
        if at >= len(self._shown):
            return None
        rows = self._frame.frontends if self._frontends else self._frame.ranks
        return next((row for row in rows if number(row) == self._shown[at]), None)

    # Keys.

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:  # noqa: ARG002 - Textual's
        """Lets only a question's own keys and Ctrl-C through while a question or the help is open."""
        return action == "quit" or not isinstance(self.screen, (Confirm, Help))

    def on_rows_moved(self) -> None:
        """Describes the row that the cursor moved to."""
        self.query_one("#mode", Static).update(Text(self._mode(), "dim"))

    def action_sort(self) -> None:
        """Sorts by the next column."""
        self._sort += 1
        self._draw()

    def action_reverse(self) -> None:
        """Reverses the order."""
        self._reverse = not self._reverse
        self._draw()

    def action_switch(self) -> None:
        """Switches between ranks and front-ends."""
        self._frontends = not self._frontends
        self._sort, self._reverse = 0, False
        self._draw()

    def action_explain(self) -> None:
        """Explains the columns, the states and the keys."""
        self.push_screen(Help(help_text(self._glyphs)))

    def action_pause(self) -> None:
        """Pauses or resumes drawing."""
        self._paused = not self._paused
        self._draw()

    def action_filter(self) -> None:
        """Opens the filter's line."""
        self.query_one(Filter).open(self._filter)

    def on_input_changed(self, event: Input.Changed) -> None:
        """Applies the filter while the user types it."""
        self._filter = event.value
        self._draw()

    def action_clear(self) -> None:
        """Removes the filter and the message."""
        self._filter = self._message = ""
        self.query_one(Filter).close()
        self._draw()

    def action_steer(self, drained: bool) -> None:
        """Drains the rank under the cursor or puts it back, once the user confirms."""
        row = self._under_cursor()
        if not isinstance(row, Rank):
            self._say("choose a rank first: Tab shows the ranks")
            return
        rank = row.dp_rank
        question = f"{'Drain' if drained else 'Undrain'} rank {rank} of group {self._frame.group}?"
        if drained:
            try:
                check_some_stay(self._frame, [rank])
            except SettingError:
                self._say(f"rank {rank} is the last to route to: dpshm drain {rank} --force")
                return
            question += " It finishes the requests that it has; new ones go elsewhere."

        def answered(yes: bool | None) -> None:
            if yes:
                self.run_worker(lambda: self._steer(rank, drained), thread=True)

        self.push_screen(Confirm(question), answered)

    def _steer(self, rank: int, drained: bool) -> None:
        """Drains or undrains in a thread of its own, because it waits for the coordinator."""
        try:
            set_drained(self._watcher.board, [rank], drained)
        except DpshmError as e:
            message = str(e)
        else:
            message = f"rank {rank} is {'drained' if drained else 'back in routing'}"
        self.call_from_thread(self._say, message)

    def _say(self, message: str) -> None:
        self._message = message
        self.set_timer(5.0, self._hush)
        self._draw()

    def _hush(self) -> None:
        self._message = ""
        self._draw()
