"""How every chart looks: colours and ink that can be read on a white page and on a dark one, and enough pixels.

A page shows the same file in light and dark mode. So the background is transparent, and ink and colours have a
contrast of at least 3 to white and to the dark page of GitHub (#0d1117); `test_bench.py` computes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INK = "#777777"
GREEN, TEAL = "#238b45", "#2a8fa3"
PURPLE, RED, ORANGE, GREY = "#9c5fb0", "#d9432f", "#c4711b", "#868686"
COLOURS = (INK, GREEN, TEAL, PURPLE, RED, ORANGE, GREY)
DPI = 180
"""Twice the pixels that a page shows: sharp on dense screens."""
_INKED: tuple[Any, ...] = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")


@contextmanager
def chart(path: Path, width: float, height: float) -> Iterator[Any]:
    """Gives the axes of a chart of that size in inches, and writes it when they are drawn."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    with mpl.rc_context(dict.fromkeys(_INKED, INK)):
        figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
        yield axes
        axes.spines[["top", "right"]].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, transparent=True, pil_kwargs={"optimize": True})
        plt.close(figure)


def contrast(one: str, other: str) -> float:
    """The contrast of two colours as WCAG defines it: 1 to 21."""
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
