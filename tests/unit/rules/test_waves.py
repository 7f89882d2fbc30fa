"""The wave rules, every cell of both tables, written out by hand.

Each machine is in wave 5. An event speaks of an old wave (4), this one (5) or a later one (6).
"""

from __future__ import annotations

import pytest

from dpshm.rules.waves import (
    AllIdle,
    AllPaused,
    Attached,
    CoordinatorEvent,
    CoordinatorState,
    EngineEvent,
    EngineState,
    FirstRequest,
    Phase,
    PublishState,
    RankConnected,
    RanksIdle,
    RanksSplit,
    RequestArrived,
    Resumed,
    SeenRunning,
    SendWaveCompleted,
    SendWaveStarted,
    StartReceived,
    StartWave,
    WakeTimer,
    WarnWakeFailed,
    WaveCompleted,
    WaveStarted,
    handle_coordinator,
    handle_engine,
)

PAUSED, WAKING, RUNNING = Phase.PAUSED, Phase.WAKING, Phase.RUNNING
PUBLISH = PublishState()
KEEPS = None  # neither the state changes nor is anything sent


def start(wave: int, exclude: int | None = None) -> StartWave:
    """The command."""
    return StartWave(wave, exclude)


# Each row: the event; then what becomes of (5, paused), (5, waking) and (5, running).
COORDINATOR: list[tuple[CoordinatorEvent, object, object, object]] = [
    (FirstRequest(2, 4), (5, WAKING, [start(5)]), KEEPS, KEEPS),
    (FirstRequest(2, 5), (5, WAKING, [start(5)]), KEEPS, KEEPS),
    (FirstRequest(2, 6), (5, WAKING, [start(5)]), KEEPS, KEEPS),
    (FirstRequest(None, 5), (5, WAKING, [start(5)]), KEEPS, KEEPS),
    (WaveCompleted(4), KEEPS, KEEPS, KEEPS),
    (WaveCompleted(5), (6, PAUSED, [PUBLISH]), (6, PAUSED, [PUBLISH]), (6, PAUSED, [PUBLISH])),
    (WaveCompleted(6), (7, PAUSED, [PUBLISH]), (7, PAUSED, [PUBLISH]), (7, PAUSED, [PUBLISH])),
    (WaveStarted(2, 4), KEEPS, KEEPS, KEEPS),
    (RankConnected(), KEEPS, (5, WAKING, [start(5)]), (5, RUNNING, [start(5)])),
    (WaveStarted(2, 5), (5, RUNNING, [start(5, 2), PUBLISH]), (5, RUNNING, [start(5, 2), PUBLISH]), KEEPS),
    (
        WaveStarted(2, 6),
        (6, RUNNING, [start(6, 2), PUBLISH]),
        (6, RUNNING, [start(6, 2), PUBLISH]),
        (6, RUNNING, [start(6, 2), PUBLISH]),
    ),
    (SeenRunning(2, 4), KEEPS, KEEPS, KEEPS),
    (SeenRunning(2, 5), (5, RUNNING, [start(5, 2), PUBLISH]), (5, RUNNING, [start(5, 2), PUBLISH]), KEEPS),
    (
        SeenRunning(2, 6),
        (6, RUNNING, [start(6, 2), PUBLISH]),
        (6, RUNNING, [start(6, 2), PUBLISH]),
        (6, RUNNING, [start(6, 2), PUBLISH]),
    ),
    (WakeTimer(expired=False), KEEPS, (5, WAKING, [start(5)]), KEEPS),
    (WakeTimer(expired=True), KEEPS, (5, PAUSED, [WarnWakeFailed(5), PUBLISH]), KEEPS),
    (RanksSplit(4), (5, WAKING, [start(5)]), (5, WAKING, [start(5)]), (5, RUNNING, [start(5)])),
    (RanksSplit(5), (5, WAKING, [start(5)]), (5, WAKING, [start(5)]), (5, RUNNING, [start(5)])),
    (
        RanksSplit(6),
        (6, WAKING, [start(6), PUBLISH]),
        (6, WAKING, [start(6), PUBLISH]),
        (6, RUNNING, [start(6), PUBLISH]),
    ),
    (RanksIdle(4), KEEPS, KEEPS, (5, PAUSED, [PUBLISH])),
    (RanksIdle(5), KEEPS, KEEPS, (5, PAUSED, [PUBLISH])),
    (RanksIdle(6), (6, PAUSED, [PUBLISH]), (6, PAUSED, [PUBLISH]), (6, PAUSED, [PUBLISH])),
]
COORDINATOR_CELLS = [
    (event, phase, after) for event, *cells in COORDINATOR for phase, after in zip(Phase, cells, strict=True)
]


@pytest.mark.parametrize(("event", "phase", "after"), COORDINATOR_CELLS, ids=lambda x: str(x)[:36])
def test_coordinator(event: CoordinatorEvent, phase: Phase, after: tuple[int, Phase, list[object]] | None):
    """Guards against a change of any rule of the coordinator that its table does not show."""
    wave, became, commands = (5, phase, []) if after is None else after
    assert handle_coordinator(CoordinatorState(5, phase), event) == (CoordinatorState(wave, became), commands)


