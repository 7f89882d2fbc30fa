"""``dpshm demo`` as a user runs it: its report, its errors, and that nothing is left of it, however it ends."""

from __future__ import annotations

import gzip
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support import Popen, wait_until
from tests.unit.sim.workloads.samples import SAMPLES

PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


class Shell:
    """Runs demos whose processes and files can be told from all others."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        name, value = "DPSHM_TEST_RUN", secrets.token_hex(8)
        self.mark = {name: value}
        self._mark = f"{name}={value}"
        path = os.pathsep.join([PACKAGE_ROOT, os.environ.get("PYTHONPATH", "")])
        self.environment = {**os.environ, "PYTHONPATH": path, "DPSHM_DIR": folder, name: value}

    def start(self, *arguments: str, stderr: int = subprocess.PIPE, **environment: str) -> Popen[str]:
        return Popen(
            [sys.executable, "-m", "dpshm", *arguments],
            env={**self.environment, **environment},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        with self.start(*arguments) as process:
            out, err = process.communicate()
        return process.returncode, out, err

    def processes(self) -> dict[str, int]:
        """Names and pids of all processes that a demo of ours started, or that they started."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):  # it has just ended, or is another user's
                    if self._mark.encode() in (entry / "environ").read_bytes():
                        found[(entry / "comm").read_text().strip()] = int(entry.name)
        return found

    def check_gone(self) -> None:
        """Waits until no process is left, and no file is."""
        wait_until(lambda: not self.processes())
        assert os.listdir(self.folder) == []


@pytest.fixture
def shell():
    """A shell with a folder for segments; short, because socket paths are."""
    folder = tempfile.mkdtemp(prefix="t-", dir="/dev/shm")
    yield Shell(folder)
    shutil.rmtree(folder)


SMALL = ("demo", "--engines", "3", "--frontends", "2", "--seconds", "2", "--seed", "1")
LONG = ("demo", "--engines", "2", "--frontends", "1", "--seconds", "30")


@pytest.mark.slow
@pytest.mark.parametrize("stats", ["board", "pub"])
def test_report(shell, stats):
    """Guards against a lost request, a report that does not add up, and progress on stdout."""
    code, out, err = shell.run(*SMALL, "--stats", stats, "--policy", "vllm", "--json")
    assert code == 0, err
    report = json.loads(out.splitlines()[-1])
    assert (report["engines"], report["frontends"], report["stats"]) == (3, 2, stats)
    assert report["sent"] == report["completed"] == sum(report["sent_by_frontend"]) > 20
    assert (report["lost"], report["refused"], report["problems"]) == (0, 0, [])
    assert sum(report["finished_by_engine"]) == report["sent"]
    assert report["waves"] >= 1
    assert report["seconds"] >= 2
    assert 0 <= report["staleness_us"]["p50"] <= report["staleness_us"]["p99"]
    assert 0 < report["ttft_ms"]["p50"] <= report["ttft_ms"]["p99"]
    assert 0 <= report["imbalance"]["mean"] <= report["imbalance"]["max"]
    assert "dpshm demo: " in err
    shell.check_gone()


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
def test_a_trace_of_each_format(shell, tmp_path, name):
    """Guards against a trace that is read and not played, and a report that only machines get."""
    trace = tmp_path / "trace.gz"
    trace.write_bytes(gzip.compress(SAMPLES[name]))
    code, out, err = shell.run("demo", "--engines", "1", "--frontends", "1", "--trace", str(trace), "--rate", "40")
    assert code == 0, err
    assert "4 sent, 4 completed, 0 refused, 0 lost" in out
    shell.check_gone()


