"""Request waves: the rules that keep lockstep ranks together, as pure functions of values.

Mixture-of-experts ranks exchange tokens in every layer, so while one of them has work all must step.
When none has, all pause together, and the *wave* grows by one. The next request wakes all of them.
Two small machines play this: one in the coordinator, one in each engine. Both are here, whole, without
a socket, a clock or a memory map: ``handle_coordinator(state, event) -> (state, commands)`` and
``handle_engine(state, event) -> (state, commands)``. A message is only a hint. A lost, doubled or late
one does no harm, because the rows of the board say what is true and `RanksSplit` and `RanksIdle`
bring the machine back to it.

Coordinator, state ``(wave, phase)``, starts ``(0, PAUSED)``; nothing ever lowers the wave:

    event                    when                          becomes              commands
    -----------------------  ----------------------------  -------------------  --------------------------------
    FirstRequest(e, w)       paused; if w < wave only      waking               StartWave(wave, nobody)
                             with `repeat_start`
                             waking, running               -                    -
    WaveCompleted(w)         wave <= w                     w + 1, paused        PublishState
                             w < wave                      -                    -
    WaveStarted(e, w),       w > wave, or w == wave and    w, running           StartWave(w, exclude e),
    SeenRunning(e, w)        paused                                             PublishState
                             w == wave, waking             running              the same START if
                                                                                `repeat_start`, PublishState
                             otherwise, but for:           -                    -
    WaveStarted(e, w)        w < wave, paused              waking               StartWave(wave, nobody)
    WakeTimer(expired=no)    waking                        -                    StartWave(wave, nobody)
    WakeTimer(expired=yes)   waking                        paused               WarnWakeFailed, PublishState
    RanksSplit(w)            always                        max(wave, w),        StartWave(that, nobody),
                                                           waking if paused     PublishState if the wave grew
    RanksIdle(w)             running, or w > wave          max(wave, w), paused PublishState

`FirstRequest` excludes nobody, although its sender names an engine: that engine may refuse the request
or never get it, and then it would sleep while the others wait for it in a collective (a real vLLM 0.32
server hung so). ``exclude_named=True`` brings the exclusion back for engines that take whatever they
are sent. `WaveStarted` does exclude its sender, which is awake for certain.

The front-end sends START to the ranks itself when it sends `FirstRequest` (`dpshm.net.doorbell`), so a rank may
hear it before the coordinator has heard anything, and again from the coordinator: the engine's table has both.

``repeat_start=False`` leaves two STARTs out, in groups whose rows tell who sleeps (`RanksSplit`); a stock engine's
row does not, and ``exclude_named`` has left one out. The one is sent when the first engine confirms a wake-up: all
were told when it began, so it is for those who missed it, and costs every rank a message at the moment when all
are busy waking. The other answers a `FirstRequest` of an old wave. The ranks may have run that wave, rung by its
sender, and be through by the time that it arrives; and if its sender had merely not heard of the wave, the request
itself wakes the rank that gets it.

`SeenRunning` in a paused group starts the wave like `WaveStarted` does: the engine's own message may be
the one that was lost, and if it is only late, the second start changes nothing. Seen in an old wave it
says nothing: that row is about to change, and if it does not, `RanksSplit` comes. `RanksIdle` in the wave
that is being woken says nothing either: there `WakeTimer` sends START again, and gives up in the end.

Engine, state ``(wave, running, paused)``, where *paused* is by the user:

    event                      when                              becomes           commands
    -------------------------  --------------------------------  ----------------  ------------------
    Attached(w)                always                            w, idle           -
    RequestArrived(w)          running, or paused by the user    max(wave, w)      -
                               idle                              max(wave, w),     SendWaveStarted(wave)
                                                                 running
    StartReceived(w, exclude)  not paused, not excluded, idle,   w, running        SendWaveStarted(w)
                               w >= wave                                           if rank 0
                               the same, already running         w                 -
                               otherwise                         -                 -
    AllIdle()                  running                           wave + 1, idle    SendWaveCompleted(wave)
                                                                                   if rank 0
                               idle                              -                 -
    AllPaused()                running                           wave + 1, idle,   SendWaveCompleted(wave)
                                                                 paused            if rank 0
                               idle, not paused                  paused            -
    Resumed(has_work)          paused                            running if any    SendWaveStarted(wave)
                                                                 rank has work     if it runs

An engine that a request wakes always says so, even though the front-end has sent its own notice: that
notice may be late, lost, or never sent (its view of the wave was old). Rank 0 confirms a wake-up that it
heard of, which is what ends `WAKING`. `AllIdle` and `AllPaused` come from an all-reduce, so every rank
takes them at the same step; a pause that only some ranks asked for is work, and keeps all stepping.

Source: the behaviour of vLLM's ``DPCoordinator`` (August 2025 and 0.32); `WAKING`, the two ``Ranks``
events and the old-wave row of `WaveStarted` are dpshm's.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple, TypeVar

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


class WakeTimer(NamedTuple):
    """Time passed while waking: enough to send START again, or (`expired`) to give up."""

    expired: bool


class RanksSplit(NamedTuple):
    """For long enough some rows have shown ranks running, others idle; `wave` is the rows' highest."""

    wave: int


