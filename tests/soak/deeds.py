"""What is done to a soak's group: one random deed to a random process at a time.

Processes of all roles are killed with SIGKILL, stopped for a while, or told to leave. The coordinator is killed
and replaced, by one of several that start at once, or stopped. Strangers send rubbish to its sockets; the folder
of the sockets is removed; a rank is drained; a stock front-end asks for a wave that no request needs.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import zmq

from dpshm.net import wire
from tests.soak.group import SoakGroup
from tests.soak.members import Member
from tests.support import Remote, RemoteError

COORDINATOR_INTERVAL_S = 4.0
COORDINATOR_STOPPED_S = 0.8
RIVALS = 3
RUBBISH = (
    b"",
    b"\x00",
    b"\x93\x01\x02",
    b"\x92\x81\x80\x80\x03",
    b"\xc1" * 40,
    b"\xdf\xff\xff\xff\xff",
    bytes(9000),
)

DRAIN = """
from dpshm.ops.drain import set_drained
with Board.attach(group) as board:
    set_drained(board, [dp_rank], drained)
"""


class Deeds:
    """The deeds of one soak.

    Args:
        group: to which they are done.
        lots: which deed and to which process.
    """

    def __init__(self, group: SoakGroup, lots: random.Random) -> None:
        self._group, self._lots = group, lots
        self._drained: int | None = None
        self._next_coordinator = 0.0

    def begin_round(self) -> None:
        """The coordinator is left alone for a moment."""
        self._next_coordinator = time.monotonic() + COORDINATOR_INTERVAL_S / 2

    def any_process(self) -> None:
        """One deed to a process that is not the coordinator."""
        member = self._lots.choice([m for m in self._group.members if not m.untouched])
        deed = self._lots.choices(("kill", "stop", "leave"), (6, 2, 1))[0]
        if member.remote is None:
            self._group.start(member)
        elif deed == "kill":
            self._kill(member)
        elif member.stopped:
            self._group.go_on(member)
        elif deed == "stop":
            self._group.stop(member)
        else:
            self._group.leave(member)

    def _kill(self, member: Member) -> None:
        was_stopped = member.stopped
        self._group.kill(member)
        if not was_stopped and self._lots.random() < 0.7:  # else it stays away for a while
            self._group.start(member)

    def coordinator(self) -> None:
        """A deed to the coordinator or what it owns, if it is time for one."""
        if time.monotonic() < self._next_coordinator:
            return
        self._next_coordinator = time.monotonic() + COORDINATOR_INTERVAL_S / 2
        deeds: tuple[Callable[[], None], ...] = (
            self._replace, self._race, self._stop, self._remove_sockets, self._rubbish, self._wake, self._drain,
        )  # fmt: skip
        self._lots.choices(deeds, (4, 2, 2, 1, 2, 2, 2))[0]()

    def never_missing(self) -> None:
        """Kills one of each kind of which none was killed: on a slow machine a short soak has few deeds."""
        counts = self._group.counts
        for members in (self._group.engines, self._group.frontends):
            killed = sum(counts[f"{role}s killed"] for role in {member.role for member in members})
            member = next(m for m in members if not m.untouched)
            if not killed:
                if member.remote is None:
                    self._group.start(member)
                self._kill(member)
        if not counts["coordinators killed"]:
            self._replace()

    def _replace(self) -> None:
        self._group.kill_coordinator()
        time.sleep(self._lots.random() * 0.5)
        self._group.replace_coordinator(1)

    def _race(self) -> None:
        self._group.kill_coordinator()
        self._group.replace_coordinator(RIVALS)

    def _stop(self) -> None:
        pid = self._group.coordinator_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(COORDINATOR_STOPPED_S * self._lots.random())
        finally:
            os.kill(pid, signal.SIGCONT)
        self._group.counts["coordinators stopped"] += 1

    def _remove_sockets(self) -> None:
        shutil.rmtree(self._group.board.segment.sockets_path, ignore_errors=True)
        self._group.counts["folders of sockets removed"] += 1

    def _rubbish(self) -> None:
        header = self._group.board.segment.header
        for address, kind in ((header.engine_output_address, zmq.PUSH), (header.stats_address, zmq.XSUB)):
            self._send(address, kind, RUBBISH)
        self._group.counts["rubbish sent"] += 1

    def _wake(self) -> None:
        header, board = self._group.board.segment.header, self._group.board
        rank = self._lots.randrange(board.dp_size)
        self._send(header.stats_address, zmq.XSUB, [wire.encode_first_request(rank, board.wave)])
        self._group.counts["waves without a request asked for"] += 1

    def _send(self, address: str, kind: int, messages: Sequence[bytes]) -> None:
        context: zmq.Context[zmq.Socket[bytes]]
        with zmq.Context() as context, context.socket(kind) as s:
            s.setsockopt(zmq.LINGER, 200)
            s.connect(address)
            for message in messages:
                with suppress(zmq.Again):
                    s.send(message, zmq.DONTWAIT)

    def _drain(self) -> None:
        """Takes a rank out of routing, or the one that is out of it back."""
        if self._drained is not None:
            self.restore()
            return
        rank = self._lots.randrange(self._group.board.dp_size)
        if self._set_drained(rank, True):
            self._drained = rank
            self._group.counts["ranks drained"] += 1

    def restore(self) -> None:
        """Undoes what lasts."""
        if self._drained is not None and self._set_drained(self._drained, False):
            self._drained = None

    def _set_drained(self, dp_rank: int, drained: bool) -> bool:
        """Asks for it in a process of its own; whether it was heeded."""
        remote = Remote()
        try:
            remote.run(DRAIN, group=self._group.name, dp_rank=dp_rank, drained=drained)
        except RemoteError as e:
            if not str(e).startswith("NotHeeded"):
                raise
            return False
        finally:
            remote.close()
        return True
