"""The parts of the screen of ``dpshm top``: rows under a cursor, a line to filter by, a question.

Only what is visible of the rows is drawn, so 256 ranks cost what 24 do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from rich.style import Style
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.reactive import reactive
from textual.screen import ModalScreen
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widgets import Input, Static

_CURSOR = Style(reverse=True)


class Rows(ScrollView, can_focus=True):
    """Lines under a cursor."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", show=False),
        Binding("down,j", "move(1)", show=False),
        Binding("pageup", "move(-10)", show=False),
        Binding("pagedown", "move(10)", show=False),
        Binding("home", "move(-100000)", show=False),
        Binding("end", "move(100000)", show=False),
    ]
    cursor: reactive[int] = reactive(0)

    def __init__(self) -> None:
        super().__init__()
        self._count = 0
        self._line: Callable[[int], Text] = lambda _: Text()

    @property
    def width(self) -> int:
        """What is left beside the scroll bar."""
        return self.scrollable_content_region.width

    def show(self, count: int, line: Callable[[int], Text]) -> None:
        """Draws so many lines instead of those before; makes those that are seen."""
        self._count, self._line = count, line
        self.virtual_size = Size(self.width, count)
        self.cursor = max(0, min(self.cursor, count - 1))
        self.refresh()

    def render_line(self, y: int) -> Strip:
        """One line of the screen."""
        at = y + int(self.scroll_offset.y)
        if at >= self._count:
            return Strip.blank(self.size.width)
        segments = list(self._line(at).render(self.app.console))
        strip = Strip(segments).adjust_cell_length(self.size.width)
        return strip.apply_style(_CURSOR) if at == self.cursor else strip

    class Moved(Message):
        """The cursor moved."""

    def action_move(self, by: int) -> None:
        """Moves the cursor, and the view with it."""
        self.cursor = max(0, min(self.cursor + by, self._count - 1))
        top, height = int(self.scroll_offset.y), self.size.height
        if self.cursor < top:
            self.scroll_to(y=self.cursor, animate=False)
        elif self.cursor >= top + height:
            self.scroll_to(y=self.cursor - height + 1, animate=False)

    def watch_cursor(self) -> None:
        """Draws it where it is now."""
        self.refresh()
        self.post_message(self.Moved())


class Confirm(ModalScreen[bool]):
    """Asks before anything is done."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Yes"),
        Binding("n,escape,q", "answer(False)", "No"),
    ]
    CSS = """
    Confirm { align: center middle; }
    Confirm > Static { width: 60; max-width: 90%; height: auto; border: round white; padding: 1 2; }
    """

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        """The question."""
        yield Static(Text(f"{self._question}\n\n[y] yes   [n] no"))

    def action_answer(self, yes: bool) -> None:
        """Ends with the answer."""
        self.dismiss(yes)


class Filter(Input):
    """The line to type a filter into. It gives the keys back before the next one is looked at."""

    async def action_submit(self) -> None:
        """It is as it should be."""
        self.close()

    def open(self, text: str) -> None:
        """Takes the keys."""
        self.display = True
        self.value = text
        self.screen.set_focus(self)

    def close(self) -> None:
        """Gives them back to the rows."""
        self.display = False
        self.screen.set_focus(self.screen.query_one(Rows))
