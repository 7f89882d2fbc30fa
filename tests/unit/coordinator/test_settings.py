"""What a coordinator can be told."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from dpshm.board import layout
from dpshm.coordinator.settings import IMMUTABLE, Settings, make_settings
from dpshm.errors import SettingError


def test_the_defaults_are_those_that_the_documentation_names():
    """Guards against a default that changes by accident."""
    assert msgspec.to_builtins(make_settings(group="g", dp_size=8)) == {
        "group": "g",
        "dp_size": 8,
        "dp_size_local": None,
        "balancing": "internal",
        "head": None,
        "nodes": 1,
        "node": 0,
        "host": "127.0.0.1",
        "curve_dir": None,
        "insecure": False,
        "waves": True,
        "stats_interval_ms": None,
        "idle_refresh_ms": 4000,
        "counts_with_kv": True,
        "max_engines": None,
        "max_frontends": 64,
        "resend_interval_ms": 200,
        "wake_timeout_s": 10.0,
        "stall_timeout_s": 60.0,
        "ready_timeout_s": 900.0,
        "exclude_receiver": False,
        "file_mode": 0o600,
        "file_group": None,
        "metrics_port": None,
        "metrics_host": "127.0.0.1",
    }


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("dp_size", {"dp_size": 0}, "dp_size is 0, and must be from 1 to 4096"),
    ("dp_size", {"dp_size": -1}, "dp_size is -1, and must be from 1 to 4096"),
    ("dp_size", {"dp_size": 9, "max_engines": 8}, "dp_size is 9, and must be from 1 to 8"),
    ("dp_size", {"dp_size": layout.MAX_ENGINES + 1}, "dp_size is 4097, and must be from 1 to 4096"),
    ("dp_size", {"dp_size": 1 << 70}, "dp_size is "),
    ("dp_size", {"dp_size": True}, "bool"),
    ("dp_size", {"dp_size": "8"}, "dp_size is '8': expected `int`, got `str`"),
    ("dp_size", {"dp_size": 2.5}, "expected `int`, got `float`"),
    ("dp_size_local", {"dp_size_local": 9}, "dp_size_local is 9, and must be from 0 to 8"),
    ("dp_size_local", {"dp_size_local": -1}, "dp_size_local is -1, and must be from 0 to 8"),
    ("max_engines", {"max_engines": 0}, "max_engines is 0, and must be from 1 to 4096"),
    ("max_engines", {"max_engines": 4097}, "max_engines is 4097, and must be from 1 to 4096"),
    ("max_frontends", {"max_frontends": 0}, "max_frontends is 0, and must be from 1 to 4096"),
    ("max_frontends", {"max_frontends": 1 << 40}, "max_frontends is 1099511627776, and must be from 1 to 4096"),
    ("stats_interval_ms", {"stats_interval_ms": -1}, "stats_interval_ms is -1, and must be from 0 to 3.6e.06"),
    ("idle_refresh_ms", {"idle_refresh_ms": 0}, "idle_refresh_ms is 0, and must be from 1 to"),
    ("resend_interval_ms", {"resend_interval_ms": 0}, "resend_interval_ms is 0, and must be from 1 to"),
    ("wake_timeout_s", {"wake_timeout_s": 0.0}, "wake_timeout_s is 0.0, and must be from 0.001 to 86400"),
    ("wake_timeout_s", {"wake_timeout_s": math.nan}, "wake_timeout_s is nan, and must be from 0.001 to 86400"),
    ("stall_timeout_s", {"stall_timeout_s": -0.1}, "stall_timeout_s is -0.1, and must be from 0 to 86400"),
    ("stall_timeout_s", {"stall_timeout_s": math.inf}, "stall_timeout_s is inf, and must be from 0 to 86400"),
    (
        "ready_timeout_s",
        {"ready_timeout_s": 1e9},
        r"ready_timeout_s is 1000000000.0, and must be from 0 to 604800",
    ),
    ("metrics_port", {"metrics_port": 65536}, "metrics_port is 65536, and must be from 0 to 65535"),
    ("file_mode", {"file_mode": 0o620}, "file_mode is 0o620, and must be 0o600, 0o640, 0o604 or 0o644"),
    ("file_mode", {"file_mode": 0o440}, "file_mode is 0o440"),
    ("file_mode", {"file_mode": 0o4600}, "file_mode is 0o4600"),
    ("file_mode", {"file_mode": -1}, "file_mode is 0o-1"),
    ("balancing", {"balancing": "Internal"}, "'Internal'"),
    ("waves", {"waves": 1}, "expected `bool`, got `int`"),
    ("group", {"group": None}, "expected `str`, got `null`"),
    ("nodes", {"nodes": 65}, "nodes is 65, and must be from 1 to 64"),
    ("node", {"nodes": 2, "node": 2}, "node is 2, and must be from 0 to 1"),
    ("nodes", {"nodes": 2, "balancing": "hybrid"}, "nodes is 2 with hybrid balancing"),
    ("node", {"nodes": 2, "node": 1}, "node 0 is the head and has none, and each other node needs the head's"),
    ("node", {"nodes": 2, "head": "a,b,c,d,e"}, "node is 0 and head is 'a,b,c,d,e'"),
    ("head", {"nodes": 2, "node": 1, "head": "a,b,c"}, "5 addresses and the key.*It has 3 parts"),
    ("head", {"nodes": 2, "node": 1, "head": "a,b,c,d,e"}, "5 addresses and the key.*It has 5 parts"),
    ("head", {"nodes": 2, "node": 1, "head": "a,b,c,d,e,f"}, "5 addresses and the key"),
    ("head", {"nodes": 2, "node": 1, "head": "a,b,c,d,e,ffffffffffffffff"}, "5 addresses and the key"),
    ("head", {"head": "a,b,c"}, "say how many `nodes` there are"),
    ("dpsize", {"dpsize": 8}, "unknown setting 'dpsize': is dp_size meant. Otherwise choose from group, "),
    ("qqqq", {"qqqq": 8}, "unknown setting 'qqqq': choose from group, dp_size, "),
]


@pytest.mark.parametrize(
    ("name", "given", "message"), REFUSED, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(REFUSED)]
)
def test_what_is_refused_is_named(name: str, given: dict[str, Any], message: str):
    """Guards against a value that fails much later, or an error that leaves out which setting it was."""
    with pytest.raises(SettingError, match=message) as caught:
        make_settings(**{"group": "g", "dp_size": 8, **given})
    assert name in str(caught.value)


@pytest.mark.parametrize("missing", ["group", "dp_size"])
def test_what_is_missing_is_named(missing: str):
    """Guards against a TypeError for a setting that must be given."""
    given = {"group": "g", "dp_size": 8}
    del given[missing]
    with pytest.raises(SettingError, match=f"`{missing}`"):
        make_settings(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"dp_size": 1},
        {"dp_size": 64},
        {"dp_size": 65},
        {"dp_size": layout.MAX_ENGINES},
        {"dp_size": 3, "max_engines": 3},
        {"dp_size_local": 0},
        {"stats_interval_ms": 0},
        {"stall_timeout_s": 0},
        {"ready_timeout_s": 0.0},
        {"wake_timeout_s": 1},
        {"balancing": "hybrid"},
        {"nodes": 64},
        {"nodes": 2, "node": 1, "head": "a,b,c,d,e,7fffffffffffffff"},
        {"file_mode": 0o640},
        {"file_mode": 0o644},
        {"metrics_port": 0},
    ],
)
def test_what_is_at_its_limit_is_accepted(given: dict[str, Any]):
    """Guards against limits that leave out their ends."""
    settings = make_settings(**{"group": "g", "dp_size": 8, **given})
    assert all(getattr(settings, name) == value for name, value in given.items())
    assert 1 <= settings.dp_size <= settings.engine_capacity <= layout.MAX_ENGINES


def test_room_for_engines_grows_with_dp_size():
    """Guards against a board that is too small for the ranks it was made for, or has no room to grow."""
    capacities = [make_settings(group="g", dp_size=n).engine_capacity for n in (1, 64, 65, 200)]
    assert capacities == [64, 64, 65, 200]
    assert make_settings(group="g", dp_size=2, max_engines=3).engine_capacity == 3


@pytest.mark.parametrize(
    ("balancing", "given", "interval", "local"),
    [
        ("internal", None, 100, True),
        ("hybrid", None, 100, False),
        ("external", None, 0, False),
        ("external", 50, 50, False),
        ("internal", 0, 0, True),
    ],
)
def test_what_balancing_decides(balancing: str, given: int | None, interval: int, local: bool):
    """Guards against counts with external balancing, where engines report none, and ipc to front-ends
    elsewhere.
    """
    settings = make_settings(group="g", dp_size=2, balancing=balancing, stats_interval_ms=given)
    assert settings.interval_ms == interval
    assert settings.frontends_local is local


def test_engines_elsewhere_need_tcp():
    """Guards against ipc paths that ranks of another node cannot reach."""
    local = [make_settings(group="g", dp_size=4, dp_size_local=n).engines_local for n in (None, 4, 3, 0)]
    assert local == [True, True, False, False]


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "10.0.0.1", "::", "eth0", "node7.example", "127.0.0.1.example"])
@pytest.mark.parametrize(
    "tcp", [{"balancing": "hybrid"}, {"balancing": "external"}, {"dp_size_local": 3}, {"nodes": 2}]
)
def test_other_machines_come_in_with_keys_or_on_purpose(host: str, tcp: dict[str, Any]):
    """Guards against sockets that a whole network can reach by default."""
    given = {"group": "g", "dp_size": 4, "host": host, **tcp}
    with pytest.raises(
        SettingError, match=r"other machines can connect.* no keys: .*`dpshm keygen DIR`.*--insecure"
    ):
        make_settings(**given)
    assert make_settings(**given, insecure=True).needs_tcp
    assert make_settings(**given, curve_dir="keys").needs_tcp
    assert not make_settings(group="g", dp_size=4, host=host).needs_tcp  # ipc: no socket is bound there


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "lo"])
def test_this_machine_alone_needs_no_keys(host: str):
    """Guards against keys asked for where only this machine comes in."""
    assert make_settings(group="g", dp_size=4, host=host, balancing="hybrid").host == host


def test_settings_survive_the_way_to_the_daemon():
    """Guards against a coordinator process that runs with other settings than it was given."""
    settings = make_settings(group="g", dp_size=4, balancing="hybrid", wake_timeout_s=2.5, max_engines=9)
    assert make_settings(**msgspec.json.decode(msgspec.json.encode(settings))) == settings


def test_settings_are_fixed_and_documented():
    """Guards against a setting without an explanation, and against changing one under a running group."""
    settings = make_settings(group="g", dp_size=4)
    with pytest.raises(AttributeError):
        settings.dp_size = 5  # type: ignore[misc]
    assert set(IMMUTABLE) < set(Settings.__struct_fields__)
    documented = [line.split(":")[0].strip() for line in (Settings.__doc__ or "").splitlines() if ": " in line]
    assert [name for name in Settings.__struct_fields__ if name not in documented] == []
