"""Request waves: the rules that keep lockstep ranks together, as two tables.

Mixture-of-experts ranks exchange tokens in every layer, so while one of them has work all must step. When none
has, all pause together, and the *wave* grows by one. The next request wakes all of them. The coordinator has
one small machine for this and each engine has one. Both are here, whole, without a socket, a clock or a memory
map.

`COORDINATOR` and `ENGINE` are the rules, as data: of the rows for an event, the first whose conditions all hold
applies, and if there is none, nothing happens. `handle_coordinator` and `handle_engine` run from them, and the
tables of `dpshm/rules/README.md`, which says why each rule is there, are printed from them.

In words, for the coordinator, whose wave never falls:

- A first request in a paused group starts a wake-up: START goes to all ranks. It names a rank, and that rank
  gets START too, because it may refuse the request or never get it, and would then sleep while the others wait
  for it.
- An engine that says that it runs, or whose row shows it, ends the wake-up. In a newer wave it takes the group
  there. The others get START. A message of an old wave says nothing: it may be one that was sent before that wave
  ended and that `WaveCompleted` overtook. A row in an old wave is about to change, and `RanksSplit` comes if it
  does not.
- A rank that connects while the group is not paused missed START, or may have. START is sent again.
- A wave that is complete, in the present wave or a newer one, pauses the group in the wave after it.
- An unanswered wake-up repeats START, and ends with a warning.
- Rows are the truth and messages are hints (rule 4). `RanksSplit` sends START to all; `RanksIdle` pauses the
  group.

And for an engine:

- A request wakes it, unless the user paused it, and it then always says so: the front-end's notice may be late
  or lost.
- START wakes it, unless it is excluded, paused by the user, or already past that wave. Rank 0 confirms.
- An all-reduce that finds no work, or finds that the user paused every rank, ends the wave for all at the same
  step. Rank 0 reports it.

Two options leave a START out or narrow it. ``exclude_named`` leaves the engine that a `FirstRequest` names out.
``repeat_start=False`` suits groups whose rows tell who sleeps: no second START when the first engine confirms,
and none for a first request of an old wave.

Source: the behaviour of vLLM's ``DPCoordinator`` (August 2025 and 0.32); `WAKING`, `RankConnected` and the two
``Ranks`` events are dpshm's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

MAX_WAVE = (1 << 31) - 1
"""Waves saturate here, in both machines as in the words of the board; at the limit the tables still hold."""


class Phase(IntEnum):
    """What the coordinator knows of the ranks; the values are those stored in the control word."""

    PAUSED = 0
    WAKING = 1  # a START was sent, and no engine was seen running since
    RUNNING = 2


class CoordinatorState(NamedTuple):
    """The wave machine of the coordinator."""

    wave: int = 0
    phase: Phase = Phase.PAUSED


class EngineState(NamedTuple):
    """The wave machine of one engine."""

    wave: int = 0
    running: bool = False
    paused: bool = False  # by the user; START is dropped meanwhile


class FirstRequest(NamedTuple):
    """A front-end sent a request to `engine` while it believed the group paused in `wave`."""

    engine: int | None
    wave: int


class WaveCompleted(NamedTuple):
    """Rank 0 says that all ranks went idle together at the end of `wave`."""

    wave: int


class WaveStarted(NamedTuple):
    """An engine says that it runs in `wave`."""

    engine: int
    wave: int


class SeenRunning(NamedTuple):
    """The row of an engine shows it running in `wave`."""

    engine: int
    wave: int


class RankConnected(NamedTuple):
    """The connection of an engine was made, or made again: what was sent before, it may not have heard."""


class WakeTimer(NamedTuple):
    """Time passed while waking: enough to send START again, or (`expired`) to give up."""

    expired: bool


class RanksSplit(NamedTuple):
    """For long enough some rows have shown ranks running, others idle; `wave` is the rows' highest."""

    wave: int


class RanksIdle(NamedTuple):
    """For long enough every live row has shown its rank idle; `wave` is the rows' highest."""

    wave: int


CoordinatorEvent = (
    FirstRequest | WaveCompleted | WaveStarted | SeenRunning | RankConnected | WakeTimer | RanksSplit | RanksIdle
)


class Attached(NamedTuple):
    """The engine (re)started and found `wave` in the control word."""

    wave: int


class RequestArrived(NamedTuple):
    """A request came in, stamped `wave` by its front-end."""

    wave: int


class StartReceived(NamedTuple):
    """START came in: all but `exclude` are to run in `wave`."""

    wave: int
    exclude: int | None


class AllIdle(NamedTuple):
    """An all-reduce said that no rank has work."""


class AllPaused(NamedTuple):
    """An all-reduce said that every rank was asked by the user to pause."""


class Resumed(NamedTuple):
    """The user resumed the ranks, past a barrier; `has_work` is true if any rank has some."""

    has_work: bool


EngineEvent = Attached | RequestArrived | StartReceived | AllIdle | AllPaused | Resumed


class StartWave(NamedTuple):
    """Coordinator: send START to the engines."""

    wave: int
    exclude: int | None