@pytest.mark.slow
@pytest.mark.parametrize("columns", ["80", "120"])
def test_live_table_on_a_terminal(shell, columns):
    """Guards against a terminal that shows nothing or cuts words, and a report that is lost among frames."""
    ours, theirs = os.openpty()
    with shell.start(*SMALL, "--json", stderr=theirs, TERM="xterm", COLUMNS=columns) as process:
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # the end of a terminal's other side is an error
            while data := os.read(ours, 65536):
                shown += data
        out, _ = process.communicate()
    os.close(ours)
    assert process.returncode == 0
    assert len(out.splitlines()) == 1
    assert json.loads(out)["completed"] > 0
    for word in (b"state", b"waiting", b"running", b"in_flight", b"KV", b"age", b"steps", b"sending", b"wave 0"):
        assert word in shown
    assert b"front-end" in shown
    shell.check_gone()


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.1, 0.4, 0.8, 1.2, 1.8, 2.8])
def test_ctrl_c_leaves_nothing(shell, delay_s):
    """Guards against processes, segments and sockets of a demo that was interrupted, at any moment."""
    with shell.start(*LONG) as process:
        time.sleep(delay_s)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode != 0
    if "is left behind" in err:
        assert process.returncode == 128 + signal.SIGINT
    shell.check_gone()


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.6, 3.0])
def test_sigkill_leaves_nothing(shell, delay_s):
    """Guards against orphans of a demo that could not clean up after itself."""
    with shell.start(*LONG) as process:
        time.sleep(delay_s)
        process.kill()
        process.communicate()
    shell.check_gone()


@pytest.mark.slow
def test_a_killed_engine_is_reported_and_costs_the_exit_status(shell):
    """Guards against a demo that hangs, or calls itself a success, when requests are lost."""
    with shell.start(*LONG, "--json") as process:
        while not process.stderr.readline().startswith("dpshm demo: sending"):
            pass
        os.kill(shell.processes()["dpshm:engine1"], signal.SIGKILL)
        out, err = process.communicate()
    report = json.loads(out.splitlines()[-1])
    assert "engine 1 was killed by signal 9" in err
    assert report["problems"] == ["engine 1 was killed by signal 9"]
    assert process.returncode == (1 if report["lost"] else 0)
    shell.check_gone()


@pytest.mark.slow
def test_chaos(shell):
    """Guards against a demo of failures that loses requests which others could answer, ends with the first of its
    victims, or leaves one of them behind.
    """
    code, out, err = shell.run(
        "demo", "--engines", "3", "--frontends", "2", "--seconds", "22", "--chaos", "--json"
    )
    report = json.loads(out.splitlines()[-1])
    assert (code, report["lost"], report["problems"]) == (0, 0, []), err
    assert report["completed"] + report["cut_off"] == report["sent"] > 50
    for victim in ("engine", "front-end", "the coordinator"):
        for act, undone in ((f"killed {victim}", f"started {victim}"), (f"stopped {victim}", f"let {victim}")):
            assert err.count(f"chaos: {act}") == err.count(f"chaos: {undone}") > 0, (act, err)
    shell.check_gone()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [[], ["--dense"]])
def test_a_demo_that_is_kept(shell, kind):
    """Guards against a group to practise on that ends, falls silent, or is not found from another terminal.

    It goes on after an operator has scaled it.
    """
    with shell.start("demo", "--engines", "2", "--frontends", "2", "--seconds", "1", *kind, "--keep") as process:
        lines = iter(process.stderr.readline, "")
        (command,) = (line for line in lines if "in another terminal: " in line).__next__().split(": ")[-1:]
        stat = ["stat", *command.split()[2:], "--json"]
        assert command.startswith("dpshm top -g demo-")

        def finished():
            code, out, _ = shell.run(*stat)
            return code == 0 and sum(rank["requests_finished"] for rank in json.loads(out)["ranks"])

        first = wait_until(finished)
        wait_until(lambda: finished() > first + 30)  # more than its second of arrivals
        group = ["--group", stat[2]]
        scale = [["drain", "1"], ["scale", "1"], ["undrain", "0"]] if kind else [["scale", "1"], ["undrain", "0"]]
        for command_line in scale:
            code, _, err = shell.run(*command_line, *group)
            assert code == 0, err
        first = finished()
        wait_until(lambda: finished() > first + 30)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    assert "nothing is left behind" in err
    shell.check_gone()