class RanksIdle(NamedTuple):
    """For long enough every live row has shown its rank idle; `wave` is the rows' highest."""

    wave: int


CoordinatorEvent = FirstRequest | WaveCompleted | WaveStarted | SeenRunning | WakeTimer | RanksSplit | RanksIdle


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
    """Coordinator: nobody woke up in time; tell the operator."""

    wave: int


class SendWaveStarted(NamedTuple):
    """Engine: tell the coordinator that this engine runs."""

    wave: int


class SendWaveCompleted(NamedTuple):
    """Engine: tell the coordinator that all ranks went idle."""

    wave: int


E = TypeVar("E", CoordinatorEvent, EngineEvent)

CoordinatorCommand = StartWave | PublishState | WarnWakeFailed
EngineCommand = SendWaveStarted | SendWaveCompleted


def handle_coordinator(
    state: CoordinatorState, event: CoordinatorEvent, *, exclude_named: bool = False, repeat_start: bool = True
) -> tuple[CoordinatorState, list[CoordinatorCommand]]:
    """One step of the coordinator's machine: the first table above.

    Args:
        state: where it is.
        event: what happened.
        exclude_named: leave the engine that a `FirstRequest` names out of its START.
        repeat_start: send START again when the first engine confirms a wake-up, and for an old `FirstRequest`.
    """
    wave, phase = state
    event = _within_limits(event)
    match event:
        case FirstRequest(engine, w) if phase is Phase.PAUSED and (w >= wave or repeat_start):
            exclude = engine if exclude_named else None
            return CoordinatorState(wave, Phase.WAKING), [StartWave(wave, exclude)]
        case WaveCompleted(w) if w >= wave:
            return CoordinatorState(min(w + 1, MAX_WAVE), Phase.PAUSED), [PublishState()]
        case WaveStarted(engine, w) | SeenRunning(engine, w) if w > wave or (w == wave and phase is Phase.PAUSED):
            return CoordinatorState(w, Phase.RUNNING), [StartWave(w, engine), PublishState()]
        case WaveStarted(engine, w) | SeenRunning(engine, w) if w == wave and phase is Phase.WAKING:
            again: list[CoordinatorCommand] = [StartWave(w, engine)] if repeat_start else []
            return CoordinatorState(wave, Phase.RUNNING), [*again, PublishState()]
        case WaveStarted(_, w) if w < wave and phase is Phase.PAUSED:
            return CoordinatorState(wave, Phase.WAKING), [StartWave(wave, None)]
        case WakeTimer(expired) if phase is Phase.WAKING:
            if not expired:
                return state, [StartWave(wave, None)]
            return CoordinatorState(wave, Phase.PAUSED), [WarnWakeFailed(wave), PublishState()]
        case RanksSplit(w):
            new = CoordinatorState(max(wave, w), Phase.WAKING if phase is Phase.PAUSED else phase)
            publish: list[CoordinatorCommand] = [PublishState()] if new.wave != wave else []
            return new, [StartWave(new.wave, None), *publish]
        case RanksIdle(w) if phase is Phase.RUNNING or w > wave:
            return CoordinatorState(max(wave, w), Phase.PAUSED), [PublishState()]
    return state, []


def handle_engine(state: EngineState, event: EngineEvent, dp_rank: int) -> tuple[EngineState, list[EngineCommand]]:
    """One step of an engine's machine: the second table above."""
    wave, running, paused = state
    event = _within_limits(event)
    match event:
        case Attached(w):
            return EngineState(w), []
        case RequestArrived(w):
            wave = max(wave, w)
            if running or paused:
                return state._replace(wave=wave), []
            return EngineState(wave, running=True), [SendWaveStarted(wave)]
        case StartReceived(w, exclude) if not paused and exclude != dp_rank and w >= wave:
            confirm: list[EngineCommand] = [SendWaveStarted(w)] if dp_rank == 0 and not running else []
            return EngineState(w, running=True), confirm
        case AllIdle() if running:
            complete: list[EngineCommand] = [SendWaveCompleted(wave)] if dp_rank == 0 else []
            return EngineState(min(wave + 1, MAX_WAVE), running=False), complete
        case AllPaused() if running:
            end: list[EngineCommand] = [SendWaveCompleted(wave)] if dp_rank == 0 else []
            return EngineState(min(wave + 1, MAX_WAVE), running=False, paused=True), end
        case AllPaused():
            return state._replace(paused=True), []
        case Resumed(has_work) if paused:
            start: list[EngineCommand] = [SendWaveStarted(wave)] if has_work else []
            return EngineState(wave, running=has_work), start
    return state, []


def _within_limits(event: E) -> E:
    """The event with its wave, if it has one, within 0 and `MAX_WAVE`."""
    wave = getattr(event, "wave", 0)
    if 0 <= wave <= MAX_WAVE:
        return event
    return event._replace(wave=max(0, min(wave, MAX_WAVE)))  # type: ignore[call-arg]
