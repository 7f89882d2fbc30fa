"""The words of a rank's row that are carried to a board on another node, read from the board in a few pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpshm.board.layout import CARRIED_WORDS

if TYPE_CHECKING:
    from dpshm.board.board import Board


def carried_places(board: Board, dp_rank: int) -> list[int]:
    """Where each of these words is, in the order of `layout.CARRIED_WORDS`."""
    return [board.index(name, dp_rank, item) for name, item in CARRIED_WORDS]


class CarriedWords:
    """Those of one rank."""

    def __init__(self, board: Board, dp_rank: int) -> None:
        runs: list[list[int]] = []
        for at in carried_places(board, dp_rank):
            if runs and at == runs[-1][1]:
                runs[-1][1] += 1
            else:
                runs.append([at, at + 1])
        self._runs = [board.words[begin:end] for begin, end in runs]

    def read(self) -> bytes:
        """All of them, 8 bytes each, little-endian as the board is (`dpshm.board.layout`)."""
        # SYNC: memory is copied in aligned units of 8 bytes or more: each word is whole (x86 and Arm). Two words
        # may be of different moments, as for every reader.
        return b"".join(self._runs)
