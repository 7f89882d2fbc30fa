"""Verdicts: what a row shows of its process, as pure functions (rule 5) of what was read and for how long.

- *dead*: the process ends or has ended. Its lock says so: a free lock under a row that a process took always
  means dead. While the lock is held, the process lives, unless the kernel says that it is ending this very
  process: it frees the memory, which can take seconds, before it drops the lock. (A pid that is not there proves
  nothing: it may belong to another namespace. A pidfd only tells *when* to look.)
- *stalled*: alive, not paused by the user, has work, and showed no sign of life for ``stall_timeout``. The
  watcher measures that by its own clock, so it does not matter which clock the beat was taken from. The
  timeout has to exceed the longest step.
- *stuck*: the same, but it shows signs of life and makes no progress: it admits, computes and finishes nothing.
- *unknown*: the row is of a process on another node, and nothing was heard of it for `SILENT_INTERVALS`. It may be
  dead, or its network is cut: no lock reaches that far, so a remote row is never called dead.
- *alive*: otherwise. *absent*: no process ever took the row, or its process left in good order.

`has_work` is the one definition of work. Requests in flight are not work: the rank has not seen them, and a
request that was lost must not exclude an idle rank, which has no reason to show a sign of life.
"""

from __future__ import annotations

import operator
from enum import IntEnum, StrEnum
from typing import NamedTuple, SupportsIndex

SIGN_MASK = (1 << 62) - 1
"""Evidence is a word of the board, so it is cut to 62 bits."""
_WAITING_SHIFT = 39  # evidence of no progress: how many waited, and a sign
_PROGRESS_MASK = (1 << _WAITING_SHIFT) - 1


class Verdict(IntEnum):
    """The values are those stored in a mark; zeroed memory reads as absent.

    The two low bits of `STUCK` and `UNKNOWN` are those of `STALLED`: a reader that does not know them treats them
    as stalled.
    """

    ABSENT = 0
    ALIVE = 1
    STALLED = 2
    DEAD = 3
    STUCK = 18
    UNKNOWN = 34

    @classmethod
    def _missing_(cls, value: object) -> Verdict:
        """A damaged mark has some verdict (rule 6)."""
        return cls(operator.index(value) & 3) if isinstance(value, SupportsIndex) else cls.ABSENT


class State(StrEnum):
    """What a rank is, in one word: what snapshots, tools, metrics and the page show. See `state_of`."""

    IDLE = "idle"
    RUNNING = "running"
    WAKING = "waking"
    PAUSED = "paused"
    SILENT = "silent"
    DRAINED = "drained"
    STALLED = "stalled"
    STUCK = "stuck"
    UNKNOWN = "unknown"
    DEAD = "dead"
    ABSENT = "absent"


HANGING = (Verdict.STALLED, Verdict.STUCK)
"""Verdicts on a process that lives. A policy does not choose such a rank; a request may be pinned to it."""

REMOTE_INTERVAL_NS = 250_000_000
"""A process on another node says at least so often that it is there."""
SILENT_INTERVALS = 3
"""After so many intervals without a word its row is unknown."""


class EngineSigns(NamedTuple):
    """The words of an engine's row from which its verdict follows.

    Attributes:
        incarnation: how many processes have had the row.
        beat: when it published last, by its clock.
        step_start: when its present step began, by its clock; 0 between steps.
        waiting: requests in its queue.
        running: requests in its batch.
        paused: the user paused it.
        tokens: prompt tokens computed and tokens generated; 0 if it does not count them.
        finished: requests finished.
    """

    incarnation: int = 0
    beat: int = 0
    step_start: int = 0
    waiting: int = 0
    running: int = 0
    paused: bool = False
    tokens: int = 0
    finished: int = 0


def has_work(signs: EngineSigns) -> bool:
    """Whether the engine is in a step, has a running batch, or has requests waiting."""
    return signs.step_start != 0 or signs.waiting > 0 or signs.running > 0


def sign_of_life(signs: EngineSigns) -> int:
    """A number that changes when the engine publishes, begins a step or ends one."""
    return hash((signs.incarnation, signs.beat, signs.step_start)) & SIGN_MASK


def sign_of_progress(signs: EngineSigns) -> int | None:
    """A number that changes when the engine admits, computes or finishes; None if its row does not tell.

    An engine that runs a batch and counts no tokens may compute and not show it.
    """
    shown = signs.tokens > 0 if signs.running else signs.waiting > 0
    if not shown:
        return None
    counts = hash((signs.incarnation, signs.running, signs.tokens, signs.finished))
    return counts & _PROGRESS_MASK


def evidence_of(verdict: Verdict, signs: EngineSigns) -> int:
    """The word from which `still_holds` tells later whether such a verdict still holds."""
    if verdict is Verdict.STUCK:
        return (signs.waiting << _WAITING_SHIFT | (sign_of_progress(signs) or 0)) & SIGN_MASK
    return sign_of_life(signs)


def still_holds(verdict: Verdict, evidence: int, signs: EngineSigns) -> bool:
    """Whether a verdict that some watcher gave stands without a watcher: what it saw has not changed since.

    Args:
        verdict: on a process that lives.
        evidence: `evidence_of` the verdict when it was given.
        signs: what the row shows now.
    """
    if not has_work(signs) or signs.paused:
        return False
    if verdict is Verdict.STALLED:
        return sign_of_life(signs) == evidence
    return (
        verdict is Verdict.STUCK
        and sign_of_progress(signs) == evidence & _PROGRESS_MASK
        and (signs.tokens > 0 or signs.waiting >= evidence >> _WAITING_SHIFT)
    )