@pytest.mark.parametrize(("event", "phase", "after"), COORDINATOR_CELLS, ids=lambda x: str(x)[:36])
def test_coordinator_that_excludes_who_was_named(
    event: CoordinatorEvent, phase: Phase, after: tuple[int, Phase, list[object]] | None
):
    """Guards against `exclude_named` changing more than the START of a first request."""
    wave, became, commands = (5, phase, []) if after is None else after
    if isinstance(event, FirstRequest):
        commands = [start(5, event.engine) for _ in commands]
    state, sent = handle_coordinator(CoordinatorState(5, phase), event, exclude_named=True)
    assert (state, sent) == (CoordinatorState(wave, became), commands)


@pytest.mark.parametrize(("event", "phase", "after"), COORDINATOR_CELLS, ids=lambda x: str(x)[:36])
def test_coordinator_that_does_not_repeat_start(
    event: CoordinatorEvent, phase: Phase, after: tuple[int, Phase, list[object]] | None
):
    """Guards against `repeat_start` changing more than what a first confirmation and a late first request send."""
    if isinstance(event, FirstRequest) and event.wave < 5:
        after = None
    wave, became, commands = (5, phase, []) if after is None else after
    if phase is WAKING and became is RUNNING and wave == 5:
        commands = [PUBLISH]
    state, sent = handle_coordinator(CoordinatorState(5, phase), event, repeat_start=False)
    assert (state, sent) == (CoordinatorState(wave, became), commands)


IDLE, RUNS, BY_USER = EngineState(5), EngineState(5, running=True), EngineState(5, paused=True)


def idle(wave: int, *commands: object) -> tuple[EngineState, list[object]]:
    """What becomes of an engine."""
    return EngineState(wave), list(commands)


def runs(wave: int, *commands: object) -> tuple[EngineState, list[object]]:
    """What becomes of an engine."""
    return EngineState(wave, running=True), list(commands)


def by_user(wave: int, *commands: object) -> tuple[EngineState, list[object]]:
    """What becomes of an engine."""
    return EngineState(wave, paused=True), list(commands)


class Rank0:
    """Marks a command that rank 0 alone sends."""

    def __init__(self, command: object) -> None:
        self.command = command


STARTED_4, STARTED_5, STARTED_6 = SendWaveStarted(4), SendWaveStarted(5), SendWaveStarted(6)
COMPLETED = Rank0(SendWaveCompleted(5))
ME, OTHER = "me", 7

# Each row: the event; then what becomes of an engine that is idle, running, or paused by the user, in wave 5.
ENGINE: list[tuple[EngineEvent, object, object, object]] = [
    (Attached(4), idle(4), idle(4), idle(4)),
    (Attached(5), idle(5), idle(5), idle(5)),
    (Attached(6), idle(6), idle(6), idle(6)),
    (RequestArrived(4), runs(5, STARTED_5), runs(5), by_user(5)),
    (RequestArrived(5), runs(5, STARTED_5), runs(5), by_user(5)),
    (RequestArrived(6), runs(6, STARTED_6), runs(6), by_user(6)),
    (StartReceived(4, None), idle(5), runs(5), by_user(5)),
    (StartReceived(5, None), runs(5, Rank0(STARTED_5)), runs(5), by_user(5)),
    (StartReceived(6, None), runs(6, Rank0(STARTED_6)), runs(6), by_user(5)),
    (StartReceived(4, OTHER), idle(5), runs(5), by_user(5)),
    (StartReceived(5, OTHER), runs(5, Rank0(STARTED_5)), runs(5), by_user(5)),
    (StartReceived(6, OTHER), runs(6, Rank0(STARTED_6)), runs(6), by_user(5)),
    (StartReceived(4, ME), idle(5), runs(5), by_user(5)),
    (StartReceived(5, ME), idle(5), runs(5), by_user(5)),
    (StartReceived(6, ME), idle(5), runs(5), by_user(5)),
    (AllIdle(), idle(5), idle(6, COMPLETED), by_user(5)),
    (AllPaused(), by_user(5), by_user(6, COMPLETED), by_user(5)),
    (Resumed(has_work=True), idle(5), runs(5), runs(5, STARTED_5)),
    (Resumed(has_work=False), idle(5), runs(5), idle(5)),
]
ENGINE_CELLS = [
    (event, before, after)
    for event, *cells in ENGINE
    for before, after in zip((IDLE, RUNS, BY_USER), cells, strict=True)
]


@pytest.mark.parametrize("dp_rank", [0, 3])
@pytest.mark.parametrize(("event", "before", "after"), ENGINE_CELLS, ids=lambda x: str(x)[:48])
def test_engine(dp_rank: int, event: EngineEvent, before: EngineState, after: tuple[EngineState, list[object]]):
    """Guards against a change of any rule of the engines that their table does not show."""
    if isinstance(event, StartReceived) and event.exclude == ME:
        event = event._replace(exclude=dp_rank)
    state, commands = after
    wanted = [
        c.command if isinstance(c, Rank0) else c for c in commands if dp_rank == 0 or not isinstance(c, Rank0)
    ]
    assert handle_engine(before, event, dp_rank) == (state, wanted)


def test_the_tables_have_every_event():
    """Guards against an event that was added without a row here."""
    assert {type(row[0]) for row in COORDINATOR} == set(CoordinatorEvent.__args__)
    assert {type(row[0]) for row in ENGINE} == set(EngineEvent.__args__)


def test_both_machines_start_idle_in_wave_0():
    """Guards against a group whose first wave is not the one that zeroed memory shows."""
    assert CoordinatorState() == (0, PAUSED)
    assert EngineState() == (0, False, False)
    assert [int(phase) for phase in (PAUSED, WAKING, RUNNING)] == [0, 1, 2]
