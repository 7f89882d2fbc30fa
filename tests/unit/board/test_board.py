"""The board's views and facts, and its locks across real processes: killed, forked, racing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from dpshm import Engine, Frontend
from dpshm.board import files, layout
from dpshm.board.board import Board
from dpshm.board.header import PREAMBLE
from dpshm.board.locks import coordinator_byte
from dpshm.board.segment import Segment
from dpshm.board.snapshot import SNAPSHOT_DTYPE
from dpshm.board.words import (
    DRAINED,
    ON_BEHALF,
    PAUSED_BY_USER,
    RUNNING,
    pack_control,
    pack_load,
    pack_progress,
    pack_state,
)
from dpshm.coordinator.row import CoordinatorRow
from dpshm.errors import SegmentNotFound
from dpshm.ops.read_frame import read_frame
from dpshm.rules.liveness import Verdict
from dpshm.rules.waves import Phase
from tests.support import LoneBoard
from tests.unit.board.headers import ENV, header


@pytest.fixture
def board(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    """A new board with 4 rows for engines and 3 for front-ends; 3 ranks take part, and a coordinator watches."""
    monkeypatch.setattr("dpshm.board.presence.COORDINATOR_SILENCE_NS", MINUTE_NS)  # however slow this machine is
    with closing(Board(Segment.create(header()))) as made:
        made.words[made.index("dp_size")] = 3
        made.coordinator_beat[0] = time.monotonic_ns()
        yield made


@contextmanager
def child(code: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs `code` and has said that it is ready."""
    imports = (
        "import os\nfrom dpshm.board.board import Board\nfrom dpshm.board.header import Header, make_header\n"
        "from dpshm.board.segment import Segment\nfrom dpshm.board.sweep import sweep\n"
    )
    env = {**ENV, "DPSHM_DIR": os.environ["DPSHM_DIR"]}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", imports + code], stdin=pipe, stdout=pipe, text=True, env=env
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


MINUTE_NS = 60 * 10**9
ATTACH = "board = Board.attach('g', readonly=False)"
WAIT = "print('ready', flush=True); input()"


def wait_until(condition: Callable[[], object]) -> None:
    """Waits for what another process is about to do; gives up only where it would hang for ever."""
    for _ in range(20_000):
        if condition():
            return
        time.sleep(0.001)
    pytest.fail("it never happened")


# Views.


def test_every_column_is_where_index_says(board: Board):
    """Guards against a view and a store that mean different words."""
    rng = np.random.default_rng(0)
    np.asarray(board.words)[512:] = rng.integers(0, 1 << 40, len(board.words) - 512)
    for name, column in board.segment.header.columns.items():
        if name == "dp_size":
            continue
        view = getattr(board, name)
        assert view.shape == column.shape
        assert view.dtype == np.int64
        for at in np.ndindex(column.shape):
            assert view[at] == board.words[board.index(name, *at)], (name, at)


@pytest.mark.parametrize("at", [("load", 4), ("load", -1), ("load", 0, 1), ("sent_tokens", 3, 0), ("owner", 0, 6)])
def test_index_refuses_what_is_outside(board: Board, at: tuple[object, ...]):
    """Guards against a rank or an index from a message that lands in another process's row."""
    with pytest.raises(IndexError, match="is outside"):
        board.index(*at)
    with pytest.raises(KeyError):
        board.index("no such column")


def test_a_board_is_read_only_unless_asked_for(board: Board):
    """Guards against a tool that changes what it shows."""
    with closing(Board.attach("g")) as tool:
        for name in tool.segment.header.columns.keys() - {"dp_size"}:
            assert not getattr(tool, name).flags.writeable, name
        with pytest.raises(TypeError):
            tool.words[tool.index("load")] = 1
        with pytest.raises(ValueError, match="read-only"):
            tool.load[0] = 1
        assert tool.coordinator_alive()
    with closing(Board.attach("g", readonly=False)) as writer:
        writer.load[0] = 7
        assert board.load[0] == 7


def test_views_that_outlive_a_board_can_be_read(board: Board):
    """Guards against a crash of a process that kept an array, and against a lock that this array would keep."""
    other = Board.attach("g", readonly=False)
    assert other.lock_engine(1)
    kept, whole = other.load, np.frombuffer(other.words)
    other.close()
    board.load[2] = 9
    assert kept[2] == 9
    assert whole.nbytes == board.segment.header.size
    assert other.load[2] == 9
    assert not board.engine_alive(1)


