"""The engine that computes (``dpshm demo --engine torch``), on the CPU: two ranks, gloo, a tiny model.

PyTorch is too large for the environment of the other tests. Where it is missing and ``DPSHM_TEST_TORCH=1`` is set,
one test makes an environment of its own, once, in ``DPSHM_TORCH_ENV`` (default: a folder in ``~/.cache/dpshm``),
and runs this file in it; the others are skipped, and say where they run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest
import zmq

from dpshm import Coordinator, Frontend, NoEngineAvailable
from dpshm.rules.waves import Phase
from dpshm.sim.demo.children import Child, Children
from dpshm.sim.demo.messages import (
    EngineReport,
    EngineSettings,
    Ready,
    ReplyMessage,
    RequestMessage,
    engine_address,
    frontend_address,
    new_prefix,
)
from tests.e2e.own_environment import OwnEnvironment
from tests.support import wait_until

ROOT = Path(__file__).resolve().parents[2]
TORCH = "torch==2.13.0+cpu"
NEEDS = (TORCH, "numpy", "pyzmq", "msgspec", "typer", "rich", "pytest", "pytest-timeout", "hypothesis")
HERE = "runs in an environment of its own: see test_in_an_environment_with_torch"
HAS_TORCH = find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason=f"no torch here; {HERE}")
TIMEOUT_MS = 60_000


ENVIRONMENT = OwnEnvironment(
    *("torch", "DPSHM_TEST_TORCH", "DPSHM_TORCH_ENV", NEEDS),
    imports="torch, pytest_timeout, hypothesis, msgspec, zmq, typer",
)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(HAS_TORCH, reason="torch is here: the tests below run by themselves")
def test_in_an_environment_with_torch():
    """Guards against tests of the computing engine that never run because PyTorch is missing."""
    ENVIRONMENT.run(__file__)


# The model by itself.


def generate(ranks: int) -> dict[str, dict[str, list[int]]]:
    """What `torch_tokens.py`, beside this file, prints: by way of computing them, the tokens of each request."""
    script = str(Path(__file__).with_name("torch_tokens.py"))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, script, str(ranks)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_torch
@pytest.mark.slow
def test_tokens_depend_on_nothing_but_the_request():
    """Guards against chunks, a batch, a preemption, or experts on another rank that change an answer."""
    one, two = generate(1), generate(2)
    plain = one.pop("plain")
    assert len({tuple(tokens) for tokens in plain.values()}) == len(plain) > 3
    assert one == dict.fromkeys(("in chunks", "one by one", "with preemptions"), plain)
    assert two == {"plain": plain}


# The engine.


class Rig:
    """Two computing engines of a group that has a coordinator, and the test in the place of a front-end."""

    def __init__(self, group: str, children: Children, step_limit_s: float = 60.0) -> None:
        self.group = group
        self.children = children
        self.answers: list[object] = []
        self.frontend = Frontend.attach(group)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.step_limit_s = step_limit_s
        self.sockets: list[zmq.Socket[bytes]] = []
        self.start()

    def start(self) -> None:
        """Starts both ranks, new ones of the same group."""
        prefix = new_prefix()
        for socket in self.sockets:
            socket.close(linger=0)
        self.replies = self.context.socket(zmq.PULL)
        self.replies.bind(frontend_address(prefix, 0))
        store = os.memfd_create("test-ranks", 0)
        self.ranks: list[Child] = []
        for rank in range(2):
            child = self.children.start(f"engine {rank}", "dpshm.sim.torch.engine", (store,))
            child.tell(
                EngineSettings(
                    os.getpid(), self.group, prefix, "board", rank, 2, 1, store, step_limit_s=self.step_limit_s
                )
            )
            self.ranks.append(child)
        os.close(store)
        ready = len([a for a in self.answers if isinstance(a, Ready)])
        while len([a for a in self.answers if isinstance(a, Ready)]) < ready + 2:
            self.read()
            assert not any(child.ended for child in self.ranks), [child.obituary() for child in self.ranks]
        self.requests = [self.context.socket(zmq.PUSH) for _ in range(2)]
        for rank, socket in enumerate(self.requests):
            socket.connect(engine_address(prefix, rank))
        self.sockets = [self.replies, *self.requests]

    def read(self) -> None:
        self.answers += [answer for _, answer in self.children.read(0.05)]

    def send(self, request_id: int, rank: int, prompt_tokens: int, output_tokens: int):
        route = self.frontend.route(prompt_tokens, dp_rank=rank)
        message = RequestMessage.of(request_id, self.frontend.index, route, output_tokens)
        self.requests[rank].send(msgspec.msgpack.encode(message))
        return route

    def completed(self, count: int) -> list[int]:
        done: list[int] = []
        while len(done) < count:
            assert self.replies.poll(TIMEOUT_MS)
            done += msgspec.msgpack.decode(self.replies.recv(), type=ReplyMessage).completed
        return sorted(done)

    def states(self) -> list[str]:
        self.read()
        return self.frontend.snapshot()["state"].tolist()

    def pid(self, rank: int) -> int:
        return int(self.frontend.board.engine_pid[rank])

    def wait_in_step(self, rank: int) -> None:
        """Until that rank is in the middle of a step."""
        board = self.frontend.board
        steps = int(board.steps[rank])
        wait_until(lambda: board.steps[rank] > steps + 3 and board.step_start[rank])

    def close(self) -> None:
        self.frontend.close()
        self.context.destroy(linger=0)


@pytest.fixture
def rig(group, using) -> Iterator[type[Rig]]:
    """Makes a rig of a group with a coordinator."""
    using(Coordinator(group=group, dp_size=2))
    with Children() as children:
        rigs: list[Rig] = []

        def make(**settings):
            rigs.append(Rig(group, children, **settings))
            return rigs[-1]

        yield make
        for rig in rigs:
            rig.close()


@needs_torch
@pytest.mark.slow
def test_waves_of_ranks_that_compute(rig):
    """Guards against a rank that sleeps while the other waits in a collective, and a report that is not true."""
    rig = rig()
    for wave in range(1, 6):
        routes = [rig.send(1, wave % 2, 700, 3), rig.send(2, 1 - wave % 2, 40, 5)] if wave % 2 else []
        routes += [rig.send(3, wave % 2, 20, 1)]
        assert rig.completed(len(routes)) == ([1, 2, 3] if wave % 2 else [3])
        for route in routes:
            route.done()
        board = rig.frontend.board
        wait_until(lambda: (board.wave, board.phase) == (wave, Phase.PAUSED))  # noqa: B023
        wait_until(lambda: rig.states() == ["idle", "idle"])
    rows = rig.frontend.snapshot()
    assert rows["prompt_tokens"].sum() == 3 * 760 + 2 * 20
    assert rows["generation_tokens"].sum() == 3 * 9 + 2 * 1
    assert rows["requests_finished"].sum() == 3 * 3 + 2
    assert rows["requests"].tolist() == [0, 0]
    assert rows["steps"][0] == rows["steps"][1]
    assert (rows["dummy_steps"] > 0).all()
    for child in rig.ranks:
        child.terminate()
    wait_until(lambda: rig.states() == ["absent", "absent"] and all(child.ended for child in rig.ranks))
    assert [a.malformed for a in rig.answers if isinstance(a, EngineReport)] == [0, 0]


@needs_torch
@pytest.mark.slow
def test_a_killed_rank_ends_all_and_the_group_can_be_restarted(rig):
    """Guards against survivors that hang, or go on being chosen, and a board that a restart cannot use."""
    rig = rig()
    routes = [rig.send(i, i % 2, 100, 2000) for i in range(4)]
    rig.wait_in_step(1)
    os.kill(rig.pid(1), signal.SIGKILL)
    wait_until(lambda: rig.states() == ["dead", "dead"])
    with pytest.raises(NoEngineAvailable, match="0 dead, 1 dead"):
        rig.frontend.route(10)
    wait_until(lambda: rig.read() or all(child.ended for child in rig.ranks))
    assert "exit status 3" in rig.ranks[0].obituary()
    assert "cannot finish its step" in rig.ranks[0].obituary()
    for route in routes:
        route.done()
    rig.start()
    wait_until(lambda: rig.states() == ["idle", "idle"])
    again = [rig.send(9, 0, 50, 3), rig.send(10, 1, 50, 3)]
    assert rig.completed(2) == [9, 10]
    for route in again:
        route.done()
    wait_until(lambda: rig.frontend.board.phase is Phase.PAUSED)


@needs_torch
@pytest.mark.slow
def test_a_stuck_rank_makes_the_others_tell_where_they_stand(rig):
    """Guards against a collective that waits for ever without a word."""
    rig = rig(step_limit_s=2.0)
    rig.send(1, 0, 100, 2000)
    rig.wait_in_step(1)
    stopped = rig.pid(1)
    os.kill(stopped, signal.SIGSTOP)
    try:
        wait_until(lambda: rig.read() or rig.ranks[0].ended)
        said = rig.ranks[0].said
        assert "exit status 4" in rig.ranks[0].obituary()
        assert "sim/torch/ranks.py" in said
        assert "its step has lasted over 2 s" in said
    finally:
        os.kill(stopped, signal.SIGCONT)
    # The one that moves again finds the other gone.
    wait_until(lambda: rig.read() or rig.ranks[1].ended)
    assert rig.states() == ["dead", "dead"]


@needs_torch
@pytest.mark.slow
def test_demo(tmp_path):
    """Guards against a demo that takes the option and simulates all the same, or leaves something behind."""
    trace = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 150 * i, "input_length": 30 + 40 * i, "output_length": 4} for i in range(12)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = ["demo", "--engine", "torch", "--engines", "2", "--frontends", "2", "--trace", str(trace)]
    command += ["--time-unit", "ms", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "dpshm", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["sent"], report["completed"], report["lost"]) == (12, 12, 0)
    assert report["waves"] >= 1
    assert report["problems"] == []


@pytest.mark.skipif(HAS_TORCH, reason="torch is here")
def test_without_torch_the_demo_says_what_to_install(tmp_path):
    """Guards against a traceback of every engine where one line says what is missing."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "dpshm", "demo", "--engine", "torch"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "pip install 'dpshm[torch]'" in done.stderr
    assert "Traceback" not in done.stderr
