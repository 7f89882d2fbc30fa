"""Formats numbers for a table, bars and sparklines, in block characters or in ASCII."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEVELS = "▁▂▃▄▅▆▇█"
_ASCII_LEVELS = "_.-=+*#@"


class Glyphs(NamedTuple):
    """The characters that a terminal can show."""

    unicode: bool = True

    @property
    def separator(self) -> str:
        """The separator between the parts of a headline."""
        return " · " if self.unicode else " | "

    def sort_sign(self, *, reverse: bool) -> str:
        """The sign beside the title of the column by which rows are sorted."""
        return ("▴" if reverse else "▾") if self.unicode else ("^" if reverse else "v")

    def bar(self, fraction: float, width: int) -> str:
        """A bar of so many cells, in eighths of a cell."""
        fraction = min(1.0, max(0.0, fraction))
        if not self.unicode:
            return ("#" * round(fraction * width)).ljust(width, "-")
        eighths = round(fraction * width * 8)
        full, part = divmod(eighths, 8)
        return ("█" * full + (_EIGHTHS[part] if part else "")).ljust(width)

    def spark(self, values: Sequence[float | None], top: float, width: int) -> str:
        """The newest values, one cell each, against `top`; right-aligned. None leaves its cell empty."""
        levels = _LEVELS if self.unicode else _ASCII_LEVELS
        last = len(levels) - 1
        cells = [
            " " if v is None else levels[0 if top <= 0 or v <= 0 else min(last, max(1, round(v / top * last)))]
            for v in values[-width:]
        ]
        return "".join(cells).rjust(width)


def count(value: float | None) -> str:
    """A count in at most five characters: 0, 0.4, 999, 1.2k, 34k, 5.6M."""
    if value is None:
        return "-"
    if value < 10 and value != int(value):
        return f"{value:.1f}"
    for limit, unit in ((1e3, ""), (1e6, "k"), (1e9, "M"), (1e12, "G")):
        if value < limit * 0.9995:
            scaled = value / (limit / 1e3)
            return f"{scaled:.1f}{unit}" if unit and scaled < 9.95 else f"{scaled:.0f}{unit}"
    return f"{value / 1e12:.0f}T"


def duration(seconds: float | None) -> str:
    """A time in at most five characters: 0.3ms, 12ms, 1.2s, 45s, 12m, 3.4h, 12d."""
    if seconds is None:
        return "-"
    if seconds < 0.00995:
        return f"{seconds * 1e3:.1f}ms"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f}ms"
    for limit, per, unit in ((99.5, 1, "s"), (99.5 * 60, 60, "m"), (99.5 * 3600, 3600, "h")):
        if seconds < limit:
            scaled = seconds / per
            return f"{scaled:.1f}{unit}" if scaled < 9.95 else f"{scaled:.0f}{unit}"
    return f"{seconds / 86400:.0f}d"