class PublishState(NamedTuple):
    """Coordinator: tell the front-ends the new wave and phase."""


class WarnWakeFailed(NamedTuple):
    """Coordinator: no engine woke up in time; tell the operator."""

    wave: int


class SendWaveStarted(NamedTuple):
    """Engine: tell the coordinator that this engine runs."""

    wave: int


class SendWaveCompleted(NamedTuple):
    """Engine: tell the coordinator that all ranks went idle."""

    wave: int


CoordinatorCommand = StartWave | PublishState | WarnWakeFailed
EngineCommand = SendWaveStarted | SendWaveCompleted


class Row(NamedTuple):
    """One row of a table. Its cells are words of `_CONDITIONS`, `_BECOMES` and `_COMMANDS`.

    Attributes:
        events: the kinds of events that it is about; ``w`` is the wave that the event names, ``e`` the engine.
        when: all of these hold.
        becomes: the machine's new state; what it does not name stays.
        commands: what is sent, in this order. The wave that a command carries is the new one.
    """

    events: tuple[type, ...]
    when: tuple[str, ...]
    becomes: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()


_RUNS = (WaveStarted, SeenRunning)
COORDINATOR: tuple[Row, ...] = (
    Row((FirstRequest,), ("paused", "w >= wave"), ("waking",), ("StartWave, without e if exclude_named",)),
    Row((FirstRequest,), ("paused", "repeat_start"), ("waking",), ("StartWave, without e if exclude_named",)),
    Row((WaveCompleted,), ("w >= wave",), ("w + 1", "paused"), ("PublishState",)),
    Row(_RUNS, ("w > wave",), ("w", "running"), ("StartWave, without e", "PublishState")),
    Row(_RUNS, ("w == wave", "paused"), ("running",), ("StartWave, without e", "PublishState")),
    Row(_RUNS, ("w == wave", "waking", "repeat_start"), ("running",), ("StartWave, without e", "PublishState")),
    Row(_RUNS, ("w == wave", "waking"), ("running",), ("PublishState",)),
    Row((RankConnected,), ("waking",), (), ("StartWave",)),
    Row((RankConnected,), ("running",), (), ("StartWave",)),
    Row((WakeTimer,), ("waking", "expired"), ("paused",), ("WarnWakeFailed", "PublishState")),
    Row((WakeTimer,), ("waking",), (), ("StartWave",)),
    Row((RanksSplit,), ("w > wave", "running"), ("w",), ("StartWave", "PublishState")),
    Row((RanksSplit,), ("w > wave",), ("w", "waking"), ("StartWave", "PublishState")),
    Row((RanksSplit,), ("running",), (), ("StartWave",)),
    Row((RanksSplit,), (), ("waking",), ("StartWave",)),
    Row((RanksIdle,), ("w > wave",), ("w", "paused"), ("PublishState",)),
    Row((RanksIdle,), ("running",), ("paused",), ("PublishState",)),
)
ENGINE: tuple[Row, ...] = (
    Row((Attached,), (), ("w", "idle")),
    Row((RequestArrived,), ("idle",), ("max(wave, w)", "running"), ("SendWaveStarted",)),
    Row((RequestArrived,), (), ("max(wave, w)",)),
    Row(
        (StartReceived,), ("idle", "not excluded", "w >= wave"), ("w", "running"), ("SendWaveStarted, if rank 0",)
    ),
    Row((StartReceived,), ("running", "not excluded", "w >= wave"), ("w",)),
    Row((AllIdle,), ("running",), ("wave + 1", "idle"), ("SendWaveCompleted of the old wave, if rank 0",)),
    Row((AllPaused,), ("running",), ("wave + 1", "by user"), ("SendWaveCompleted of the old wave, if rank 0",)),
    Row((AllPaused,), ("idle",), ("by user",)),
    Row((Resumed,), ("by user", "any rank has work"), ("running",), ("SendWaveStarted",)),
    Row((Resumed,), ("by user",), ("idle",)),
)


class _Case(NamedTuple):
    """What a row is applied to: a machine's state, the event, and the options of its side."""

    state: Any
    event: Any
    options: Mapping[str, bool] = {}
    dp_rank: int = -1
    new_wave: int = 0

    @property
    def by(self) -> int:
        """How far the event's wave is above the machine's."""
        return self.event.wave - self.state.wave  # type: ignore[no-any-return]


