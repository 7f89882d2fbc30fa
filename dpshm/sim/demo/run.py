"""The demo: a coordinator, engines and front-ends as real processes, a workload, and a report.

The demo starts all processes. It gives the coordinator its orders and, once there is a board, the others theirs.
It tells all front-ends the same time 0, samples the board while they work, waits for their reports, and ends every
process, also after an error. A signal to end sets a flag that every wait here checks, so no process is left half
started or half ended.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from math import inf
from typing import Any, NamedTuple

from numpy.typing import NDArray

from dpshm.board.board import Board
from dpshm.board.sweep import sweep
from dpshm.errors import DpshmError, StartupTimeout
from dpshm.rules.waves import Phase
from dpshm.sim.demo.cast import Cast
from dpshm.sim.demo.chaos import Chaos
from dpshm.sim.demo.children import Child, Children
from dpshm.sim.demo.interrupt import StopFlag
from dpshm.sim.demo.messages import (
    EngineReport,
    FrontendReport,
    Progress,
    Ready,
)
from dpshm.sim.demo.report import Report, imbalance_of, staleness_of, ttft_of
from dpshm.sim.demo.workload import DemoSettings, Workload, make_workload

GROUP_PREFIX = "demo-"
START_TIMEOUT_S = 60.0
PAUSE_TIMEOUT_S = 5.0
"""Time for the ranks to agree that they are idle after the last reply."""
SAMPLE_INTERVAL_S = 0.05


class DemoFailed(DpshmError):
    """A process of the demo ended before the demo began."""


class Sample(NamedTuple):
    """One sample of a running demo.

    Attributes:
        stage: its present stage.
        elapsed_s: time since time 0; negative before.
        seconds: duration of the workload.
        wave: the coordinator's wave; -1 before there is one.
        phase: its phase; empty before, and where ranks have no waves.
        ranks: `Board.snapshot`, or None before there are ranks.
        sent: requests sent, by front-end.
        answered: requests answered, by front-end.
    """

    stage: str
    elapsed_s: float
    seconds: float
    wave: int
    phase: str
    ranks: NDArray[Any] | None
    sent: list[int]
    answered: list[int]


Show = Callable[[Sample], None]
Tell = Callable[[str], None]


class Screen(NamedTuple):
    """Where a demo shows itself.

    Attributes:
        show: called with a `Sample` about every 50 ms.
        tell: called with lines that stay: the group's name, and what chaos does.
    """

    show: Show
    tell: Tell = lambda _: None


def run_demo(settings: DemoSettings, screen: Screen) -> Report:
    """Runs a demo from start to end.

    Args:
        settings: the demo's settings.
        screen: where it shows itself.

    Raises:
        TraceError, SettingError: the workload cannot be read or made.
        DemoFailed, StartupTimeout: the processes did not start.
        EndedError: a signal asked for the end; all processes and files of the demo are gone.
    """
    with StopFlag() as flag:

        def show_reading(count: int) -> None:
            flag.check()
            screen.show(
                Sample(f"reading the trace: {count} requests", -1.0, settings.seconds, -1, "", None, [], [])
            )

        workload = make_workload(settings, show_reading)
        flag.check()
        with ExitStack() as stack:
            demo = _Demo(settings, workload, screen, flag, stack)
            try:
                demo.start()
                demo.play()
                return demo.report()
            except DpshmError:
                flag.check()  # the signal may have reached a child as well and caused this error
                raise


def _sweep(group: str) -> None:
    with suppress(DpshmError):
        sweep(group)


class _Demo:
    """One run; `stack` ends the processes that it starts."""

    def __init__(
        self, settings: DemoSettings, workload: Workload, screen: Screen, flag: StopFlag, stack: ExitStack
    ) -> None:
        self._settings = settings
        self._workload = workload
        self._show, self._tell = screen
        self._flag = flag
        self._stack = stack
        self._group = f"{GROUP_PREFIX}{os.getpid()}-{secrets.token_hex(2)}"
        self._board: Board | None = None
        stack.callback(_sweep, self._group)  # last of all, in case the coordinator was killed
        self._children = stack.enter_context(Children())
        self._cast = Cast(settings, workload, self._group, self._start)
        self._cut_off = 0  # requests of front-ends that chaos killed
        self._ready: set[Child] = set()
        self._progress: dict[Child, Progress] = {}
        self._reports: dict[Child, FrontendReport] = {}
        self._preemptions = 0
        self._prompt_tokens = self._cached_tokens = 0
        self._imbalance: list[int] = []
        self._problems: list[str] = []
        self._buried: set[Child] = set()
        self._start_ns = 0
        self._end_ns = 0
        self._next_sample_ns = 0

    def start(self) -> None:
        """Starts every process and waits until all are ready."""
        self._cast.start()
        self._wait_until_ready()
        self._board = self._stack.enter_context(Board.attach(self._group))
        self._tell(f"group {self._group}; in another terminal: dpshm top -g {self._group}")
        self._cast.order()
        self._wait_until_ready()

    def _start(self, name: str, module: str, pass_fds: tuple[int, ...]) -> Child:
        if not self._start_ns:
            self._sample("starting the processes")
        return self._children.start(name, f"dpshm.sim.{module}", pass_fds)

    def _wait_until_ready(self) -> None:
        """Waits until every process that has its orders is ready."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while missing := {child for child in self._children.all if child.told} - self._ready:
            self._turn(f"starting: {len(self._ready)} of {len(self._children.all)} processes are ready")
            for child in self._children.all:
                if child.ended:
                    raise DemoFailed(f"the demo could not start: {child.obituary()}")
            if time.monotonic() > deadline:
                names = ", ".join(sorted(child.name for child in missing))
                raise StartupTimeout(
                    f"after {START_TIMEOUT_S:.0f} s these have not started: {names}. Use fewer --engines and "
                    "--frontends, or a machine with less to do"
                )

    def play(self) -> None:
        """Gives the start, and returns when every front-end has reported and the ranks have paused."""
        self._start_ns = self._cast.go()
        last_ns = self._start_ns + round(self._workload.seconds * 1e9)
        chaos = Chaos(self._cast, self._settings.seed, self._tell) if self._settings.chaos else None
        while True:
            answered = all(child in self._reports or child in self._buried for child in self._cast.frontends)
            sending = self._settings.keep or time.monotonic_ns() < last_ns
            if answered and (self._problems or not sending):
                break
            self._turn("sending" if sending else "finishing the requests that were sent")
            self._bury()
            if chaos is not None:
                chaos.turn(time.monotonic()) if sending else chaos.undo()
        self._end_ns = time.monotonic_ns()
        assert self._board is not None
        deadline = time.monotonic() + PAUSE_TIMEOUT_S
        while not self._problems and self._awake() and time.monotonic() < deadline:
            self._turn("waiting for the ranks to pause")

    def _awake(self) -> bool:
        assert self._board is not None
        return self._settings.waves and self._board.phase is not Phase.PAUSED

    def _bury(self) -> None:
        """Tells which children ended early. If an engine did, all outstanding requests are lost."""
        for child in list(self._children.all):
            if not child.ended or child in self._reports:
                continue
            self._buried.add(child)
            if child in self._cast.doomed:
                progress = self._progress.get(child, Progress(0, 0))
                self._cut_off += progress.sent - progress.answered
            else:
                self._problems.append(child.obituary())
                self._tell(self._problems[-1])
                if child in self._cast.engines:
                    for frontend in self._cast.frontends:
                        frontend.terminate()
            self._children.bury(child)

    def _turn(self, stage: str) -> None:
        """Waits a little, reads the children's answers, and samples the board."""
        for child, answer in self._children.read(SAMPLE_INTERVAL_S):
            match answer:
                case Ready():
                    self._ready.add(child)
                case Progress():
                    self._progress[child] = answer
                case FrontendReport():
                    self._reports[child] = answer
                    self._progress[child] = Progress(answer.sent, answer.completed + answer.refused)
                case EngineReport():
                    self._preemptions += answer.preemptions
                    self._prompt_tokens += answer.prompt_tokens
                    self._cached_tokens += answer.cached_tokens
        self._sample(stage)

    def _sample(self, stage: str) -> None:
        self._flag.check()
        now_ns = time.monotonic_ns()
        if now_ns < self._next_sample_ns:
            return
        self._next_sample_ns = now_ns + int(SAMPLE_INTERVAL_S * 1e9)
        board = self._board
        ranks = board.snapshot(now_ns) if board else None
        elapsed_s = (now_ns - self._start_ns) / 1e9 if self._start_ns else -1.0
        if ranks is not None and 0 <= elapsed_s < self._workload.seconds:
            requests = ranks["requests"]
            self._imbalance.append(int(requests.max() - requests.min()))
        progress = self._progress_by_frontend()
        self._show(
            Sample(
                stage,
                elapsed_s,
                inf if self._settings.keep else self._workload.seconds,
                board.wave if board else -1,
                board.phase.name.lower() if board and self._settings.waves else "",
                ranks,
                [p.sent for p in progress],
                [p.answered for p in progress],
            )
        )

    def _progress_by_frontend(self) -> list[Progress]:
        """What each front-end has sent and heard of, also in processes that were killed."""
        each = [[self._progress.get(child, Progress(0, 0)) for child in lives] for lives in self._cast.lives]
        return [Progress(sum(p.sent for p in lives), sum(p.answered for p in lives)) for lives in each]

    def report(self) -> Report:
        """Ends the children and puts the figures together."""
        s, board = self._settings, self._board
        assert board is not None
        ranks = board.snapshot()
        waves = board.wave
        self._stop_engines()
        reports = list(self._reports.values())
        sent = [progress.sent for progress in self._progress_by_frontend()]
        completed = sum(r.completed for r in reports)
        refused = sum(r.refused for r in reports)
        # For a front-end that died, its last progress counts, which does not tell these two apart.
        completed += sum(self._progress[c].answered for c in self._buried if c in self._progress)
        lost = sum(sent) - completed - refused - self._cut_off
        if lost and not self._problems:
            self._problems.append(f"{lost} requests were never answered, though no process ended")
        return Report(
            stats=s.stats,
            policy=s.policy,
            trace=str(s.trace) if s.trace else None,
            rate=s.rate,
            seed=s.seed,
            engines=s.engines,
            frontends=s.frontends,
            seconds=round((self._end_ns - self._start_ns) / 1e9, 3),
            sent=sum(sent),
            completed=completed,
            refused=refused,
            lost=lost,
            cut_off=self._cut_off,
            waves=waves,
            staleness_us=staleness_of([x for r in reports for x in r.staleness_us]),
            ttft_ms=ttft_of([x for r in reports for x in r.ttft_ms]),
            imbalance=imbalance_of(self._imbalance),
            prefix_hit_rate=self._prefix_hit_rate(),
            steps=int(ranks["steps"].max()),
            dummy_steps=int(ranks["dummy_steps"].sum()),
            preemptions=self._preemptions,
            sent_by_frontend=sent,
            finished_by_engine=ranks["requests_finished"].tolist(),
            problems=self._problems,
            workload=s.workload,
        )

    def _prefix_hit_rate(self) -> float | None:
        if not self._workload.block_tokens or not self._prompt_tokens:
            return None
        return round(self._cached_tokens / self._prompt_tokens, 4)

    def _stop_engines(self) -> None:
        for child in self._cast.engines:
            child.terminate()
        deadline = time.monotonic() + PAUSE_TIMEOUT_S
        while not all(child.ended for child in self._cast.engines) and time.monotonic() < deadline:
            self._turn("ending")
