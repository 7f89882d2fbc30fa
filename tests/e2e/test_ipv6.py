"""A group whose addresses are IPv6: sockets, metrics, page, doctor."""

from __future__ import annotations

import socket
import subprocess
import sys
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


def test_a_link_local_address_needs_its_interface(group):
    """Sockets and metrics are served at a link-local address with its interface; without it, the error says so."""
    setup = "ip link set lo up && ip addr add fe80::1/64 dev lo nodad"
    if subprocess.run(["unshare", "-n", "sh", "-c", setup], capture_output=True, check=False).returncode:
        pytest.skip("no network namespaces here")
    code = """
import sys, urllib.request
from dpshm import Coordinator, SettingError
settings = dict(group=sys.argv[1], dp_size=2, dp_size_local=1, balancing="hybrid", insecure=True, metrics_port=0)
for host in ("fe80::1", "[fe80::1]"):
    try:
        Coordinator(**settings, host=host, metrics_host=host)
    except SettingError as e:
        assert "needs its interface, such as fe80::1%eth0" in str(e), e
    else:
        raise AssertionError(host)
for host in ("fe80::1%lo", "[fe80::1%lo]"):
    with Coordinator(**settings, host=host, metrics_host=host) as c:
        assert c.stats_publish_address.startswith("tcp://[fe80::1%lo]:"), c.stats_publish_address
        url = "http://[{}]:{}/metrics".format(*c.metrics_address)
        assert b"dpshm_coordinator_up" in urllib.request.urlopen(url, timeout=60).read()
try:
    Coordinator(group=sys.argv[1], dp_size=2, dp_size_local=1, balancing="hybrid", insecure=True,
                head="tcp://[fe80::1]:5,tcp://[fe80::1]:6,tcp://[fe80::1]:7")
except SettingError as e:
    assert "head has tcp://[fe80::1]:5" in str(e) and "needs its interface" in str(e), e
else:
    raise AssertionError("a head that cannot be reached")
"""
    command = ["unshare", "-n", "sh", "-c", f'{setup} && exec "$0" -c "$1" "$2"', sys.executable, code, group]
    subprocess.run(command, check=True)