def newer(**columns: list[object]) -> None:
    """Makes the board's header that of a later minor version, with these columns."""
    path = files.segment_path("g")
    page = path.read_bytes()[: layout.PAGE_BYTES]
    fields = msgspec.json.decode(page[20 : 20 + int.from_bytes(page[12:16], "little")])
    fields["columns"].update(columns)
    blob = msgspec.json.encode(fields)
    version = layout.VERSION_MAJOR, layout.VERSION_MINOR + 1
    with path.open("r+b") as f:
        f.write(PREAMBLE.pack(layout.MAGIC, *version, len(blob), zlib.crc32(blob)) + blob)


@pytest.mark.parametrize("name", ["something_new", "words", "segment", "close", "snapshot"])
def test_whatever_a_newer_version_calls_its_columns(board: Board, name: str):
    """Guards against a column of a later version that hides or removes an attribute of the board."""
    newer(**{name: [4216, [1], [128]]})
    tool = Board.attach("g")
    assert tool.snapshot().shape == (3,)
    tool.close()
    assert not tool.segment.usable


def test_locks_are_where_a_newer_version_has_its_rows(board: Board):
    """Guards against a tool that takes the rows of a later version for dead because they are wider there."""
    at = board.segment.header.columns["engine_state"].offset
    newer(engine_state=[at, [4], [256]])
    board.segment.locks.lock(at + 256)
    with closing(Board.attach("g")) as tool:
        assert [tool.engine_alive(e) for e in range(4)] == [False, True, False, False]


# Facts.


def test_facts_of_the_coordinator(board: Board):
    """Guards against a wave read with the wrong bits, and a size beyond the rows, whatever the word says."""
    board.control[0] = pack_control(12, Phase.WAKING)
    assert (board.wave, board.phase) == (12, Phase.WAKING)
    for word, size in ((3, 3), (0, 0), (-1, 0), (4, 4), (5, 4), (1 << 62, 4)):
        board.words[board.index("dp_size")] = word
        assert board.dp_size == size
        assert len(board.snapshot()) == size


def take_front_ends(board: Board, *marks: Verdict) -> None:
    """Front-ends take the first rows, and are marked so."""
    for f, mark in enumerate(marks):
        board.frontend_incarnation[f], board.frontend_pid[f], board.frontend_mark[f] = 1, 4000 + f, mark


def test_facts_of_front_ends(board: Board):
    """Guards against bookings of front-ends that are gone, and owners that a scribbled name hides."""
    assert board.frontends_used() == 0
    assert board.counted_frontends() == []
    take_front_ends(board, Verdict.ALIVE, Verdict.DEAD)
    assert board.frontends_used() == 2
    assert board.counted_frontends() == [0]
    take_front_ends(board, Verdict.ALIVE, Verdict.DEAD, Verdict.ABSENT)  # the third has just come
    assert board.counted_frontends() == [0, 2]
    board.frontend_pid[0] = 0  # the first left in good order
    assert board.counted_frontends() == [2]
    board.owner[1] = np.frombuffer("höst:3".encode().ljust(48, b"\0"), np.int64)
    assert board.owner_of(1) == "höst:3"
    board.owner[1] = -2
    assert "\N{REPLACEMENT CHARACTER}" in board.owner_of(1)


def test_without_a_coordinator_the_locks_tell(board: Board):
    """Guards against the verdicts of a coordinator that died, which no process takes back."""
    take_front_ends(board, Verdict.ALIVE, Verdict.DEAD, Verdict.ALIVE)
    board.engine_pid[:] = [11, 12, 0, 0]
    board.engine_mark[:] = [Verdict.ALIVE, Verdict.DEAD, Verdict.ALIVE | ON_BEHALF, 0]
    with closing(Board.attach("g", readonly=False)) as group, closing(Board.attach("g")) as tool:
        assert group.lock_engine(1)
        assert group.lock_frontend(1)
        assert tool.is_watched()
        assert tool.engine_verdicts() == [Verdict.ALIVE, Verdict.DEAD, Verdict.ALIVE]
        assert tool.counted_frontends() == [0, 2]
        board.coordinator_beat[0] = time.monotonic_ns() - MINUTE_NS
        assert not tool.is_watched()
        assert tool.engine_verdicts() == [Verdict.DEAD, Verdict.ALIVE, Verdict.ALIVE]
        assert tool.counted_frontends() == [1]
        assert [row["state"] for row in tool.snapshot()] == ["dead", "idle", "idle"]
        board.coordinator_beat[0] = time.monotonic_ns()  # the next one has just begun
        assert tool.is_watched()


