"""``dpshm web``: its answers with and without access, and the page in a real browser."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dpshm import Coordinator, Engine, Frontend, SettingError
from dpshm.ops.web import PAGE, Server
from tests.e2e.browser import CHROMIUM, Browser
from tests.e2e.load import LoadedGroup, environment, run, stat
from tests.support import TIMEOUT_S, Popen, wait_until

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture
def coordinator(group, using):
    """A coordinator of two ranks."""
    return using(Coordinator(group=group, dp_size=2))


@pytest.fixture
def serve(group, coordinator):
    """`serve(...)` serves the group's page."""
    servers = []

    def start(**settings: Any) -> Server:
        server = Server(group, interval_s=0.05, **settings)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.close()


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and body of one request; header names have _ for -."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=TIMEOUT_S)
    try:
        connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


def told(server: Server, path: str = "/stream") -> Iterator[tuple[str, Any]]:
    """What the stream tells: kind and data."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        assert (answer.status, answer.headers["Content-Type"]) == (200, "text/event-stream")
        while line := answer.readline().decode().rstrip("\n"):
            kind = line.removeprefix("event: ")
            yield kind, json.loads(answer.readline().decode().removeprefix("data: "))
            assert answer.readline() == b"\n"
    finally:
        connection.close()


def test_the_page_needs_nothing_else():
    """Guards against a page that stays blank where the node has no internet, and that tells others of itself."""
    page = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=|@import|url\(|https?://(?!www\.w3\.org/2000/svg)""", page)
    assert "innerHTML" not in page  # names come from other processes


def test_one_look_and_the_stream_say_the_same(group, using, serve):
    """Guards against a page that lags behind, or shows others' numbers."""
    server = serve()
    engine = using(Engine.attach(group, 0))
    engine.publish(waiting=3, running=4)
    stream = told(server)
    kind, past = next(stream)
    assert kind == "past"
    assert past["points"][0]["requests"] == [0, 0]
    assert past["points"][0]["states"] == "--"
    assert "coordinator_started" in [event["kind"] for event in past["events"]]
    frames = (frame for kind, frame in stream if kind == "frame")
    assert wait_until(lambda: next(frames)["ranks"][0]["requests"] == 7)
    frame = json.loads(ask(server, "/stat.json")[2])
    assert (frame["group"], frame["ranks"][0]["waiting"], frame["ranks"][0]["running"]) == (group, 3, 4)
    stream.close()


def test_no_event_is_lost_or_told_twice(group, coordinator, serve):
    """Guards against a viewer who misses a death because two things happened between two frames."""
    stream = told(serve())
    next(stream)
    for _ in range(3):
        coordinator.drain(0)
        coordinator.undrain(0)
    found: list[str] = []
    for kind, event in stream:
        if kind == "event":
            found.append(event["kind"])
        if len(found) == 6:
            break
    assert found == ["rank_drained", "rank_undrained"] * 3
    kinds = [kind for kind, _ in (next(stream) for _ in range(4))]
    assert kinds == ["frame"] * 4
    stream.close()


def test_nothing_can_be_changed(coordinator, serve):
    """Guards against a page that steers, and paths that lead elsewhere."""
    server = serve()
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "get"):
        status, headers, body = ask(server, "/loads", method)
        assert (status, headers["Allow"], body) == (405, "GET, HEAD", "")
    for path in ("/../../etc/passwd", "/stat.json/", "/%2e%2e", "/favicon.ico"):
        assert ask(server, path)[0] == 404


def exchanged(server: Server, request: bytes) -> tuple[bytes, bytes]:
    """The head and the body of what is answered to these bytes."""
    with socket.create_connection(("127.0.0.1", server.server_port), TIMEOUT_S) as s:
        s.sendall(request)
        head, _, body = b"".join(iter(partial(s.recv, 65536), b"")).partition(b"\r\n\r\n")
    return head, body


