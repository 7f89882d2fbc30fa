"""``dpshm top`` in a real terminal (tmux), 80 x 24, on a group under load."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.e2e.load import PACKAGE_ROOT, LoadedGroup, environment, run, stat
from tests.support import LoneBoard, wait_until

needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")


class Terminal:
    """A terminal of a given size that runs one command."""

    def __init__(self, name: str, command: str, width: int = 80, height: int = 24) -> None:
        self._tmux = ["tmux", "-u", "-L", name, "-f", "/dev/null"]
        more = {"TERM": "xterm-256color", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}
        size = ["-x", str(width), "-y", str(height)]
        start = [*self._tmux, "new-session", "-d", *size, f"{command}; echo ended $?; sleep 60"]
        # Else the program would believe these instead of the terminal; who runs tests side by side sets them.
        env = {name: value for name, value in environment(**more).items() if name not in ("COLUMNS", "LINES")}
        subprocess.run(start, env=env, check=True)

    def screen(self) -> str:
        done = subprocess.run([*self._tmux, "capture-pane", "-p"], capture_output=True, text=True, check=True)
        return done.stdout

    def keys(self, *keys: str) -> None:
        subprocess.run([*self._tmux, "send-keys", *keys], check=True)

    def wait_for(self, *parts: str, without: str = "\0") -> str:
        """The screen once it has all these parts."""

        def as_wanted() -> str:
            text = self.screen()
            return text if all(part in text for part in parts) and without not in text else ""

        try:
            return wait_until(as_wanted)
        except AssertionError:
            pytest.fail(f"no {parts} without {without!r} on this screen:\n{self.screen()}")

    def close(self) -> None:
        subprocess.run([*self._tmux, "kill-server"], check=False)


@pytest.fixture
def terminal(group: str, using: Callable):
    """`terminal(arguments)` runs ``dpshm top`` in a terminal."""
    return lambda arguments, **size: using(Terminal(group, f"{sys.executable} -m dpshm top {arguments}", **size))


@needs_tmux
@pytest.mark.slow
def test_eighty_by_twenty_four(group, terminal):
    """Guards against a screen that a standard terminal cannot show, and keys that do the wrong thing."""
    with LoadedGroup(group, ranks=4, frontends=2, rate=20, stall_timeout_s=0.5) as loaded:
        top = terminal(f"-g {group} -i 0.2")
        first = top.wait_for("▶ running", "coordinator alive", "≤", "Undrain", "ttft", "req/s", "tok/s")
        rows = first.splitlines()
        heading = next(i for i, line in enumerate(rows) if line.startswith("▾rank"))
        assert [line.split()[0] for line in rows[heading + 1 : heading + 5]] == ["0", "1", "2", "3"]
        assert any("joined" in line for line in rows)  # events, in the free lines
        assert f"rank 0: pid {loaded.engines[0].pid}" in first

        top.keys("Down", "d")
        top.wait_for(f"Drain rank 1 of group {group}?", "[y] yes")
        top.keys("n")
        top.wait_for("by rank · rank 1:", without="[y] yes")
        assert not stat(group)["ranks"][1]["drained"]
        top.keys("d")
        top.wait_for("[y] yes")
        top.keys("y")
        top.wait_for("◌ drained", without="[y] yes")
        assert [r["drained"] for r in stat(group)["ranks"]] == [False, True, False, False]

        loaded.engines[0].kill()
        loaded.engines[2].signal(signal.SIGSTOP)
        top.wait_for("✕ dead", "! stalled", "! out of routing: rank 0 dead, 2 stalled: dpshm doctor")
        loaded.engines[2].signal(signal.SIGCONT)
        top.wait_for("✕ dead", without="! stalled")

        top.keys("/")
        top.keys("dead")
        top.wait_for("✕ dead", without="◌ drained")
        top.keys("Enter")
        top.wait_for("filter 'dead': 1 of 4")
        top.keys("Escape")
        top.wait_for("◌ drained", without="filter")
        top.keys("s")
        top.wait_for("by state")
        top.keys("r")
        top.wait_for("by state reversed")

        top.keys("Tab")
        top.wait_for("in flight", "sent to", "api-0", "api-1")
        top.keys("d")
        top.wait_for("choose a rank first")
        top.keys("Tab")
        top.wait_for("▾rank", "≤")
        top.keys("?")
        top.wait_for("time to first token", "u undrain", without="▾rank")
        top.keys("d", "?")  # a key that does nothing now, and the one that closes
        top.wait_for("▾rank", without="u undrain")
        top.keys("Space")
        top.wait_for("PAUSED")

        top.keys("q")
        top.wait_for("ended 0")


@needs_tmux
@pytest.mark.slow
@pytest.mark.parametrize("keys", [[], [("?", "time to first token")], [("u", "[y] yes")], [("/", "filter: 3")]])
def test_ctrl_c_ends_it(group, using, terminal, keys):
    """Guards against a terminal that is left in a strange mode, and what Ctrl-C cannot leave."""
    using(LoneBoard(group))
    top = terminal(f"-g {group}")
    top.wait_for("no coordinator", "absent")
    for key, shows in keys:
        top.keys(key)
        top.wait_for(shows)
    top.keys("C-c")
    top.wait_for("ended 0")


@needs_tmux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "size"),
    [
        ("NO_COLOR=1", {}),
        ("TERM=dumb", {}),
        ("TERM=dumb NO_COLOR=1", {"width": 20, "height": 10}),
        ("LANG=C LC_ALL=C", {"width": 20}),
        ("LANG=C LC_ALL=C NO_COLOR=1", {"width": 20, "height": 6}),
    ],
)
def test_poor_terminals(group, using, variables, size):
    """Guards against a traceback where there are no colours, few columns, or no blocks."""
    using(LoneBoard(group, dp_size=4))
    command = f"env {variables} {sys.executable} -m dpshm top -g {group} -i 0.2"
    top = using(Terminal(group, command, **size))
    top.wait_for("4 ranks", "rank", without="Traceback")
    for key in ("Down", "Tab", "Tab", "s", "r"):
        top.keys(key)
    top.keys("q")
    top.wait_for("ended 0", without="Traceback")


@needs_tmux
@pytest.mark.slow
def test_256_ranks_scroll(group, using, terminal):
    """Guards against ranks beyond the screen that cannot be reached."""
    using(LoneBoard(group, engines=256, dp_size=256))
    top = terminal(f"-g {group} -i 0.2", width=120, height=30)
    top.wait_for("256 ranks", "   0 - absent", "  22 - absent", without=" 40 - absent")
    top.keys("End")
    top.wait_for(" 255 - absent", "rank 255:", without="   0 - absent")
    top.keys("Home")
    top.wait_for("   0 - absent", "rank 0:")
    top.keys("/")
    top.keys("200-203")
    top.keys("Enter")
    top.wait_for(" 200 - absent", " 203 - absent", "filter '200-203': 4 of 256", without=" 204 - absent")


@pytest.mark.slow
def test_once_prints_one_frame(group):
    """Guards against --once that needs a terminal, wraps, or has no rates and history."""
    with LoadedGroup(group, ranks=3, rate=20):
        wait_until(lambda: sum(r["requests_finished"] for r in stat(group)["ranks"]) > 3)
        text = run("top", "--once", "-g", group, COLUMNS="100", LINES="24").stdout
    lines = text.splitlines()
    assert lines[0].startswith(f"{group} · no waves (dense) · ")
    assert max(map(len, lines)) <= 100
    assert "tok/s" in lines[1]
    assert [line.split()[0] for line in lines[5:8]] == ["0", "1", "2"]
    assert any(level in lines[5] for level in "▁▂▃▄▅▆▇█")
    assert "ttft" in lines[2]
    assert "\x1b" not in text


def test_without_textual_all_but_the_live_screen_works(group, using, tmp_path):
    """Guards against a coordinator's machine that needs the screen's library for every command."""
    using(LoneBoard(group))
    (tmp_path / "textual.py").write_text("raise ModuleNotFoundError('no textual here')")
    alone = environment(PYTHONPATH=os.pathsep.join([str(tmp_path), PACKAGE_ROOT]))
    ours, theirs = os.openpty()

    def dpshm(*arguments):
        command = [sys.executable, "-m", "dpshm", *arguments, "-g", group]
        return subprocess.run(
            command, env=alone, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, text=True, check=False
        )

    try:
        refused = dpshm("top")
        assert refused.returncode == 2
        assert "pip install 'dpshm[cli]', or use `dpshm top --once`" in refused.stderr
        for arguments in (("top", "--once"), ("stat",)):
            assert dpshm(*arguments).returncode == 0
    finally:
        os.close(ours)
        os.close(theirs)


def test_without_a_terminal_it_says_what_to_use(group, using):
    """Guards against a full-screen program that writes its escapes into a log."""
    using(LoneBoard(group))
    assert "dpshm top --once" in run("top", "-g", group, expect=2).stderr
