"""A short soak of `tests.soak`, and a test that it notices wrong sums."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from tests.soak.soak import Soak

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SECONDS = float(os.environ.get("DPSHM_SOAK_S", "40"))
ENOUGH_KILLS_S = 20.0
BUSY = 6.0
"""Processes that run or wait for a processor, on average: the suite alone has about four."""


def test_soak():
    """Guards against requests, counts, memory, descriptors or threads that are lost or left when processes die.

    16 engines, two of them stock, 16 front-ends and two readers at full speed: killed, stopped and restarted, with
    forked workers that outlive them; coordinators are killed, stopped and race for the group, strangers send
    rubbish, the sockets' folder is removed, ranks are drained. `DPSHM_SOAK_S` says for how long. It gets out of
    the way of tests that run beside it, but not of a busy machine.
    """
    niceness = "0" if os.getloadavg()[0] > BUSY else "15"  # it would never get its turn
    command = [
        "nice",
        "-n",
        niceness,
        sys.executable,
        "-m",
        "tests.soak",
        "--json",
        "--minutes",
        str(SECONDS / 60),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    assert result["problems"] == [], done.stderr
    assert done.returncode == 0
    assert result["sent"] == (
        result["completed"] + result["lost_with_their_engine"] + result["lost_with_their_frontend"]
    )
    assert result["completed"] > 0  # how many is the machine's affair
    if SECONDS >= ENOUGH_KILLS_S:
        assert min(result[f"{who}_killed"] for who in ("engines", "frontends", "coordinators")) > 0
        assert result["reads"] > 0
        assert result["epoch"] == result["coordinators_killed"] + 1


class Spoiled(Soak):
    """A soak in which one word is wrong."""

    def _check_books(self):
        ledger, spoilt = self._group.ledger, self._group.frontends[0]
        ledger.words[ledger.at(spoilt.life, "completed")] -= 1
        super()._check_books()


def test_the_soak_can_fail():
    """Guards against books that always balance: one request that was sent and never answered must show."""
    result = Spoiled(1.0, engines=3, frontends=3).run()
    assert result["problems"] == ["front-end 0: sent and without an answer: 1, expected 0"]


class Late(Soak):
    """A soak that reads its totals some time after its last round."""

    def _compare(self):  # instead of the comparison of memory, which a run this short has none for
        time.sleep(0.3)


def test_totals_are_of_a_group_at_rest():
    """Guards against counters that still move while they are compared."""
    result = Late(1.0, engines=3, frontends=3).run()
    assert result["problems"] == []
    answered = result["completed"] + result["lost_with_their_engine"] + result["lost_with_their_frontend"]
    assert result["sent"] == answered
