"""``dpshm events`` beside a group whose ranks die, stop and come back."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from queue import Queue

import pytest

from tests.e2e.load import LoadedGroup, environment, run, stat
from tests.support import TIMEOUT_S, Popen, wait_until


@pytest.mark.slow
def test_what_happens_is_told_as_it_happens_and_afterwards(group):
    """Guards against events that only a follower sees, or that come late, twice, or in the wrong order."""
    with LoadedGroup(group, ranks=4, rate=10, stall_timeout_s=0.5) as loaded:
        command = [sys.executable, "-m", "dpshm", "events", "--json", "-g", group, "--history", "0"]
        with Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as follower:
            lines: Queue[str] = Queue()
            threading.Thread(target=lambda: [lines.put(line) for line in follower.stdout], daemon=True).start()

            def follows() -> bool:
                """Whether it has begun to look: it told of something that was done since."""
                run("drain", "0", "-g", group, "--no-wait")
                run("undrain", "0", "-g", group)
                return not lines.empty()

            wait_until(follows)
            loaded.engines[1].kill()
            wait_until(lambda: stat(group)["ranks"][1]["state"] == "dead")
            loaded.engines[2].signal(signal.SIGSTOP)
            wait_until(lambda: stat(group)["ranks"][2]["state"] == "stalled")
            loaded.engines[2].signal(signal.SIGCONT)
            wait_until(lambda: stat(group)["ranks"][2]["state"] in ("running", "idle"))
            loaded.start_engine(1)
            live = []
            while not live or live[-1]["kind"] != "rank_joined":
                live.append(json.loads(lines.get(timeout=TIMEOUT_S)))
            follower.send_signal(signal.SIGINT)
            assert follower.wait(TIMEOUT_S) == 130
        later = run("events", "--json", "--no-follow", "-g", group, "--history", "256").stdout.splitlines()
        text = run("events", "--no-follow", "-g", group, "--history", "256").stdout
        assert len(run("events", "--no-follow", "-g", group, "--history", "1").stdout.splitlines()) == 1
    told, kept = ([(e["kind"], e["row"]) for e in events] for events in (live, map(json.loads, later)))
    # On a busy machine other ranks may stall as well.
    rest = iter(told)
    wanted = [("rank_died", 1), ("rank_stalled", 2), ("rank_recovered", 2), ("rank_joined", 1)]
    assert all(event in rest for event in wanted), told
    first = next(i for i in range(len(kept)) if kept[i : i + len(told)] == told)
    # Wall-clock times of two processes for the same record: each read its clocks at its own time.
    last = json.loads(later[first + len(told) - 1])
    assert last["time"] == pytest.approx(live[-1]["time"], abs=5.0)
    assert "rank 1 is back in a new process" in text
