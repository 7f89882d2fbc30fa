"""``dpshm drain`` and ``dpshm undrain`` on a group under load."""

from __future__ import annotations

import json

import pytest

from tests.e2e.load import LoadedGroup, run, stat
from tests.support import wait_until


@pytest.mark.slow
def test_a_drained_rank_empties_and_comes_back(group):
    """Guards against a drain that loses requests, one that is never empty, and a rank that stays out."""
    with LoadedGroup(group, ranks=3, rate=25):
        wait_until(lambda: all(r["requests"] for r in stat(group)["ranks"]))
        done = json.loads(run("drain", "1", "-g", group, "--json", "--timeout", "30").stdout)
        assert (done["drained"], done["empty"], done["requests_left"]) == ([1], [1], {})
        rank = stat(group)["ranks"][1]
        assert (rank["state"], rank["requests"]) == ("drained", 0)
        sent = [f["sent_by_rank"][1] for f in stat(group)["frontends"]]
        finished = rank["requests_finished"]
        assert finished == sum(sent)  # nothing was lost
        others = sum(f["routed"] for f in stat(group)["frontends"])
        wait_until(lambda: sum(f["routed"] for f in stat(group)["frontends"]) > others + 20)
        assert [f["sent_by_rank"][1] for f in stat(group)["frontends"]] == sent
        assert "back in routing: 1" in run("undrain", "1", "-g", group).stdout
        wait_until(lambda: sum(f["sent_by_rank"][1] for f in stat(group)["frontends"]) > finished)


@pytest.mark.slow
def test_the_wait_has_an_end(group):
    """Guards against a drain that is called done while requests are left, and one without progress."""
    with LoadedGroup(group, ranks=2, rate=40):
        wait_until(lambda: stat(group)["ranks"][0]["requests"] > 3)
        done = run("drain", "0", "-g", group, "--timeout", "0", expect=1)
        assert "0 has " in done.stdout
        assert f"dpshm undrain 0 --group {group}" in done.stderr
        assert stat(group)["ranks"][0]["drained"]


@pytest.mark.slow
def test_the_last_rank_is_not_drained_without_force(group):
    """Guards against an operator who takes the whole deployment out of service by mistake."""
    with LoadedGroup(group, ranks=2, rate=1):
        refused = run("drain", "0-1", "-g", group, expect=2)
        assert "--force" in refused.stderr
        assert not any(r["drained"] for r in stat(group)["ranks"])
        run("drain", "0", "1", "-g", group, "--force", "--timeout", "30")
        assert all(r["drained"] for r in stat(group)["ranks"])
        assert "names no ranks of this group" in run("drain", "2", "-g", group, expect=2).stderr