@pytest.mark.parametrize("path", ["/", "/loads", "/metrics", "/stat.json", "/stream", "/none"])
def test_a_load_balancer_may_ask(serve, path):
    """A health check with HEAD, or with HTTP/1.0 and no host, as HAProxy's is, is answered like any other."""
    server = serve()
    get = ask(server, path)[0] if path != "/stream" else 200
    head, body = exchanged(server, f"HEAD {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    assert (f" {get} ".encode() in head.splitlines()[0], body) == (True, b"")
    if path == "/loads":
        old, body = exchanged(server, b"GET /loads HTTP/1.0\r\n\r\n")
        assert (b" 200 " in old, json.loads(body)["linked"]) == (True, True)


def test_another_site_cannot_read_it(serve):
    """Guards against a web site that resolves its name to 127.0.0.1 and has the browser read the page."""
    server = serve()
    port = server.server_port
    for host, status in (
        (f"127.0.0.1:{port}", 200),
        (f"localhost:{port}", 200),
        (f"[::1]:{port}", 200),
        (f"evil.example:{port}", 403),
        (f"127.0.0.1.evil.example:{port}", 403),
        ("", 403),
    ):
        assert ask(server, "/", Host=host)[0] == status, host
    headers = ask(server, "/")[1]
    assert "Access-Control-Allow-Origin" not in headers
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["Cache-Control"] == "no-store"


def test_a_token_is_asked_for_outside(group, serve):
    """Guards against a deployment's load on a public address, and a token that any prefix satisfies."""
    with pytest.raises(SettingError, match=r"give a token, or listen on 127\.0\.0\.1"):
        Server(group, host="0.0.0.0")
    server = serve(host="0.0.0.0", token="sésame-1234")
    assert ask(server, "/")[0] == 403
    assert ask(server, "/?token=s%C3%A9same")[0] == 403
    assert ask(server, "/stream?token=wrong")[0] == 403
    assert ask(server, "/stat.json?token=s%C3%A9same-1234")[0] == 200
    other = serve(token="abc", host="0.0.0.0")
    assert ask(other, "/stat.json", Authorization="Bearer abc")[0] == 200


def test_a_port_that_is_taken_is_named(group, serve):
    """Guards against a traceback."""
    port = serve().server_port
    with pytest.raises(SettingError, match=rf"cannot listen on 127.0.0.1:{port}.*--port"):
        Server(group, port=port)


@pytest.mark.slow
def test_the_command(group, coordinator):
    """Guards against a command that prints another address, a token that is not new, and one that stays."""
    tokens = set()
    for host in ("127.0.0.1", "0.0.0.0", "0.0.0.0"):
        command = [sys.executable, "-m", "dpshm", "web", "-g", group, "--host", host, "--port", "0"]
        with Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
            line = process.stderr.readline()
            port = int(re.search(r":(\d+)/", line)[1])
            token = re.search(r"\?token=(\S+)", line)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
            connection.request("GET", "/" + (token[0] if token else ""))
            assert f"<title>{group} - dpshm</title>" in connection.getresponse().read().decode()
            connection.close()
            process.send_signal(signal.SIGINT)
            assert process.wait(TIMEOUT_S) == 130
            assert process.stderr.read() == ""
        tokens.add(token[1] if token else None)
    assert len(tokens) == 3
    assert (
        "cannot listen on" in run("web", "-g", group, "--host", "300.0.0.1", expect=2, DPSHM_WEB_TOKEN="x").stderr
    )


@needs_chromium
@pytest.mark.slow
def test_the_page_in_a_browser(group, using, tmp_path: Path):
    """Guards against a page that a browser refuses, that stands still, or that hides a dead rank.

    The pictures stay in the folder that DPSHM_SCREENSHOTS names, for inspection.
    """
    folder = Path(os.environ.get("DPSHM_SCREENSHOTS", tmp_path))
    with LoadedGroup(group, ranks=8, frontends=4, rate=30, stall_timeout_s=3.0) as loaded:
        server = Server(group, interval_s=0.25)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        browser = using(Browser())
        try:
            browser.open(server.url)
            rows = "document.querySelectorAll('#ranks tbody tr').length"
            wait_until(lambda: browser.evaluate(rows) == 8)
            wait_until(lambda: sum(r["requests_finished"] for r in stat(group)["ranks"]) > 100)
            loaded.engines[3].kill()
            loaded.engines[5].signal(signal.SIGSTOP)
            run("drain", "6", "-g", group, "--no-wait")
            alarm = "document.getElementById('alarm').textContent"
            wait_until(lambda: "rank 3 dead, rank 5 stalled" in browser.evaluate(alarm))
            states = "[...document.querySelectorAll('#ranks .state')].map(e => e.textContent)"
            found = browser.evaluate(states)
            assert (found[3], found[5], found[6]) == ("✕ dead", "! stalled", "◌ drained")
            wait_until(lambda: browser.evaluate(states)[0] == "▶ running")
            assert browser.evaluate("document.title").startswith("! ")
            events = "[...document.querySelectorAll('#events li')].map(e => e.textContent).join()"
            wait_until(lambda: "rank 5 stalled" in browser.evaluate(events))
            shown = "document.querySelector('#ranks tbody tr td:nth-child(6)').textContent"
            before = browser.evaluate(shown)
            wait_until(lambda: browser.evaluate(shown) != before)  # it lives
            wait_until(lambda: browser.evaluate("points.length") > 20)
            drawn = (
                "(() => { const c = document.getElementById('lines'), d = c.getContext('2d')"
                ".getImageData(0, 0, c.width, c.height).data; return d.some(v => v); })()"
            )
            assert browser.evaluate(drawn)
            pages = {}
            for scheme in ("light", "dark"):
                browser.scheme(scheme)
                browser.evaluate("draw()")
                pages[scheme] = browser.evaluate("getComputedStyle(document.body).backgroundColor")
                (folder / f"web-{scheme}.png").write_bytes(browser.screenshot())
            assert pages["light"] != pages["dark"]
            fill = "(c => [1, 3, 5].map(i => parseInt(c.slice(i, i + 2), 16)))(colour('dead'))"
            strip = (  # the colour in the middle of rank 3's strip, at its right end, and that of the legend
                "(() => { const c = document.getElementById('lines'), k = c.width / c.clientWidth;"
                "const at = [chart.left + chart.wide - 3, 3.5 * chart.high].map(v => Math.round(v * k));"
                f"return [[...c.getContext('2d').getImageData(...at, 1, 1).data].slice(0, 3), {fill}]; }})()"
            )
            drawn_rgb, dead_rgb = browser.evaluate(strip)
            assert max(abs(a - b) for a, b in zip(drawn_rgb, dead_rgb, strict=True)) <= 3
            for width in (390, 768, 1220, 1221, 1280, 1600):
                browser.call(
                    "Emulation.setDeviceMetricsOverride",
                    width=width,
                    height=900,
                    deviceScaleFactor=1,
                    mobile=False,
                )
                browser.evaluate("draw()")
                assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), width
                cut = "[...document.querySelectorAll('section')].filter(e => e.scrollWidth > e.clientWidth).length"
                assert browser.evaluate(cut) == 0, width
                names = "[...document.querySelectorAll('#ranks tbody tr:first-child td')]"
                shown = f"{names}.filter(e => e.offsetWidth && e.textContent).length"
                assert browser.evaluate(shown) >= 14, width
            loaded.engines[5].signal(signal.SIGCONT)
        finally:
            server.shutdown()
            server.close()
        wait_until(lambda: "No connection" in browser.evaluate(alarm))
        # What the server's end itself makes the browser say is no fault of the page.
        assert [e for e in browser.errors if "ERR_" not in e and "net::" not in e] == []


