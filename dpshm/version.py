"""The version of this package, as text and as the word that every process stores in its row of the board."""

from __future__ import annotations

__version__ = "0.1.0"


def version_word(version: str = __version__) -> int:
    """The leading three numbers of a version, 16 bits each."""
    word = 0
    for part in [*version.split("."), "0", "0"][:3]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        word = word << 16 | min(int(digits or 0), 0xFFFF)
    return word


def version_text(word: int) -> str:
    """A version's word as text; "?" for 0, which stock processes leave there."""
    return f"{word >> 32 & 0xFFFF}.{word >> 16 & 0xFFFF}.{word & 0xFFFF}" if word > 0 else "?"
