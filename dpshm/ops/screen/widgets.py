"""The parts of the screen of ``dpshm top``: rows under a cursor, the filter's line, a question.

Only visible rows are drawn, so 256 ranks cost as much as 24.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
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
        """The width beside the scroll bar."""
        return self.scrollable_content_region.width

    def show(self, count: int, line: Callable[[int], Text]) -> None:
        """Replaces the lines by `count` new ones, and makes only those that are visible."""
        self._count, self._line = count, line
        self.virtual_size = Size(self.width, count)
        self.cursor = max(0, min(self.cursor, count - 1))
        self.refresh()

    def render_line(self, y: int) -> Strip:
        """One line of the screen."""
        at = y + int(self.scroll_offset.y)
        if at >= self._count:
            return Strip.blank(self.size.width, Style.null())
        # Every segment with a style: textual's filter for NO_COLOR fails at one without.
        rendered = self._line(at).render(self.app.console)
        segments = [Segment(text, style or Style.null(), control) for text, style, control in rendered]
        strip = Strip(segments).adjust_cell_length(self.size.width, Style.null())
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
        """Draws the cursor at its new place."""
        self.refresh()
        self.post_message(self.Moved())


class Confirm(ModalScreen[bool]):
    """Asks the user to confirm."""

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
        """Closes the question with the answer."""
        self.dismiss(yes)


class Help(ModalScreen[None]):
    """Shows a text until a key closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,question_mark,enter", "dismiss_help", "Close")]
    CSS = """
    Help > VerticalScroll { width: 100%; height: 100%; padding: 0 1; }
    """

    def __init__(self, text: Text) -> None:
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        """The text, which scrolls on a small terminal."""
        with VerticalScroll():
            yield Static(self._text)

    def action_dismiss_help(self) -> None:
        """Closes it."""
        self.dismiss()


class Filter(Input):
    """The input line of the filter. Closing it returns the keyboard to the rows before the next key is handled."""

    async def action_submit(self) -> None:
        """Accept the filter and close the input."""
        self.close()

    def open(self, text: str) -> None:
        """Opens the line and gives it the keyboard."""
        self.display = True
        self.value = text
        self.screen.set_focus(self)

    def close(self) -> None:
        """Closes the line and returns the keyboard to the rows."""
        self.display = False
        self.screen.set_focus(self.screen.query_one(Rows))
