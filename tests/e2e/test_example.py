"""The example server (`tests/examples`) under load: restarts and deaths, and no request fails."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dpshm import Board, SegmentNotFound
from tests.e2e.load import run
from tests.support import wait_until

pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'dpshm[examples]'")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
TOKENS = 40
CLIENTS = 6


class Load:
    """Clients that send one request after another, each over a new connection."""

    def __init__(self, port):
        self._port = port
        self._ended = threading.Event()
        self.wrong, self.right = [], 0
        self._threads = [threading.Thread(target=self._run) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _run(self):
        while not self._ended.is_set():
            try:
                status, tokens = generate(self._port)
            except (OSError, http.client.HTTPException) as e:
                self.wrong.append(repr(e))
                continue
            if (status, tokens) == (200, list(range(TOKENS))):
                self.right += 1
            else:
                self.wrong.append((status, tokens))

    def more(self, count=20):
        """Waits for so many more answers."""
        wanted = self.right + count
        wait_until(lambda: self.right >= wanted or self.wrong, 120)

    def close(self):
        """Ends the clients."""
        self._ended.set()
        for thread in self._threads:
            thread.join()


def generate(port):
    """One request: its status, and the tokens up to the end mark; None at the end says that there was none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/generate", json.dumps({"prompt_tokens": 100, "max_tokens": TOKENS}))
    response = connection.getresponse()
    events = response.read().decode().split("\n\n")
    connection.close()
    if response.status != 200:
        return response.status, events
    *tokens, end, _ = [event.removeprefix("data: ") for event in events]
    return 200, [json.loads(token)["token"] for token in tokens] + ([] if end == "[DONE]" else [None])


def get(port, path):
    """The status and the content of a page."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path)
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


def answers(port):
    """Whether the server answers."""
    try:
        return get(port, "/health")[0] == 200
    except OSError:
        return False


@pytest.fixture(params=["dense", "lockstep"])
def example(request, group, tmp_path):
    """The example as a process, its port, and a function that reads what it has said."""
    with socket.socket() as kept:
        # Its address may be bound once more, and no other connection of this machine gets its port meanwhile.
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        port = kept.getsockname()[1]
        command = [sys.executable, "-m", "tests.examples.serve", "--group", group, "--port", str(port)]
        command += ["--lockstep"] if request.param == "lockstep" else []
        with open(tmp_path / "log", "wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ)
        try:
            wait_until(lambda: process.poll() is not None or answers(port), 120)
            yield process, port, (tmp_path / "log").read_text
        finally:
            process.terminate()
            status = process.wait(60)
    assert status == 0, (tmp_path / "log").read_text()


def test_no_request_fails_while_everything_is_restarted(example, group):
    """Guards against an example that loses requests in a rolling restart, or when a rank dies, in either kind of
    group, and against a library with which it cannot be written.
    """
    process, port, said = example
    with Board.attach(group) as board:
        load = Load(port)
        try:
            load.more()
            wait_until(board.frontend_pid[:2].all)  # one worker answers before the other has begun
            workers = set(board.frontend_pid[:2].tolist())
            process.send_signal(signal.SIGHUP)
            wait_until(lambda: "the workers are next" in said() or load.wrong, 120)
            wait_until(lambda: workers.isdisjoint(board.frontend_pid.tolist()) or load.wrong, 120)
            load.more()
            assert board.engine_incarnation[:3].tolist() == [2, 2, 2]
            os.kill(int(board.engine_pid[1]), signal.SIGKILL)
            wait_until(lambda: board.engine_incarnation[1] == 3, 120)
            load.more()
        finally:
            load.close()
        assert load.wrong == [], said()
        wait_until(lambda: not any(row["requests"] for row in get(port, "/ranks")[1]))
        assert get(port, "/health")[1]["ranks"][1] in ("idle", "running", "waking")
        assert get(port, "/nowhere")[0] == 404
    process.terminate()
    assert process.wait(60) == 0
    with pytest.raises(SegmentNotFound):
        Board.attach(group)


def test_no_request_fails_while_the_group_is_scaled(example, group):
    """Guards against ranks that wait for ever in a collective of the old size, a new rank that is never used, and
    requests that are lost with a rank that was taken away.
    """
    _, port, said = example
    with Board.attach(group) as board:
        lockstep = board.segment.header.waves
        load = Load(port)
        try:
            load.more()
            printed = run("scale", "5", "-g", group).stdout
            assert "5 ranks (before: 3)" in printed
            assert (f"dpshm undrain 0-4 --group {group}" in printed) == lockstep
            wait_until(lambda: "scaled from 3 to 5" in said() or load.wrong, 120)
            started = [2, 2, 2, 1, 1] if lockstep else [1] * 5
            wait_until(lambda: board.engine_incarnation[:5].tolist() == started or load.wrong)
            load.more()
            wait_until(lambda: all(board.snapshot()["requests_finished"]) or load.wrong, 120)
            assert not board.snapshot()["drained"].any()
            if not lockstep:
                assert "Drain them first" in run("scale", "2", "-g", group, expect=2).stderr
                run("drain", "2-4", "-g", group)
            assert "2 ranks (before: 5)" in run("scale", "2", "-g", group).stdout
            wait_until(lambda: "scaled from 5 to 2" in said() or load.wrong, 120)
            load.more()
            assert [board.engine_alive(dp_rank) for dp_rank in range(5)] == [True] * 2 + [False] * 3
        finally:
            load.close()
        assert load.wrong == [], said()
        wait_until(lambda: not any(row["requests"] for row in get(port, "/ranks")[1]))


@pytest.mark.parametrize("example", ["lockstep"], indirect=True)
def test_a_group_at_work_is_not_scaled_in_time(example, group):
    """Guards against a command that gives up and leaves every rank drained."""
    _, port, _ = example
    with Board.attach(group) as board:
        load = Load(port)
        try:
            load.more(1)
            refused = run("scale", "5", "-g", group, "--timeout", "0", expect=2).stderr
            assert "Nothing was changed" in refused
            assert not board.snapshot()["drained"].any()
            assert board.dp_size == 3
            load.more()
        finally:
            load.close()
        assert load.wrong == []
