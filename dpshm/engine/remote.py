"""An engine on another node than its group's board: the same row, in memory of its own, carried to the board.

`CarriedRow` writes its row as every engine does, on a board that no other process can open. Each publication goes,
as one message with the whole row, to the coordinator, which writes it to the group's board
(`dpshm.coordinator.remote_rows`). The message is made in the engine's thread, so what it says of the queue and of
the requests received is of one moment: a request that the queue counts is one that was received.

A remote engine has no doorbell and no prefix index; START comes from the coordinator.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from functools import wraps
from operator import index
from typing import Any, Concatenate, ParamSpec, Self

from dpshm.board.board import Board
from dpshm.board.carried import CarriedWords
from dpshm.board.header import make_header
from dpshm.board.layout import DEFAULT_FRONTENDS, MAX_ENGINES, MAX_FRONTENDS
from dpshm.board.segment import Segment
from dpshm.board.words import unpack_load, unpack_progress
from dpshm.engine.carrier import Carrier
from dpshm.engine.handle import Engine
from dpshm.engine.row import EngineRow
from dpshm.engine.step import StepOffsets, StepTimer
from dpshm.engine.taking import initialise
from dpshm.errors import SettingError
from dpshm.linux.descriptors import explained
from dpshm.net import wire
from dpshm.net.keys import ENVIRONMENT, HEADER_SETTING, Folder, client_keys, keys_for

_PROCESS_BITS = 61


_P = ParamSpec("_P")


def _carried(store: Callable[Concatenate[EngineRow, _P], None]) -> Callable[Concatenate[Any, _P], None]:
    """A method that stores as the row's own does, and then sends the load."""

    @wraps(store)
    def store_and_carry(self: CarriedRow, /, *args: _P.args, **options: _P.kwargs) -> None:
        store(self, *args, **options)
        self._carry_load()

    return store_and_carry


class CarriedStep(StepTimer):
    """A step timer that also tells when a step begins."""

    def __init__(self, words: memoryview, offsets: StepOffsets, began: Callable[[], None]) -> None:
        super().__init__(words, offsets)
        self._began = began

    def __enter__(self) -> Self:
        super().__enter__()
        self._began()
        return self


class CarriedRow(EngineRow):
    """A rank's row on another node. Made with `connect`; belongs to the thread that made it."""

    _carrier: Carrier | None = None

    def __init__(self, board: Board, dp_rank: int, *, owners: Sequence[str] = (), **options: Any) -> None:
        if board.segment.linked:
            raise SettingError("an engine beside its board attaches to it with `Engine.attach`")
        keys = keys_for(board.segment.header, options.get("curve_dir"))
        self._names: Sequence[str | int] = owners or range(board.frontends)
        self._process = 1 + secrets.randbits(_PROCESS_BITS)
        self._report = 0
        self._counted = -1
        self._received = wire.pack_received(())
        self._carried = CarriedWords(board, dp_rank)
        super().__init__(board, dp_rank, **options)
        places = ("step_start", "steps", "step_model")
        offsets = StepOffsets(*(board.index(name, dp_rank) for name in places))
        self._step = CarriedStep(board.words, offsets, self._carry)
        self._carrier = Carrier(board.segment.header.engine_output_address, keys)
        self._carry()

    @classmethod
    @explained()
    def connect(
        cls,
        addresses: tuple[str, str],
        dp_rank: int,
        *,
        waves: bool = True,
        max_frontends: int = DEFAULT_FRONTENDS,
        owners: Sequence[str] = (),
        server_key: str | None = None,
        **options: Any,
    ) -> Self:
        """Takes a rank of a group whose board is on another node. Does not wait for its coordinator.

        Args:
            addresses: `engine_addresses` of the coordinator, over tcp.
            dp_rank: the rank.
            waves: whether the group's ranks run in lockstep.
            max_frontends: rows for front-ends, as the coordinator has them.
            owners: the names under which front-ends took their rows, if requests are not stamped with the number
                of the row but with a place in this list.
            server_key: the coordinator's, if its sockets ask for keys.
            options: of a subclass's constructor.

        Raises:
            SettingError: a number is out of range, or the keys cannot be used.
        """
        dp_rank, frontends = index(dp_rank), len(owners) or index(max_frontends)
        if not (0 <= dp_rank < MAX_ENGINES and 1 <= frontends <= MAX_FRONTENDS):
            raise SettingError(
                f"dp_rank {dp_rank} must be from 0 to {MAX_ENGINES - 1}, and front-ends {frontends} from 1 to "
                f"{MAX_FRONTENDS}"
            )
        header = make_header(
            *(f"remote-{os.getpid()}", dp_rank + 1, frontends),
            stats_address="",
            engine_input_address=addresses[0],
            engine_output_address=addresses[1],
            settings={"waves": waves, HEADER_SETTING: server_key},
        )
        board = Board(Segment.nameless(header))
        try:
            initialise(board, dp_rank)
            return cls(board, dp_rank, owners=owners, **options)
        except BaseException:
            board.close()
            raise

    def show(self, wave: int, *, running: bool, paused: bool = False) -> None:
        """Stores and sends what this rank's own wave machine says; see `EngineRow.show`."""
        before = self._words[self._at_state]
        super().show(wave, running=running, paused=paused)
        if self._words[self._at_state] != before:
            self._carry()

    publish = _carried(EngineRow.publish)

    def _carry_load(self) -> None:
        """Sends what `publish` stored, and what was received."""
        if self._counted != self._all_requests:
            self._counted = self._all_requests
            counts = zip(self._names, self._received_requests, self._received_tokens, strict=False)
            self._received = wire.pack_received([wire.Received(*of_one) for of_one in counts if of_one[1]])
        self._carry()

    def close(self) -> None:
        """Leaves the group, and says so."""
        if self._carrier is not None and self._segment.usable:
            self._check()
            carrier, self._carrier = self._carrier, None
            carrier.close(self._message(here=False))
        super().close()

    def _carry(self) -> None:
        if self._carrier is not None:
            self._carrier.carry(self._message())

    def _message(self, *, here: bool = True) -> bytes:
        words = self._words
        self._report += 1
        waiting, running, kv = unpack_load(words[self._at_load])
        wave, step = unpack_progress(words[self._at_progress])
        row = wire.RemoteRow(
            process=self._process,
            report=self._report,
            clock_ns=time.monotonic_ns(),
            here=here,
            words=self._carried.read(),
            received=self._received,
        )
        return wire.encode_remote_row(self.dp_rank, wire.SchedulerStats(running, waiting, step, wave, kv), row)


class RemoteEngine(CarriedRow, Engine):
    """`dpshm.Engine` on another node than the group's board: `connect` instead of `attach`."""

    @classmethod
    def connect(
        cls, addresses: tuple[str, str], dp_rank: int, *, curve_dir: Folder | None = None, **options: Any
    ) -> Self:
        """Takes a rank of a group whose board is on another node; see `CarriedRow.connect`.

        Args:
            addresses: `engine_addresses` of the coordinator, over tcp.
            dp_rank: the rank.
            curve_dir: folder of the group's keys; default: the environment's ``DPSHM_CURVE_DIR``. None of the two:
                the coordinator's sockets ask for none.
            options: of `CarriedRow.connect`.

        Raises:
            SettingError: a number is out of range, or the keys cannot be used.
        """
        folder = curve_dir or os.environ.get(ENVIRONMENT)
        if folder:
            options.update(server_key=client_keys(folder).server.decode(), curve_dir=folder)
        return super().connect(addresses, dp_rank, **options)