@pytest.mark.parametrize("ahead_ns", [1000 * 10**9, 1 << 62])
def test_a_beat_from_the_future_is_not_a_fresh_one(board: Board, ahead_ns: int):
    """Guards against a scribbled beat, or one of another time namespace, that keeps a dead coordinator alive."""
    board.coordinator_beat[0] = time.monotonic_ns() + ahead_ns
    assert not board.is_watched()
    board.coordinator_beat[0] = time.monotonic_ns() + 10**9  # stored a moment after our clock was read
    assert board.is_watched()


def test_a_snapshot_counts_reported_and_in_flight(board: Board):
    """Guards against a rank that looks idle while requests are in flight, or twice as busy."""
    words = board.words
    words[board.index("load", 1)] = pack_load(2, 30, 1.0)
    board.request_offset[1] = 32 - sum([3, 0, 4])
    board.token_offset[1] = 900 - sum([12, 0, 80])
    words[board.index("prefill_backlog", 1)] = 900
    words[board.index("engine_state", 1)] = pack_state(7, RUNNING)
    words[board.index("progress", 1)] = pack_progress(7, 17)
    words[board.index("beat", 1)] = 1000
    words[board.index("step_start", 1)] = 1400
    words[board.index("engine_pid", 1)] = 4242
    words[board.index("steps", 1)] = 99
    words[board.index("preemptions", 1)] = 3
    words[board.index("engine_mark", 1)] = Verdict.ALIVE | ON_BEHALF
    board.cache_state[1] = (4096, 16, 500, 40, 7000, 300, 1)
    board.step_model[1, layout.STEP_WORDS.index("held_tokens")] = 600
    take_front_ends(board, Verdict.ALIVE, Verdict.DEAD, Verdict.ALIVE)
    board.sent_requests[:, 1] = [5, 100, 3]  # the second front-end is dead: its bookings do not count
    board.received_requests[1] = [3, 0, 4]  # the third restarted: a negative difference counts as 0
    board.sent_tokens[:, 1] = [512, 9, 0]
    board.received_tokens[1] = [12, 0, 80]
    row = board.snapshot(1500)[1]
    assert {name: row[name].item() for name in SNAPSHOT_DTYPE.names} == {
        "dp_rank": 1, "state": "running", "verdict": "alive", "drained": False, "stock": True, "remote": False,
        "waiting": 2, "running": 30, "in_flight": 2, "requests": 34, "kv_cache_usage": 1.0,
        "prefill_backlog": 1400, "in_flight_tokens": 500, "wave": 7, "step": 17, "age_ns": 500, "step_age_ns": 100,
        "incarnation": 0, "pid": 4242, "steps": 99, "dummy_steps": 0, "busy_ns": 0, "prompt_tokens": 0,
        "generation_tokens": 0, "requests_finished": 0, "preemptions": 3, "held_tokens": 600,
        "has_index": True, "block_tokens": 16, "num_blocks": 500, "blocks_in_use": 40,
        "cached_tokens": 7000, "indexed_blocks": 300, "dropped_blocks": 1,
    }  # fmt: skip
    untouched = board.snapshot()[0]
    assert (untouched["state"], untouched["requests"], untouched["age_ns"]) == ("absent", 0, -1)
    assert board.snapshot(900)[1]["age_ns"] == 0  # a beat from a moment after `now`


@pytest.mark.parametrize(
    ("mark", "flags", "phase", "state"),
    [
        (Verdict.ABSENT, RUNNING, Phase.RUNNING, "absent"),
        (Verdict.DEAD | DRAINED, RUNNING, Phase.RUNNING, "dead"),
        (Verdict.STALLED, RUNNING, Phase.RUNNING, "stalled"),
        (Verdict.ALIVE | DRAINED, RUNNING, Phase.RUNNING, "drained"),
        (Verdict.ALIVE, PAUSED_BY_USER, Phase.RUNNING, "paused"),
        (Verdict.ALIVE, RUNNING, Phase.WAKING, "running"),
        (Verdict.ALIVE, 0, Phase.WAKING, "waking"),
        (Verdict.ALIVE, 0, Phase.RUNNING, "idle"),
        (Verdict.ALIVE, 0, Phase.PAUSED, "idle"),
    ],
)
def test_states_in_a_snapshot(board: Board, mark: int, flags: int, phase: Phase, state: str):
    """Guards against a state that hides a worse one."""
    board.engine_mark[0] = mark
    board.engine_state[0] = pack_state(3, flags)
    board.control[0] = pack_control(3, phase)
    assert board.snapshot()[0]["state"] == state