@pytest.mark.slow
def test_the_board_and_the_broadcast_are_compared(shell):
    """Guards against a comparison that plays other arrivals, or ends in a table without a word."""
    code, out, err = shell.run(*SMALL, "--compare", "--seeds", "2")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "3 engines, 2 front-ends, chat at 9x, 2 seeds"
    assert "board: vllm; broadcast: vllm" in lines[1]
    completed = next(line for line in lines if "completed" in line).split()
    assert completed[1] == completed[2]
    assert lines[-1].endswith(".")
    shell.check_gone()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("demo", "--compare", "--keep"), "dpshm: error: --compare plays the board and the broadcast"),
        (("demo", "--json", "--keep", "--trace", "none.csv"), "dpshm: error: --keep has no end, and so no report"),
        (("demo", "--chaos", "--stats", "pub"), "dpshm: error: --chaos is for the board"),
        (("demo", "--engine", "torch", "--dense"), "dpshm: error: the ranks of --engine torch step together"),
        (("demo", "--policy", "best"), "dpshm: error: no policy 'best': choose one of"),
        (("demo", "--engines", "0"), "dpshm: error: engines is 0"),
        (("demo", "--rate", "nan"), "dpshm: error: rate is nan"),
        (("demo", "--trace", "none.csv"), "dpshm: error: cannot read the trace none.csv"),
        (("demo", "--trace", "/dev/null"), "dpshm: error: the trace /dev/null is empty"),
        (("demo", "--trace", "/dev/zero"), "dpshm: error: /dev/zero, line 1: is longer than"),
        (("demo", "--stats", "gossip"), "'--stats'"),
        (("demo", "--seconds", "soon"), "'--seconds'"),
        (("demo", "--nonsense"), "--nonsense"),
        (("nonsense",), "nonsense"),
    ],
)
def test_mistakes_are_told_in_a_line(shell, line, arguments, says):
    """Guards against a traceback, or a demo that starts, where an option or file is wrong."""
    code, out, err = line.run(*arguments, **shell.mark, DPSHM_DIR=shell.folder)
    assert code == 2
    assert says in err
    assert "Traceback" not in err
    assert out == ""
    shell.check_gone()


def test_without_the_extra(shell, tmp_path):
    """Guards against a bare ImportError where the command line's dependencies are not installed."""
    (tmp_path / "typer.py").write_text("raise ImportError('no typer here')")
    shell.environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), shell.environment["PYTHONPATH"]])
    code, _, err = shell.run("demo")
    assert (code, err.count("\n")) == (2, 1)
    assert "pip install 'dpshm[cli]'" in err


def test_help_and_version(shell):
    """Guards against help without examples."""
    code, out, _ = shell.run("demo", "--help")
    assert code == 0
    assert "  Examples:\n    dpshm demo\n" in out
    assert all(f"--{name}" in out for name in ("engines", "frontends", "seconds", "policy", "seed", "trace"))
    code, out, _ = shell.run("--version")
    assert code == 0
    assert out.startswith("dpshm ")


def shared_prompts(folder: str) -> Path:
    """A trace of four prompts of eight blocks, each sent six times, one request every 0.1 s."""
    lines = [
        {
            "timestamp": 100 * i,
            "input_length": 4096,
            "output_length": 2,
            "hash_ids": [100 * (i % 4) + block for block in range(8)],
        }
        for i in range(24)
    ]
    path = Path(folder) / "shared.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.mark.slow
def test_front_ends_know_what_engines_have_cached(tmp_path: Path, shell: Shell):
    """Guards against an index that engines do not feed, front-ends do not read, or that leaves the sums wrong."""
    trace = shared_prompts(str(tmp_path))
    demo = ("demo", "--engines", "4", "--frontends", "2", "--seconds", "4", "--trace", str(trace), "--json")
    hit_rates = []
    for option in ("--prefix-index", "--no-prefix-index"):
        code, out, err = shell.run(*demo, option)
        assert code == 0, err
        report = json.loads(out.splitlines()[-1])
        assert (report["sent"], report["completed"], report["problems"]) == (24, 24, [])
        hit_rates.append(report["prefix_hit_rate"])
    # Each prompt is computed once at least, on one rank. Without the index each rank may compute it once.
    most = 20 * 4095 / (24 * 4096)
    assert 0 < hit_rates[1] < hit_rates[0] <= round(most, 4)
    code, out, err = shell.run(*demo, "--stats", "pub")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["prefix_hit_rate"] <= round(most, 4)
    shell.check_gone()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "3"), "--seeds is for --compare"),
        (("--time-unit", "s"), "are of a trace: name it with --trace"),
        (("--workload", "chat", "--trace", "/none"), "leave --workload or --trace out"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(line, arguments, message):
    """An option that the others leave without an effect is refused, not ignored."""
    status, out, err = line.run("demo", *arguments)
    assert (status, out, message in err) == (2, "", True), err