@needs_chromium
@pytest.mark.slow
def test_the_page_shows_how_full_each_index_is(group, using, serve):
    """Guards against a cache that operators cannot see, and columns that are empty from top to bottom."""
    engines = [using(Engine.attach(group, rank)) for rank in range(2)]
    server = serve()
    browser = using(Browser())
    browser.open(server.url)
    shown = "[...document.querySelectorAll('#ranks .cache')].filter(e => e.offsetWidth).map(e => e.textContent)"
    wait_until(lambda: browser.evaluate("document.querySelectorAll('#ranks tbody tr').length") == 2)
    assert browser.evaluate(shown) == []
    cache = engines[1].open_cache(100, block_tokens=8)
    cache.insert(cache.hasher.fingerprints(range(80)))
    cache.show(blocks_in_use=12)
    wait_until(lambda: browser.evaluate(shown) == ["hit", "index", "-", "-", "-", "10%"])
    assert browser.errors == []


@needs_chromium
@pytest.mark.slow
def test_names_are_text(group, using, serve):
    """Guards against a front-end whose name is a script."""
    name = "<img src=x onerror=alert(1)>"
    using(Frontend.attach(group, owner=name))
    server = serve()
    browser = using(Browser())
    browser.open(server.url)
    cell = "document.querySelector('#frontends tbody td:nth-child(3)')"
    wait_until(lambda: browser.evaluate(f"{cell} !== null"))
    assert browser.evaluate(f"{cell}.textContent") == name
    assert browser.evaluate(f"{cell}.children.length") == 0
    assert browser.errors == []