def test_a_rank_that_stands_still_is_silent(group, using):
    """Guards against a rank that is stopped between two steps and looks healthy until its stall time is up."""
    board = using(LoneBoard(group))
    engine = using(Engine.attach(group, 0))
    for _ in range(3):
        with engine.step(batch=5):
            pass
    engine.publish(waiting=0, running=5)
    now_ns = time.monotonic_ns()
    late_ns = now_ns + 20 * int(board.busy_ns[0]) // 3 + 3_000_000_000
    assert board.snapshot(now_ns)[0]["state"] != "silent"
    assert board.snapshot(late_ns)[0]["state"] == "silent"
    board.engine_time_namespace[0] += 1  # its clock tells nothing here
    assert board.snapshot(late_ns)[0]["state"] != "silent"
    assert board.snapshot(late_ns)[0]["age_ns"] == -1
    board.engine_time_namespace[0] -= 1
    engine.publish(waiting=0, running=0)
    assert board.snapshot(late_ns)[0]["state"] != "silent"


@pytest.mark.parametrize("waves", [False, True])
def test_a_state_is_read_in_one_way(group, using, waves):
    """Guards against a front-end and tools that disagree: an idle dense engine was running for ever in one."""
    board = using(LoneBoard(group, waves=waves, dp_size=1))
    engine, frontend = using(Engine.attach(group, 0)), using(Frontend.attach(group))
    seen = []
    for running in (0, 1, 0):
        if running:
            engine.receive(None)
        engine.publish(waiting=0, running=running)
        states = {str(frontend.snapshot()[0]["state"]), read_frame(board).ranks[0].state}
        seen.append(states)
    if waves:
        assert seen == [{"idle"}, {"running"}, {"running"}]  # it steps until the wave ends
    else:
        assert seen == [{"idle"}, {"running"}, {"idle"}]


@pytest.mark.parametrize("seed", range(20))
def test_a_snapshot_of_scribbled_memory_is_a_snapshot(board: Board, seed: int):
    """Guards against one process that writes rubbish and so stops all tools, and the watch of all others."""
    rng = np.random.default_rng(seed)
    extremes = np.array([-(1 << 63), -(1 << 63) + 1, -1, 0, 1, 3, (1 << 63) - 1, (1 << 63) - 2, 1 << 62])
    np.asarray(board.words)[512:] = rng.choice(extremes, len(board.words) - 512)
    board.words[board.index("dp_size")] = 4
    rows = board.snapshot(time.monotonic_ns())
    assert len(rows) == 4
    for name in (
        "waiting",
        "running",
        "in_flight",
        "requests",
        "prefill_backlog",
        "in_flight_tokens",
        "wave",
        "step",
    ):
        assert (rows[name] >= 0).all(), name
    assert (rows["age_ns"] >= -1).all()


def test_nobody_waits_for_a_coordinator_that_is_not_there(board: Board):
    """Guards against an engine that cannot start while no coordinator runs."""
    asked: list[bool] = []
    with closing(Board.attach("g")) as other:
        other.wait_for_coordinator(lambda: asked.append(True) or len(asked) > 2)
        assert len(asked) == 3  # one lives: the wait ends with the condition
        board.segment.locks.unlock(coordinator_byte(board.segment.header.columns))
        other.wait_for_coordinator(lambda: asked.append(True))
        assert len(asked) == 4


class AmidError(Exception):
    """Raised where a coordinator is held up."""


class UpToRevision:
    """Words whose writer is held up before it stores the revision."""

    def __init__(self, board: Board) -> None:
        self._words, self._last = board.words, board.index("revision")

    def __getitem__(self, at: int) -> int:
        return self._words[at]

    def __setitem__(self, at: int, value: int) -> None:
        if at == self._last:
            raise AmidError
        self._words[at] = value


def test_a_wait_ends_once_the_next_decision_follows_it(board: Board, monkeypatch: pytest.MonkeyPatch):
    """Guards against an attach, or a drain, that returns an instant before front-ends can know of the mark."""
    marks = CoordinatorRow(board)
    marks.set_engine(0, verdict=Verdict.DEAD)
    marks._words = UpToRevision(board)  # type: ignore[assignment]
    with pytest.raises(AmidError):
        marks.set_engine(1, verdict=Verdict.ALIVE)
    before, seen = int(board.revision[0]), []

    def go_on(_seconds: float) -> None:
        seen.append(int(board.revision[0]))
        board.revision[0] += 1

    with closing(Board.attach("g")) as other, monkeypatch.context() as held_up:
        assert other.engine_mark[1] == Verdict.ALIVE.value
        held_up.setattr("dpshm.board.board.time.sleep", go_on)
        other.wait_for_coordinator(lambda: other.engine_mark[1])
        other.wait_for_coordinator(lambda: other.engine_mark[1])
    assert (seen, int(board.revision[0])) == ([before], before + 1)


