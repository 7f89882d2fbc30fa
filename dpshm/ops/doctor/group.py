"""Checks of one group. They compare two frames half a second apart, so that a passing state is no finding."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator

from dpshm.board.board import Board
from dpshm.board.prefix_index import PrefixIndexReader, index_path
from dpshm.errors import DpshmError, SegmentError
from dpshm.linux import processes
from dpshm.net.keys import keys_for
from dpshm.ops.doctor.finding import Finding
from dpshm.ops.doctor.probe import connect_problem, publishes
from dpshm.ops.frame import Frame, Rank
from dpshm.ops.read_frame import read_frame

BETWEEN_LOOKS_S = 0.5
STALE_S = 10.0


def check_group(board: Board) -> list[Finding]:
    """Runs all checks of one group."""
    before = read_frame(board)
    time.sleep(BETWEEN_LOOKS_S)
    after = read_frame(board)
    return [
        *_coordinator(after),
        *_sockets(board, after),
        *_ranks(after),
        *_beyond(board, after),
        *_counters(board, before, after),
        *_versions(after),
        *_holders(board, after),
        *_namespaces(board),
        *_capacity(after),
        *_prefix_indexes(board, after),
    ]


def _coordinator(frame: Frame) -> Iterator[Finding]:
    c = frame.coordinator
    if c.state == "none":
        yield Finding(
            severity="error",
            check="coordinator",
            group=frame.group,
            what="no coordinator lives",
            why="routing goes on from the board; stalls are not seen, and lost wake-ups are not repeated",
            fix=f"dpshm coordinator --group {frame.group} --dp-size {frame.dp_size}    (takes the board over)",
        )
    elif c.state == "silent":
        yield Finding(
            severity="error",
            check="coordinator",
            group=frame.group,
            what=f"coordinator pid {c.pid} lives, and its beat has not moved for {c.beat_age_s:.0f} s",
            why="verdicts are old: dead ranks may still get requests",
            fix=f"kill -CONT {c.pid}    (if that does not help: kill -KILL {c.pid}, and start it again)",
        )


def _sockets(board: Board, frame: Frame) -> Iterator[Finding]:
    if frame.coordinator.state == "none":
        return
    if not board.segment.is_ours:  # its header may name any address
        yield Finding(
            severity="note",
            check="sockets",
            group=frame.group,
            what="the group is another user's, so its sockets were not asked",
            why="whether its coordinator answers is not known",
            fix="run this command as that user",
        )
        return
    header = board.segment.header
    named = {
        "front-ends'": header.stats_address,
        "engines' input": header.engine_input_address,
        "engines' output": header.engine_output_address,
    }
    problems: dict[str, list[str]] = defaultdict(list)
    for name, address in named.items():
        problem = connect_problem(address)
        if problem is not None:
            problems[problem].append(f"the {name} {address}")
    for problem, sockets in problems.items():
        yield Finding(
            severity="error",
            check="sockets",
            group=frame.group,
            what=f"a socket does not answer: {problem} ({', '.join(sockets)})",
            why="no wake-up reaches the ranks: a paused group stays asleep until an engine wakes the others",
            fix=f"restart the coordinator, pid {frame.coordinator.pid}; engines and front-ends reconnect",
        )
    if problems:
        return
    try:
        keys = keys_for(header)
    except DpshmError as e:
        yield Finding(
            severity="note",
            check="sockets",
            group=frame.group,
            what=f"the sockets require keys, and this command has none that fit: {e}",
            why="this command cannot ask the wave thread for an answer, and `dpshm drain` cannot reach it",
            fix="DPSHM_CURVE_DIR=DIR dpshm doctor",
        )
        return
    try:
        fine = publishes(header.stats_address, keys=keys)
    except DpshmError:
        fine = False
    if not fine:
        yield Finding(
            severity="error",
            check="sockets",
            group=frame.group,
            what=f"the socket {header.stats_address} accepts subscribers and tells them nothing",
            why="the coordinator's wave thread hangs: no wave is started or ended",
            fix=f"py-spy dump --pid {frame.coordinator.pid}, then restart the coordinator",
        )


def _ranks(frame: Frame) -> Iterator[Finding]:
    by_state: dict[str, list[Rank]] = defaultdict(list)
    for rank in frame.ranks:
        by_state[rank.state].append(rank)
    if dead := by_state["dead"]:
        yield Finding(
            severity="error",
            check="dead ranks",
            group=frame.group,
            what=f"{_names(dead)}: the process is gone",
            why="requests that it had are lost; ranks in lockstep wait for it",
            fix="see its log (dmesg | grep -i oom), and start the rank again",
        )
    for rank in by_state["stalled"]:
        yield Finding(
            severity="error",
            check="stalled ranks",
            group=frame.group,
            what=f"rank {rank.dp_rank} (pid {rank.pid}) has {rank.requests} requests and shows no sign of life",
            why="it gets no new requests, and those that it has wait",
            fix=f"kill -CONT {rank.pid} if it was stopped; else py-spy dump --pid {rank.pid}",
        )
    for rank in by_state["stuck"]:
        yield Finding(
            severity="error",
            check="stuck ranks",
            group=frame.group,
            what=(
                f"rank {rank.dp_rank} (pid {rank.pid}) has {rank.waiting} waiting and {rank.running} running, and "
                "admits, computes and finishes nothing, although it goes on publishing"
            ),
            why="it gets no new requests, and those that it has wait",
            fix=f"see its log; py-spy dump --pid {rank.pid}; restart the rank if it does not come back by itself",
        )
    yield from _unknown(frame, by_state["unknown"])
    for rank in frame.ranks:
        stale = rank.age_s is not None and rank.age_s > STALE_S
        if stale and rank.requests and rank.state in ("running", "idle", "waking", "silent"):
            yield Finding(
                severity="warning",
                check="stale beats",
                group=frame.group,
                what=f"rank {rank.dp_rank} has {rank.requests} requests and last published {rank.age_s:.0f} s ago",
                why="it hangs, or its steps are long; stall_timeout is longer, so it still gets requests",
                fix=f"dpshm drain {rank.dp_rank} --group {frame.group} --no-wait; py-spy dump --pid {rank.pid}",
            )
    absent = by_state["absent"]
    if 0 < len(absent) < frame.dp_size and frame.head is None:  # else they are on other nodes
        yield Finding(
            severity="warning",
            check="absent ranks",
            group=frame.group,
            what=f"{_names(absent)} of {frame.dp_size} never attached, or left",
            why="a group that is not complete is not ready; lockstep ranks wait",
            fix="start them; in a container they need the same /dev/shm: --ipc=container:NAME, or --ipc=host",
        )
    if drained := by_state["drained"]:
        numbers = " ".join(str(r.dp_rank) for r in drained)
        yield Finding(
            severity="note",
            check="drained ranks",
            group=frame.group,
            what=f"{_names(drained)}: drained by an operator",
            why="they get no new requests",
            fix=f"dpshm undrain {numbers} --group {frame.group}",
        )
    if not any(rank.routable for rank in frame.ranks):
        yield Finding(
            severity="error",
            check="no rank",
            group=frame.group,
            what="no rank may be chosen" + (": none has attached" if len(absent) == frame.dp_size else ""),
            why="every request fails",
            fix=(
                f"start the engines, with {frame.group!r} as their group"
                if len(absent) == frame.dp_size
                else f"dpshm stat --group {frame.group}"
            ),
        )


def _unknown(frame: Frame, unknown: list[Rank]) -> Iterator[Finding]:
    if unknown:
        yield Finding(
            severity="error",
            check="unknown ranks",
            group=frame.group,
            what=f"{_names(unknown)}: on another node, and not heard for a moment",
            why="it may be dead or cut off; it gets no new requests until it is heard",
            fix="see its log on its node, and whether that node reaches the coordinator's address",
        )


def _beyond(board: Board, frame: Frame) -> Iterator[Finding]:
    for rank in frame.beyond:
        yield Finding(
            severity="warning",
            check="rank number",
            group=frame.group,
            what=(
                f"rank {rank} is attached (pid {int(board.engine_pid[rank])}), and the group has ranks 0 to "
                f"{frame.dp_size - 1}"
            ),
            why="it gets no requests",
            fix=(
                "start that engine with the right number; or, if the number is right: "
                f"dpshm scale {rank + 1} --group {frame.group}"
            ),
        )


def _counters(board: Board, before: Frame, after: Frame) -> Iterator[Finding]:
    for problem in [*_rank_counters(before, after), *_frontend_counters(board, after)]:
        yield Finding(
            severity="warning",
            check="counters",
            group=after.group,
            what=problem,
            why="load is the reported load plus requests in flight: wrong counts mislead routing",
            fix="restart that process; if it comes again, report it with the output of: dpshm stat --json",
        )


def _rank_counters(before: Frame, after: Frame) -> Iterator[str]:
    """Counters of ranks that fell or contradict each other, a line each."""
    earlier = {rank.dp_rank: rank for rank in before.ranks}
    for rank in after.ranks:
        was = earlier.get(rank.dp_rank)
        if rank.state in ("absent", "dead") or rank.stock or was is None or was.incarnation != rank.incarnation:
            continue
        name = f"rank {rank.dp_rank}"
        if rank.dummy_steps > rank.steps:
            yield f"{name} counts {rank.dummy_steps} dummy steps of {rank.steps} steps"
        for field in ("steps", "busy_s", "prompt_tokens", "generation_tokens", "requests_finished"):
            if getattr(rank, field) < getattr(was, field):
                yield f"{name}'s {field} fell from {getattr(was, field)} to {getattr(rank, field)}"
        if rank.busy_s - was.busy_s > 1.5 * (after.monotonic_s - before.monotonic_s) + 5.0:
            yield f"{name} was busy for longer than time went by"
        if before.wave == after.wave < min(rank.wave, was.wave) - 1:
            yield f"{name} is in wave {rank.wave}, and the coordinator in {after.wave}"


def _frontend_counters(board: Board, after: Frame) -> Iterator[str]:
    """Ranks that received more than a front-end sent, a line each."""
    for frontend in after.frontends:
        if frontend.state != "alive":
            continue
        for e in range(after.dp_size):
            over = int(board.received_requests[e, frontend.index]) - int(board.sent_requests[frontend.index, e])
            if over > 0:
                yield f"rank {e} received {over} requests more than front-end {frontend.index} sent"


def _versions(frame: Frame) -> Iterator[Finding]:
    by_version: dict[str, list[str]] = defaultdict(list)
    by_version[frame.coordinator.version].append("the coordinator")
    for rank in frame.ranks:
        if rank.state not in ("absent", "dead"):
            by_version[rank.version].append(f"rank {rank.dp_rank}")
    for frontend in frame.frontends:
        if frontend.state == "alive":
            by_version[frontend.version].append(f"front-end {frontend.index}")
    by_version.pop("?", None)  # stock engines
    if len(by_version) > 1:
        words = "; ".join(f"{version}: {_some(who)}" for version, who in sorted(by_version.items()))
        yield Finding(
            severity="warning",
            check="versions",
            group=frame.group,
            what=f"processes of several dpshm versions are attached: {words}",
            why="the versions share the board's layout, but their rules and messages may differ",
            fix="pip install the same dpshm in every environment, and restart what is older",
        )


def _holders(board: Board, frame: Frame) -> Iterator[Finding]:
    """Finds rows whose process is gone and whose lock a forked child still holds."""
    ours = processes.namespace_inode("pid") if board.segment.has_locks else 0
    for rank in frame.ranks:
        e = rank.dp_rank
        visible = ours != 0 and int(board.engine_pid_namespace[e]) == ours
        if not visible or rank.pid <= 0 or not board.engine_alive(e):
            continue
        if processes.life_of(rank.pid, int(board.engine_start_time[e])) is processes.Life.GONE:
            yield Finding(
                severity="error",
                check="lock",
                group=frame.group,
                what=f"rank {e}'s process {rank.pid} is gone, and another process still holds its lock",
                why="no process can take the rank: a forked child inherited the lock's descriptor and keeps it",
                fix=f"fuser {board.segment.locks_path}    (end the child; attach after forking)",
            )


def _namespaces(board: Board) -> Iterator[Finding]:
    header, group = board.segment.header, board.segment.group
    ours = processes.namespace_inode("pid")
    others = {int(n) for n in board.engine_pid_namespace[: board.dp_size].tolist() if n} | {header.pid_namespace}
    if ours and others - {ours, 0}:
        yield Finding(
            severity="note",
            check="pid namespace",
            group=group,
            what="some of its processes live in another pid namespace (a container)",
            why="pids are those inside the container; a killed one is skipped only when its memory is freed",
            fix="docker run --pid=host, if that matters    (nothing is wrong)",
        )
    if header.time_namespace != processes.namespace_inode("time") or header.boot_id != processes.boot_id():
        yield Finding(
            severity="note",
            check="time namespace",
            group=group,
            what="its clocks differ from those of this process (another time namespace)",
            why="ages cannot be computed here",
            fix="run dpshm where the coordinator runs",
        )


def _capacity(frame: Frame) -> Iterator[Finding]:
    used = sum(f.state == "alive" for f in frame.frontends)
    if used >= frame.max_frontends:
        yield Finding(
            severity="warning",
            check="capacity",
            group=frame.group,
            what=f"all {frame.max_frontends} front-end rows are taken",
            why="the next front-end cannot attach",
            fix="restart the group with a larger max_frontends",
        )


def _prefix_indexes(board: Board, frame: Frame) -> Iterator[Finding]:
    """Finds ranks whose prefix indexes differ in kind, or cannot be read."""
    kinds: dict[tuple[int, int], list[str]] = defaultdict(list)
    lost, unindexed = [], []
    for rank in frame.ranks:
        if rank.state in ("absent", "dead") or not rank.num_blocks:
            continue
        if not rank.has_index:
            unindexed.append(rank)
            continue
        path = index_path(board.segment.sockets_path, rank.dp_rank)
        try:
            reader = PrefixIndexReader.open(path)
        except SegmentError:
            if os.access(path.parent, os.R_OK | os.X_OK):  # else the folder is another user's, and stays closed
                lost.append(rank)
            continue
        kinds[reader.block_tokens, reader.identity].append(f"rank {rank.dp_rank}")
    if len(kinds) > 1:
        words = "; ".join(f"{tokens} tokens a block: {_some(who)}" for (tokens, _), who in sorted(kinds.items()))
        yield Finding(
            severity="warning",
            check="prefix index",
            group=frame.group,
            what=f"ranks disagree in block size or hash of their prefix caches: {words}",
            why="a prompt is hashed once for each kind, and hits of one kind cannot be compared with another's",
            fix="start all engines with the same block size, hash function and PYTHONHASHSEED",
        )
    for ranks, what in (
        (lost, "the file of the prefix index is gone or damaged"),
        (unindexed, "the engine caches prompts and has no prefix index: there was no room, or it failed"),
    ):
        if ranks:
            yield Finding(
                severity="warning",
                check="prefix index",
                group=frame.group,
                what=f"{_names(ranks)}: {what}",
                why="requests go to these ranks by load alone, and prefixes are computed again",
                fix=f"look at the engine's log and at: df {board.segment.path.parent}; then restart the engine",
            )


def _names(ranks: list[Rank]) -> str:
    return _some([f"rank {rank.dp_rank}" for rank in ranks])


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
