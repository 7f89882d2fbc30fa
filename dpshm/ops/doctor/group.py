"""Checks of one group: its coordinator and sockets here, its ranks and counters beside.

They compare two frames half a second apart, so that a passing state is no finding.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator

from dpshm.board.board import Board
from dpshm.errors import DpshmError
from dpshm.linux import processes
from dpshm.net.keys import keys_for
from dpshm.ops.doctor.counters import check_counters
from dpshm.ops.doctor.finding import Finding, some_of
from dpshm.ops.doctor.probe import connect_problem, publishes
from dpshm.ops.doctor.ranks import check_beyond, check_holders, check_prefix_indexes, check_ranks
from dpshm.ops.frame import Frame
from dpshm.ops.read_frame import read_frame

BETWEEN_LOOKS_S = 0.5


def check_group(board: Board) -> list[Finding]:
    """Runs all checks of one group."""
    before = read_frame(board)
    time.sleep(BETWEEN_LOOKS_S)
    after = read_frame(board)
    return [
        *_coordinator(after),
        *_sockets(board, after),
        *check_ranks(after),
        *check_beyond(board, after),
        *check_counters(board, before, after),
        *_versions(after),
        *check_holders(board, after),
        *_namespaces(board),
        *_capacity(after),
        *check_prefix_indexes(board, after),
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


def _versions(frame: Frame) -> Iterator[Finding]:
    by_version: dict[str, list[str]] = defaultdict(list)
    by_version[frame.coordinator.version].append("the coordinator")
    for rank in frame.ranks:
        if rank.state not in ("absent", "dead"):
            by_version[rank.version].append(f"rank {rank.label}")
    for frontend in frame.frontends:
        if frontend.state == "alive":
            by_version[frontend.version].append(f"front-end {frontend.index}")
    by_version.pop("?", None)  # stock engines
    if len(by_version) > 1:
        words = "; ".join(f"{version}: {some_of(who)}" for version, who in sorted(by_version.items()))
        yield Finding(
            severity="warning",
            check="versions",
            group=frame.group,
            what=f"processes of several dpshm versions are attached: {words}",
            why="the versions share the board's layout, but their rules and messages may differ",
            fix="pip install the same dpshm in every environment, and restart what is older",
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
