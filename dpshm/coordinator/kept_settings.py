"""The coordinator's settings on the board: its successor takes them over and says what differs.

The header holds what the processes of a group rely on, and never changes. All other settings are the coordinator's
own, and each coordinator stores its own in the column ``kept_settings``. The first word holds the length of a JSON
object (bits 0-15) and its checksum (bits 16-47); the object's bytes follow, padded with zeros.
"""

from __future__ import annotations

import logging
import zlib
from typing import Any

import msgspec

from dpshm.board.board import Board
from dpshm.board.layout import SETTINGS_WORDS, WORD_BYTES
from dpshm.coordinator.settings import Settings

logger = logging.getLogger(__name__)

MAX_BYTES = (SETTINGS_WORDS - 1) * WORD_BYTES
_NOT_KEPT = frozenset({"group", "dp_size"})
_LENGTH_BITS = 16


def keep(board: Board, settings: Settings) -> None:
    """Stores a coordinator's settings. Settings that need too many bytes are not kept."""
    fields = {name: value for name, value in msgspec.structs.asdict(settings).items() if name not in _NOT_KEPT}
    blob = msgspec.json.encode(fields)
    if len(blob) > MAX_BYTES:
        logger.warning("the settings of group %r are too long for the board to keep", settings.group)
        blob = b""
    words, at = board.words, board.index("kept_settings")
    words[at] = 0  # a reader of half a text finds no checksum
    padded = blob.ljust(-(-len(blob) // WORD_BYTES) * WORD_BYTES, b"\0")
    for i in range(len(padded) // WORD_BYTES):
        part = padded[i * WORD_BYTES : (i + 1) * WORD_BYTES]
        words[at + 1 + i] = int.from_bytes(part, "little", signed=True)
    words[at] = zlib.crc32(blob) << _LENGTH_BITS | len(blob)


def kept(board: Board) -> dict[str, Any]:
    """The settings of the board's newest coordinator; none if they were not kept, or are damaged."""
    words: list[int] = board.kept_settings.tolist()
    length, checksum = words[0] & (1 << _LENGTH_BITS) - 1, words[0] >> _LENGTH_BITS
    blob = b"".join(word.to_bytes(WORD_BYTES, "little", signed=True) for word in words[1:])[:length]
    if not blob or zlib.crc32(blob) != checksum:
        return {}
    try:
        found = msgspec.json.decode(blob, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return {}
    return {name: value for name, value in found.items() if name in Settings.__struct_fields__}


def differences(board: Board, settings: Settings) -> list[str]:
    """What a coordinator does otherwise than the one before it, for the log."""
    return [
        f"{name} is {_shown(name, getattr(settings, name))}, was {_shown(name, value)}"
        for name, value in kept(board).items()
        if getattr(settings, name) != value
    ]


def _shown(name: str, value: Any) -> str:
    """A setting's value as people write it."""
    return f"0o{value:o}" if name == "file_mode" and type(value) is int else repr(value)