class Observation(NamedTuple):
    """What the watcher saw of one row.

    Attributes:
        taken: some process has stored its pid in the row and not taken it back.
        locked: the lock on its byte is held; of a remote row, that it was heard within `SILENT_INTERVALS`.
        has_work: see `has_work`.
        paused: the user paused it.
        beat_age_ns: for how long its sign of life has not changed, by the watcher's clock.
        progress_age_ns: for how long its sign of progress has not changed; 0 if it has none.
        remote: its process is on another node.
        ending: the kernel ends that process, although the lock is still held.
    """

    taken: bool
    locked: bool
    has_work: bool = False
    paused: bool = False
    beat_age_ns: int = 0
    progress_age_ns: int = 0
    remote: bool = False
    ending: bool = False


def judge(seen: Observation, stall_timeout_ns: int) -> Verdict:
    """The verdict on one row; `stall_timeout_ns` 0 means that no rank is ever called stalled or stuck."""
    if not seen.locked or seen.ending:
        gone = Verdict.UNKNOWN if seen.remote else Verdict.DEAD
        return gone if seen.taken else Verdict.ABSENT
    if not seen.taken:
        return Verdict.ABSENT  # between its lock and its first store
    if not seen.has_work or seen.paused or stall_timeout_ns <= 0:
        return Verdict.ALIVE
    if seen.beat_age_ns >= stall_timeout_ns:
        return Verdict.STALLED
    return Verdict.STUCK if seen.progress_age_ns >= stall_timeout_ns else Verdict.ALIVE


class Stillness:
    """For how long one engine shows no sign of life, and no progress, by the clock of its caller."""

    def __init__(self) -> None:
        self._life: int | None = None
        self._progress: int | None = None
        self._waiting = 0
        self._life_since_ns = self._progress_since_ns = 0

    def look(self, signs: EngineSigns, now_ns: int) -> tuple[int, int]:
        """`beat_age_ns` and `progress_age_ns` of an `Observation`, from what the row shows now.

        Ages count from when the engine has work. A queue that gets shorter is progress of an engine that counts
        no tokens; a longer queue is none.
        """
        life, progress = (sign_of_life(signs), sign_of_progress(signs)) if has_work(signs) else (None, None)
        if life is None or life != self._life:
            self._life, self._life_since_ns = life, now_ns
        shorter = not signs.tokens and signs.waiting < self._waiting
        if progress is None or progress != self._progress or shorter:
            self._progress, self._progress_since_ns = progress, now_ns
        self._waiting = signs.waiting
        return now_ns - self._life_since_ns, now_ns - self._progress_since_ns

    def move_again(self, now_ns: int) -> int:
        """The engine was stalled and is not any more: the time in which it has to make progress begins again."""
        self._progress_since_ns = now_ns
        return 0

    def keep(self, verdict: Verdict, signs: EngineSigns, since_ns: int, now_ns: int) -> None:
        """Takes over an earlier watcher's verdict that still holds: `signs` have not changed since `since_ns`."""
        self._life, self._progress, self._waiting = sign_of_life(signs), sign_of_progress(signs), signs.waiting
        self._life_since_ns = since_ns if verdict is Verdict.STALLED else now_ns
        self._progress_since_ns = since_ns


class Silence:
    """For how long nothing was heard of one process on another node, by the clock of its caller.

    Time in which the caller itself did not look does not count: a watcher that was stopped, or that got no
    processor, cannot say that others were silent.
    """

    def __init__(self) -> None:
        self._heard: int | None = None
        self._looked_ns = 0
        self._silent_ns = 0

    def look(self, heard: int, now_ns: int) -> bool:
        """Whether the process is silent now.

        Args:
            heard: a number that changes with each word from it.
            now_ns: the time.
        """
        if heard != self._heard:
            self._heard, self._silent_ns = heard, 0
        else:
            self._silent_ns += min(now_ns - self._looked_ns, REMOTE_INTERVAL_NS)
        self._looked_ns = now_ns
        return self._silent_ns >= SILENT_INTERVALS * REMOTE_INTERVAL_NS


SILENT_STEPS = 20
SILENT_MIN_NS = 2_000_000_000
SILENT_UNKNOWN_NS = 10_000_000_000
"""For an engine that has not counted steps."""


def is_silent(signs: EngineSigns, age_ns: int, steps: int, busy_ns: int) -> bool:
    """Whether an engine that is not stalled yet shows no sign of life for many of its steps.

    Args:
        signs: what its row shows.
        age_ns: since its newest sign of life, by a clock that agrees with the engine's.
        steps: that it has counted.
        busy_ns: how long they took together.
    """
    if not has_work(signs) or signs.paused:
        return False
    return age_ns > (max(SILENT_MIN_NS, SILENT_STEPS * busy_ns // steps) if steps > 0 else SILENT_UNKNOWN_NS)


def state_of(
    verdict: Verdict, signs: EngineSigns, *, drained: bool, silent: bool, steps: bool | None, waking: bool
) -> State:
    """What a rank is, in one word. All tools and `snapshot` use this reading.

    Args:
        verdict: on it.
        signs: what its row shows.
        drained: an operator drained it.
        silent: see `is_silent`.
        steps: in a group with waves, whether its wave machine runs; None without waves: it runs if it has work.
        waking: the group wakes up.
    """
    if verdict is not Verdict.ALIVE:
        return State[verdict.name]
    if drained:
        return State.DRAINED
    if signs.paused:
        return State.PAUSED
    if silent:
        return State.SILENT
    if steps is None:
        return State.RUNNING if has_work(signs) else State.IDLE
    return State.RUNNING if steps else State.WAKING if waking else State.IDLE