# Processes.


@pytest.mark.parametrize("killed", [True, False])
def test_the_end_of_a_process_is_the_end_of_its_locks_alone(board: Board, killed: bool):
    """Guards against a dead engine that looks alive, and against a segment that goes with its user (gh-82300)."""
    with child(f"{ATTACH}; board.lock_engine(2); board.lock_frontend(1); board.load[2] = 5; {WAIT}") as process:
        assert [board.engine_alive(e) for e in range(4)] == [False, False, True, False]
        assert [board.frontend_alive(f) for f in range(3)] == [False, True, False]
        assert not board.lock_engine(2)
        if killed:
            process.kill()
        else:
            process.stdin.close()
        wait_until(lambda: not board.engine_alive(2))
        wait_until(lambda: not board.frontend_alive(1))
    assert board.lock_engine(2)
    assert board.segment.linked
    assert board.load[2] == 5


def test_a_forked_child_keeps_no_lock_and_no_handle(board: Board):
    """Guards against an engine that died and looks alive because a worker that it forked lives on."""
    code = (
        f"{ATTACH}; assert board.lock_engine(2)\n"
        "if os.fork():\n    os.wait()\n"
        "assert not board.segment.usable\n"
        "print(type(board.segment.why_unusable()).__name__, flush=True); input()\n"
        "print(board.load[2], flush=True); board.close(); print('closed', flush=True)"
    )
    with child(f"print('ready', flush=True); {code}") as process:
        assert process.stdout.readline() == "HandleForked\n"
        assert board.engine_alive(2)
        process.kill()  # the parent; its child waits for input
        wait_until(lambda: not board.engine_alive(2))
        board.load[2] = 31
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "31\n"
        assert process.stdout.readline() == "closed\n"


def test_a_child_that_closes_its_copy_leaves_the_parents_handle(board: Board):
    """Guards against a forked child whose clean-up takes the parent's lock or descriptor away."""
    code = f"{ATTACH}; board.lock_engine(2)\nif not os.fork():\n    board.close(); os._exit(0)\nos.wait(); {WAIT}"
    with child(code):
        assert board.engine_alive(2)


def test_of_two_that_create_one_group_one_wins(board: Board):
    """Guards against two coordinators of one group, and against finding half a segment while it is made."""
    rounds = 60
    code = (
        f"{ATTACH}; print('ready', flush=True); me = int(input()); won, kept = [], []\n"
        f"for i in range({rounds}):\n"
        "    name = f'race{i}'; addresses = dict.fromkeys(Header.__struct_fields__[4:7], '')\n"
        "    header = make_header(name, 2, 2, settings={}, **addresses)\n"
        "    board.load[me] = i + 1\n"
        "    while board.load[1 - me] <= i: os.sched_yield()\n"  # both here: go
        "    try:\n        kept.append(Segment.create(header)); won.append(i)\n"
        "    except FileExistsError:\n"
        "        kept.append(Segment.attach(name))\n"
        "        assert kept[-1].locks.is_shared(), i\n"
        "        assert not sweep(name), i\n"
        "print(*won, flush=True); input()"
    )
    with child(code) as one, child(code) as two:
        for me, process in enumerate((one, two)):
            process.stdin.write(f"{me}\n")
            process.stdin.flush()
        won = [set(map(int, process.stdout.readline().split())) for process in (one, two)]
    assert won[0] | won[1] == set(range(rounds))
    assert not won[0] & won[1]


def test_an_unlink_by_another_process_is_noticed(board: Board):
    """Guards against an unlink that stays unnoticed."""
    with child(f"{ATTACH}; os.unlink(board.segment.path); {WAIT}"):
        assert not board.segment.linked
    with pytest.raises(SegmentNotFound):
        Board.attach("g")


def test_words_are_whole(board: Board):
    """Guards against a load that is half the old one and half the new one, in any way that readers load it."""
    busy, idle = pack_load((1 << 23) - 1, (1 << 24) - 1, 1.0), 0
    code = f"{ATTACH}; at = board.index('load', 1); words = board.words; print('ready', flush=True)\n"
    seen: set[int] = set()
    with child(f"{code}while True:\n    words[at] = {busy}\n    words[at] = {idle}"):
        at = board.index("load", 1)
        while len(seen) < 2:
            for _ in range(20_000):
                seen |= {board.words[at], int(board.load[1]), *board.load.tolist()}
            seen |= {int(word) for _ in range(2_000) for word in np.positive(board.load)}
    assert seen == {busy, idle}
