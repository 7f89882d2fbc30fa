"""``dpshm coordinator`` as systemd and containers run it."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest

from dpshm import Engine, Frontend
from dpshm.board.files import segment_path
from tests.e2e.load import environment, run
from tests.support import TIMEOUT_S, leftovers, wait_until


class Service:
    """A ``dpshm coordinator`` and what it tells its service manager."""

    def __init__(self, folder: Path, *arguments: str, **more: str) -> None:
        self.notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = folder / "notify"
        self.notices.bind(str(address))
        self.notices.settimeout(TIMEOUT_S)
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dpshm", "coordinator", *arguments],
                env=environment(NOTIFY_SOCKET=str(address), **more),
                stderr=log,
            )

    def wait_for_notice(self, part: str) -> str:
        """The next notice that has this part."""
        while part not in (notice := self.notices.recv(4096).decode()):
            pass
        return notice

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def end(self, signum: int = signal.SIGTERM) -> int:
        self.process.send_signal(signum)
        return self.process.wait(TIMEOUT_S)


@pytest.fixture
def service(short_path: Path):
    """`service(*arguments)` starts one; it is gone when the test ends."""
    numbers = count()
    with ExitStack() as stack:

        def start(*arguments: str, **more: str) -> Service:
            folder = short_path / str(next(numbers))
            folder.mkdir()
            made = Service(folder, *arguments, **more)
            stack.callback(made.notices.close)
            stack.callback(made.process.wait)
            stack.callback(made.process.kill)
            return made

        yield start


@pytest.mark.slow
def test_ready_is_told_and_sigterm_ends_it_cleanly(group, service):
    """Guards against engines that are started too early, and a restart that finds what the last run left."""
    running = service("-g", group, "--dp-size", "1")
    assert running.wait_for_notice("READY=1").endswith("waiting for 1 ranks")
    with Engine.attach(group, 0):
        running.wait_for_notice("1 of 1 ranks are there")
    assert running.end() == 0
    assert "STATUS=ending: SIGTERM" in running.wait_for_notice("STOPPING=1")
    assert leftovers(group) == []


@pytest.mark.slow
def test_sigterm_leaves_a_board_that_is_in_use(group, service):
    """Guards against `systemctl restart` taking the board, and the drains, from those who use it."""
    first = service("-g", group, "--dp-size", "2", "--no-waves", "--max-frontends", "7")
    first.wait_for_notice("READY=1")
    with Engine.attach(group, 0) as engine, Frontend.attach(group) as frontend, Engine.attach(group, 1):
        run("drain", "1", "-g", group, "--force")
        booked = frontend.route(100)
        assert first.end() == 0
        assert any("stays: it is in use" in line for line in first.lines())
        assert not frontend.board.coordinator_alive()
        frontend.route().done()
        second = service("-g", group)  # all else the board tells
        second.wait_for_notice("READY=1")
        board = frontend.board
        assert (board.epoch[0], board.dp_size, board.frontends) == (2, 2, 7)
        assert board.snapshot()["state"].tolist()[1] == "drained"
        assert board.snapshot()["in_flight"].tolist() == [1, 0]
        engine.receive(frontend.index, 100)
        engine.publish(waiting=0, running=0)
        booked.done()
        assert second.end() == 0
        third = service("-g", group, "--dp-size", "3")
        third.wait_for_notice("READY=1")
        assert any("keeps its 2 ranks: dp_size 3 is for a new board" in line for line in third.lines())
    assert third.end() == 0  # no process uses the group any more
    assert leftovers(group) == []


@pytest.mark.slow
def test_the_watchdog_is_fed(group, service):
    """Guards against a service manager that restarts a healthy coordinator."""
    running = service("-g", group, "--dp-size", "1", WATCHDOG_USEC="400000")
    for _ in range(3):
        running.wait_for_notice("WATCHDOG=1")
    assert running.end(signal.SIGINT) == 0


@pytest.mark.slow
def test_a_log_line_for_each_change_and_none_for_requests(group, service):
    """Guards against a log that grows with the load, or that is silent about a rank."""
    running = service("-g", group, "--dp-size", "1", "--log-format", "json")
    running.wait_for_notice("READY=1")
    with Engine.attach(group, 0) as engine, Frontend.attach(group) as frontend:
        wait_until(lambda: any("all 1 engines" in line for line in running.lines()))
        before = len(running.lines())
        for _ in range(50):  # each of them a wave of its own
            route = frontend.route(10)
            engine.receive(frontend.index, 10, route.wave)
            engine.publish(waiting=0, running=0)
            engine.wave_complete()
            route.done()
        assert engine.wave == 50
        run("drain", "0", "-g", group, "--force")
        wait_until(lambda: any("drained by an operator" in line for line in running.lines()))
        lines = running.lines()
    assert running.end() == 0
    records = [json.loads(line) for line in lines]
    assert all({"time", "level", "logger", "pid", "message"} <= set(record) for record in records)
    new = [record["message"] for record in records[before:]]
    assert [message for message in new if "front-end" not in message] == [
        "steering: engine 0 is drained by an operator"
    ]


@pytest.mark.slow
def test_settings_from_a_file_and_options_win(group, service, tmp_path: Path):
    """Guards against a file that is read and not heeded, and options that it overrides."""
    config = tmp_path / "dpshm.toml"
    config.write_text(f'group = "{group}"\ndp_size = 3\nmax_frontends = 5\nfile_mode = 0o640\n')
    running = service("--config", str(config), "--dp-size", "2", "--file-group", str(os.getegid()))
    running.wait_for_notice("READY=1")
    info = segment_path(group).stat()
    assert stat.S_IMODE(info.st_mode) == 0o640
    assert info.st_gid == os.getegid()
    seen = json.loads(run("stat", "--json", "-g", group, "--over", "0").stdout)
    assert (seen["dp_size"], seen["max_frontends"]) == (2, 5)
    assert running.end() == 0


@pytest.mark.slow
def test_a_second_one_of_the_group_is_refused_with_status_3(group, service):
    """Guards against two coordinators, and against a service manager that restarts the second for ever."""
    running = service("-g", group, "--dp-size", "1")
    running.wait_for_notice("READY=1")
    refused = run("coordinator", "-g", group, "--dp-size", "1", expect=3)
    assert f"has a coordinator, pid {running.process.pid}" in refused.stderr
    assert running.end() == 0


@pytest.mark.slow
def test_errors_say_what_to_do_and_have_their_status(group, line, tmp_path: Path):
    """Guards against a service manager that cannot tell what restarting helps."""
    config = tmp_path / "bad.toml"
    config.write_text("dp_size 8")
    for arguments, status, words in (
        (["-g", group], 2, "dp_size is needed: --dp-size"),
        (["-g", group, "--dp-size", "0"], 2, "dp_size is 0, and must be from 1"),
        (["--config", str(config)], 2, "is not TOML: "),
        (["--config", str(tmp_path / "none")], 2, "cannot read the settings"),
        (["-g", group, "--dp-size", "1", "--mode", "0666"], 2, "file_mode is 0o666"),
        (["-g", group, "--dp-size", "1", "--mode", "rw"], 2, "is not octal"),
        (["-g", group, "--dp-size", "1", "--file-group", "no such"], 2, "no group of this machine"),
        (
            ["-g", group, "--dp-size", "1", "--metrics-host", "300.1.1.1", "--metrics-port", "0"],
            2,
            "cannot listen on",
        ),
    ):
        found, _, err = line.run("coordinator", *arguments)
        assert (found, words in err) == (status, True), err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found, _, err = line.run("coordinator", "-g", group, "--dp-size", "1", "--metrics-port", str(port))
    assert (found, f"ss -ltnp 'sport = :{port}'" in err, "another metrics_port" in err) == (1, True, True), err
    found, _, err = line.run("coordinator", "-g", group, "--dp-size", "1", DPSHM_DIR="/nowhere")
    assert (found, "Set DPSHM_DIR" in err) == (4, True), err
    assert leftovers(group) == []
