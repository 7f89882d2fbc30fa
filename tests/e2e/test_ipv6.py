"""A group whose addresses are IPv6: sockets, metrics, page, doctor."""

from __future__ import annotations

import socket
import threading
import urllib.request

import pytest

from dpshm import Coordinator, Engine, Frontend
from dpshm.net.addresses import joined
from dpshm.net.keys import client_keys, make_keys
from dpshm.ops.doctor.probe import connect_problem, publishes
from dpshm.ops.web import Server
from tests.support import wait_until


def has_ipv6() -> bool:
    """Whether this machine has the address ::1."""
    try:
        with socket.socket(socket.AF_INET6) as s:
            s.bind(("::1", 0))
    except OSError:
        return False
    return True


pytestmark = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def look(url: str) -> str:
    """What is served there."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        found: str = answer.read().decode()
        return found


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "::", "0.0.0.0"])
@pytest.mark.parametrize("keys", [False, True])
def test_a_wave_over_tcp(group, using, tmp_path, monkeypatch, host, keys):
    """Guards against a host of one family that a coordinator cannot bind, or that its peers cannot connect to."""
    settings = {"insecure": True}
    if keys:
        make_keys(tmp_path / "keys")
        settings = {"curve_dir": str(tmp_path / "keys")}
        monkeypatch.setenv("DPSHM_CURVE_DIR", str(tmp_path / "keys"))
    coordinator = using(
        Coordinator(group=group, dp_size=2, dp_size_local=1, balancing="hybrid", host=host, **settings)
    )
    address = coordinator.stats_publish_address
    assert address.startswith("tcp://[" if ":" in host else "tcp://")
    engines = [using(Engine.attach(group, rank)) for rank in range(2)]
    coordinator.wait_ready(20)
    assert connect_problem(address) is None
    assert publishes(address, 20, keys=client_keys(tmp_path / "keys") if keys else None)
    with using(Frontend.attach(group)).route(10):
        wait_until(lambda: all(engine.poll(10) or engine.running for engine in engines))


def test_metrics_and_page(group, using):
    """Guards against tools that listen on IPv4 alone, or print an address that a browser cannot open."""
    coordinator = using(Coordinator(group=group, dp_size=1, metrics_port=0, metrics_host="[::1]"))
    host, port = coordinator.metrics_address
    assert host == "::1"
    assert "dpshm_coordinator_up" in look(f"http://{joined(host, port)}/metrics")
    for listened in ("::1", "[::1]"):
        server = using(Server(group, host=listened))
        assert server.url.startswith("http://[::1]:")
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            assert group in look(server.url)
        finally:
            server.shutdown()