_Condition = Callable[[_Case], bool]
_ANY_SIDE: dict[str, _Condition] = {
    "w > wave": lambda c: c.by > 0,
    "w == wave": lambda c: c.by == 0,
    "w >= wave": lambda c: c.by >= 0,
    "w < wave": lambda c: c.by < 0,
}
_COORDINATOR_CONDITIONS: dict[str, _Condition] = _ANY_SIDE | {
    "paused": lambda c: c.state.phase is Phase.PAUSED,
    "waking": lambda c: c.state.phase is Phase.WAKING,
    "running": lambda c: c.state.phase is Phase.RUNNING,
    "expired": lambda c: c.event.expired,
    "repeat_start": lambda c: c.options["repeat_start"],
}
_ENGINE_CONDITIONS: dict[str, _Condition] = _ANY_SIDE | {
    "idle": lambda c: not c.state.running and not c.state.paused,
    "running": lambda c: c.state.running,
    "by user": lambda c: c.state.paused,
    "not excluded": lambda c: c.event.exclude != c.dp_rank,
    "any rank has work": lambda c: c.event.has_work,
}
_WAVES: dict[str, Callable[[_Case], int]] = {
    "w": lambda c: c.event.wave,
    "w + 1": lambda c: min(c.event.wave + 1, MAX_WAVE),
    "wave + 1": lambda c: min(c.state.wave + 1, MAX_WAVE),
    "max(wave, w)": lambda c: max(c.state.wave, c.event.wave),
}
_PHASES: dict[str, dict[str, Any]] = {phase.name.lower(): {"phase": phase} for phase in Phase}
_MODES: dict[str, dict[str, Any]] = {
    "idle": {"running": False, "paused": False},
    "running": {"running": True, "paused": False},
    "by user": {"running": False, "paused": True},
}
_COMMANDS: dict[str, Callable[[_Case], Any]] = {  # None: nothing is sent
    "StartWave": lambda c: StartWave(c.new_wave, None),
    "StartWave, without e": lambda c: StartWave(c.new_wave, c.event.engine),
    "StartWave, without e if exclude_named": lambda c: StartWave(
        c.new_wave, c.event.engine if c.options["exclude_named"] else None
    ),
    "PublishState": lambda _: PublishState(),
    "WarnWakeFailed": lambda c: WarnWakeFailed(c.new_wave),
    "SendWaveStarted": lambda c: SendWaveStarted(c.new_wave),
    "SendWaveStarted, if rank 0": lambda c: SendWaveStarted(c.new_wave) if c.dp_rank == 0 else None,
    "SendWaveCompleted of the old wave, if rank 0": lambda c: (
        SendWaveCompleted(c.state.wave) if c.dp_rank == 0 else None
    ),
}


def handle_coordinator(
    state: CoordinatorState, event: CoordinatorEvent, *, exclude_named: bool = False, repeat_start: bool = True
) -> tuple[CoordinatorState, list[CoordinatorCommand]]:
    """One step of the coordinator's machine: the table `COORDINATOR`.

    Args:
        state: where it is.
        event: what happened.
        exclude_named: leave the engine that a `FirstRequest` names out of its START.
        repeat_start: send START again when the first engine confirms a wake-up, and for an old `FirstRequest`.
    """
    options = {"exclude_named": exclude_named, "repeat_start": repeat_start}
    return _apply(_COORDINATOR_ROWS, _Case(state, _within_limits(event), options))


def handle_engine(state: EngineState, event: EngineEvent, dp_rank: int) -> tuple[EngineState, list[EngineCommand]]:
    """One step of an engine's machine: the table `ENGINE`."""
    return _apply(_ENGINE_ROWS, _Case(state, _within_limits(event), dp_rank=dp_rank))


class _Rule(NamedTuple):
    """A row, its words looked up."""

    when: list[_Condition]
    wave: Callable[[_Case], int] | None
    changes: dict[str, Any]
    commands: list[Callable[[_Case], Any]]


_Rules = dict[type, list[_Rule]]


def _look_up(
    table: tuple[Row, ...], conditions: dict[str, _Condition], modes: dict[str, dict[str, Any]]
) -> _Rules:
    """The rules by kind of event; a cell with a word that has no meaning raises KeyError."""
    rules: _Rules = {}
    for row in table:
        waves, states = [w for w in row.becomes if w in _WAVES], [w for w in row.becomes if w not in _WAVES]
        changes: dict[str, Any] = {}
        for word in states:
            changes |= modes[word]
        rule = _Rule(
            [conditions[word] for word in row.when],
            _WAVES[waves[0]] if waves else None,
            changes,
            [_COMMANDS[word] for word in row.commands],
        )
        for kind in row.events:
            rules.setdefault(kind, []).append(rule)
    return rules


_COORDINATOR_ROWS = _look_up(COORDINATOR, _COORDINATOR_CONDITIONS, _PHASES)
_ENGINE_ROWS = _look_up(ENGINE, _ENGINE_CONDITIONS, _MODES)


def _apply(rules: _Rules, case: _Case) -> tuple[Any, list[Any]]:
    """The new state and the commands by the first rule that applies."""
    state = case.state
    for rule in rules[type(case.event)]:
        if all(holds(case) for holds in rule.when):
            wave = state.wave if rule.wave is None else rule.wave(case)
            case = case._replace(new_wave=wave)
            sent = [send(case) for send in rule.commands]
            return state._replace(wave=wave, **rule.changes), [command for command in sent if command is not None]
    return state, []


E = TypeVar("E", CoordinatorEvent, EngineEvent)


def _within_limits(event: E) -> E:
    """The event with its wave, if it has one, within 0 and `MAX_WAVE`."""
    wave = getattr(event, "wave", 0)
    if 0 <= wave <= MAX_WAVE:
        return event
    return event._replace(wave=max(0, min(wave, MAX_WAVE)))  # type: ignore[call-arg]
