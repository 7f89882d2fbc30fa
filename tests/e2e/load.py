"""A group under load made of real processes, whose ranks are independent: one may be killed and the rest go on.

Dense ranks (``waves=False`` for the coordinator) or lockstep ones without a collective: each engine process
takes requests from a ZMQ socket, batches them with the demo's `Batcher`, sleeps its steps and answers; each
front-end process sends at a rate and books every request. The functions run in `tests.support.Remote`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import zmq

from dpshm import Board, CoordinatorProcess, DpshmError, Engine, Frontend
from dpshm.ops.read_frame import read_frame
from dpshm.sim.batching import Batcher, SimRequest
from tests.support import Remote, gone, wait_until

PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


def run_engine(group: str, dp_rank: int, told: Callable[[], bool], *, waves: bool) -> None:
    """One rank's process, until it is told to end."""
    context = zmq.Context()
    requests = context.socket(zmq.PULL)
    requests.bind(f"ipc://@{group}-engine-{dp_rank}")
    replies: dict[int, Any] = {}
    batcher = Batcher()
    with Engine.attach(group, dp_rank) as engine:
        steps = 0

        def publish() -> None:
            engine.publish(
                waiting=batcher.waiting,
                running=batcher.running,
                kv_cache_usage=batcher.kv_cache_usage,
                prefill_backlog=batcher.prefill_backlog,
                step=steps,
            )

        while not told():
            if not batcher.unfinished:
                requests.poll(50)
            engine.poll()
            while requests.poll(0):
                frontend, number, prompt, output, wave = requests.recv_pyobj()
                engine.receive(frontend, prompt, wave)
                batcher.add(SimRequest((frontend, number), prompt, output))
            publish()
            if not batcher.unfinished:
                if waves and engine.running:
                    engine.wave_complete()
                continue
            step = batcher.plan()
            with engine.step(prefill_tokens=step.prompt_tokens, batch=step.output_tokens):
                time.sleep(step.seconds)
            steps += 1
            first, completed = batcher.finish(step)
            engine.finished(len(completed))
            publish()
            for request in (*first, *completed):
                frontend, number = request.key
                if frontend not in replies:
                    replies[frontend] = context.socket(zmq.PUSH)
                    replies[frontend].connect(f"ipc://@{group}-frontend-{frontend}")
                replies[frontend].send_pyobj((number, request.output_tokens if request in completed else 0))
    context.destroy(linger=0)


def run_frontend(group: str, dp_size: int, told: Callable[[], bool], *, rate: float, name: str, seed: int) -> None:
    """One front-end's process: about `rate` requests a second, until it is told to end."""
    random = Random(seed)
    context = zmq.Context()
    engines = []
    for dp_rank in range(dp_size):
        engines.append(context.socket(zmq.PUSH))
        engines[-1].connect(f"ipc://@{group}-engine-{dp_rank}")
    with Frontend.attach(group, owner=name) as frontend:
        answers = context.socket(zmq.PULL)
        answers.bind(f"ipc://@{group}-frontend-{frontend.index}")
        routes, number, due = {}, 0, time.monotonic()
        while not told():
            if time.monotonic() >= due:
                due += random.expovariate(rate)
                prompt, output, number = random.randint(200, 4000), random.randint(20, 300), number + 1
                try:
                    route = routes[number] = frontend.route(prompt)
                except DpshmError:
                    continue
                engines[route.dp_rank].send_pyobj((frontend.index, number, prompt, output, route.wave))
            answers.poll(max(0, min(20, int((due - time.monotonic()) * 1000))))
            while answers.poll(0):
                answered, output_tokens = answers.recv_pyobj()
                if output_tokens:
                    routes.pop(answered).done(output_tokens)
                else:
                    routes[answered].first_token()
    context.destroy(linger=0)


class LoadedGroup:
    """A coordinator, engines and front-ends under load; leaving the context ends them all."""

    def __init__(
        self,
        group: str,
        *,
        ranks: int = 4,
        frontends: int = 2,
        rate: float = 10.0,
        waves: bool = False,
        **settings: Any,
    ) -> None:
        self.group, self.ranks, self.waves = group, ranks, waves
        self.coordinator = CoordinatorProcess(group=group, dp_size=ranks, waves=waves, **settings)
        self.engines = [Remote() for _ in range(ranks)]
        self.frontends = [Remote() for _ in range(frontends)]
        for dp_rank in range(ranks):
            self.start_engine(dp_rank)
        wait_until(lambda: all(r["state"] not in ("absent", "dead") for r in stat(group)["ranks"]))
        for i, remote in enumerate(self.frontends):
            remote.begin(
                "from tests.e2e.load import run_frontend\n"
                "run_frontend(group, ranks, told, rate=rate, name=name, seed=seed)",
                group=group, ranks=ranks, rate=rate / frontends, name=f"api-{i}", seed=i,
            )  # fmt: skip

    def start_engine(self, dp_rank: int) -> None:
        """Starts a rank, or starts it again in a new process."""
        if gone(self.engines[dp_rank].pid):
            self.engines[dp_rank] = Remote()
        self.engines[dp_rank].begin(
            "from tests.e2e.load import run_engine; run_engine(group, dp_rank, told, waves=waves)",
            group=self.group, dp_rank=dp_rank, waves=self.waves,
        )  # fmt: skip

    def close(self) -> None:
        """Ends every process."""
        for remote in (*self.frontends, *self.engines):
            remote.close()
        self.coordinator.close()

    def __enter__(self) -> LoadedGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def environment(**more: str) -> dict[str, str]:
    """That of a command under test: this checkout, and no colours."""
    path = os.pathsep.join([PACKAGE_ROOT, os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", "TERM": "dumb", **more}


def run(*arguments: str, expect: int | None = 0, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs ``dpshm`` to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "dpshm", *arguments],
        env=environment(**more), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert expect is None or done.returncode == expect, f"status {done.returncode}: {done.stdout}{done.stderr}"
    return done


COMMAND_LINE = """
import contextlib, io, sys
from dpshm.cli import main
def command(arguments, environment):
    os.environ.update(environment)
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["dpshm", *arguments]
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as e:
            code = e.code or 0
    for name in environment:
        del os.environ[name]
    return code, out.getvalue(), err.getvalue()
"""


class CommandLine:
    """Runs many ``dpshm`` commands that end by themselves, an error each, for the price of one interpreter."""

    def __init__(self) -> None:
        self._remote = Remote()
        self._remote.run(COMMAND_LINE)

    def run(self, *arguments: str, **more: str) -> tuple[int, str, str]:
        """Exit status, stdout and stderr of one; `more` are environment variables."""
        status, out, err = self._remote.eval("command(arguments, more)", arguments=list(arguments), more=more)
        return status, out, err

    def close(self) -> None:
        """Ends the process."""
        self._remote.close()


def stat(group: str) -> Any:
    """What ``dpshm stat --json`` would print of a group, without the process."""
    with Board.attach(group) as board:
        return json.loads(msgspec.json.encode(read_frame(board)))
