"""Serves one page that shows a group live, for people without a terminal on the node. It changes nothing.

    GET /              the page: one file, no other resource
    GET /stream        server-sent events: `past` once (points of the last minutes, recorded events), then a
                       `frame` at each interval and an `event` for each change
    GET /stat.json     the newest frame, as ``dpshm stat --json`` prints it
    GET /loads         the loads at this moment (`dpshm.ops.loads`), for routers outside
    GET /metrics       the group's metrics for Prometheus; they outlive the coordinator

One thread reads the board for all viewers. Beyond loopback a token is required. On loopback the Host header must
name loopback: else a web site could read the page through a local browser (DNS rebinding).
"""

from __future__ import annotations

import hashlib
import hmac
import re
import threading
from base64 import b64encode
from collections import deque
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

import msgspec

from dpshm.board.board import Board
from dpshm.board.events import Event, EventReader
from dpshm.errors import SettingError
from dpshm.net.addresses import bare, is_loopback, joined, reachable
from dpshm.ops.bounded_http import MAX_CONNECTIONS, BoundedHandler, BoundedServer
from dpshm.ops.frame import Frame
from dpshm.ops.loads import LoadReader
from dpshm.ops.watcher import Watcher

PAST_POINTS = 600
PAST_EVENTS = 100
MAX_STREAMS = 64
CLIENT_TIMEOUT_S = 20.0
PAGE = Path(__file__).with_name("page.html")


_SIGNS = {
    "stalled": "!",
    "stuck": "!",
    "silent": "?",
    "unknown": "?",
    "drained": "o",
    "paused": "=",
    "dead": "x",
    "absent": "-",
}
"""Of the states that the page's chart shows; all others have a dot. The page makes the same of new frames."""


class Point(msgspec.Struct, frozen=True):
    """The part of a frame that the page's chart needs: requests and a sign of the state by rank, and the wave."""

    time: float
    wave: int
    phase: str
    waves_started: int
    requests: list[int]
    states: str


class Past(msgspec.Struct):
    """The points and events that a new viewer receives first."""

    points: list[Point]
    events: list[Event]


class Seen(NamedTuple):
    """The number of frames and events that a viewer has received."""

    frame: int
    events: int


def point_of(frame: Frame) -> Point:
    """The point of a frame."""
    started = frame.coordinator.waves_started
    states = "".join(_SIGNS.get(rank.state, ".") for rank in frame.ranks)
    return Point(frame.time, frame.wave, frame.phase, started, [rank.requests for rank in frame.ranks], states)


class Looker(threading.Thread):
    """Reads the board at an interval, and wakes every viewer that waits.

    Attributes:
        number: the number of the newest frame; grows.
        frame: the newest frame, as JSON.
    """

    def __init__(self, group: str, interval_s: float) -> None:
        super().__init__(name="dpshm-look", daemon=True)
        self._interval_s = interval_s
        self._watcher = Watcher(Board.attach(group, any_owner=True))
        self._reader = EventReader(Board.attach(group, any_owner=True), any_owner=True)
        self._points: deque[Point] = deque(maxlen=PAST_POINTS)
        self._events: deque[Event] = deque(maxlen=PAST_EVENTS)
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self.number = 0
        self.frame = b""
        self._told = 0  # events so far
        self._publish_frame()

    def run(self) -> None:
        """The thread."""
        while not self._stopped.wait(self._interval_s):
            self._publish_frame()
        self._watcher.close()
        self._reader.close()

    def _publish_frame(self) -> None:
        frame, events = self._watcher.read(), self._reader.read()
        with self._changed:
            self._points.append(point_of(frame))
            self._events.extend(events)
            self._told += len(events)
            self.frame = msgspec.json.encode(frame)
            self.number += 1
            self._changed.notify_all()

    def past(self) -> tuple[Seen, bytes]:
        """The points and events so far, for a new viewer."""
        with self._changed:
            past = Past(list(self._points), list(self._events))
            return Seen(self.number, self._told), msgspec.json.encode(past)

    def wait(self, seen: Seen, timeout_s: float = 5.0) -> tuple[Seen, bytes, list[Event]]:
        """Waits for a frame that a viewer has not seen; returns it and the viewer's unseen events."""
        with self._changed:
            self._changed.wait_for(lambda: self.number > seen.frame or self._stopped.is_set(), timeout_s)
            new = min(self._told - seen.events, len(self._events))
            return Seen(self.number, self._told), self.frame, list(self._events)[len(self._events) - new :]

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """Ends the thread and every stream."""
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()
        self.join()


class Server(BoundedServer):
    """The HTTP server of one group's page.

    Args:
        group: a group that lives on this node.
        host: the address to listen on.
        port: the port to listen on; 0: any free port.
        token: the token that every request must carry; required if `host` is not loopback.
        interval_s: time between frames.

    Raises:
        SettingError: the server cannot listen there, or `host` is not loopback and there is no token.
    """

    def __init__(
        self,
        group: str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        interval_s: float = 1.0,
    ) -> None:
        host = bare(host)
        self.local = is_loopback(host)
        if not self.local and not token:
            raise SettingError(f"{host} can be reached from outside: give a token, or listen on 127.0.0.1")
        self.token = token
        self.group = group
        self.page = PAGE.read_bytes().replace(b"{{group}}", _escape(group))
        self.policy = content_policy(self.page.decode())
        self.streams = threading.BoundedSemaphore(MAX_STREAMS)
        super().__init__(
            host, port, Handler, settings=("--host", "--port"), max_connections=MAX_STREAMS + MAX_CONNECTIONS
        )
        try:
            self.looker = Looker(group, interval_s)
            self.loads = LoadReader(Board.attach(group, any_owner=True))
        except BaseException:
            self.server_close()
            raise
        self.looker.start()

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{joined(reachable(str(self.server_address[0])), self.server_port)}/" + (
            f"?token={self.token}" if self.token else ""
        )

    def close(self) -> None:
        """Ends every stream and closes the port."""
        self.looker.stop()
        self.server_close()
        self.loads.close()


class Handler(BoundedHandler):
    """One request."""

    server: Server

    def do_GET(self) -> None:
        """Answers one."""
        self.connection.settimeout(CLIENT_TIMEOUT_S)
        url = urlsplit(self.path)
        if not self._may(parse_qs(url.query)):
            return
        match url.path:
            case "/":
                self._send(self.server.page, "text/html; charset=utf-8")
            case "/stat.json":
                self._send(self.server.looker.frame, "application/json")
            case "/loads":
                self._send(self.server.loads.read_json(), "application/json")
            case "/metrics":
                self._metrics()
            case "/stream":
                self._stream()
            case _:
                self.send_error(HTTPStatus.NOT_FOUND)

    def _metrics(self) -> None:
        try:
            from dpshm.ops.metrics import page
        except SettingError as e:  # prometheus-client is not installed
            self.send_error(HTTPStatus.NOT_IMPLEMENTED, str(e))
            return
        self._send(*page(self.server.group))

    def _may(self, query: dict[str, list[str]]) -> bool:
        server = self.server
        if server.token:
            given = query.get("token", [""])[0] or self.headers.get("Authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), server.token.encode()):
                self.send_error(HTTPStatus.FORBIDDEN, "open the address with ?token= that dpshm web printed")
                return False
        # A page of another site that reaches this one by a name of its own says that name: browsers send Host. Who
        # sends none, such as a load balancer's health check, is no browser.
        elif (host := self.headers.get("Host")) is not None and not is_loopback(_host_of(host)):
            self.send_error(HTTPStatus.FORBIDDEN, "open it as http://127.0.0.1 or http://localhost")
            return False
        return True

    def _head(self, kind: str, length: int | None) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()

    def _send(self, body: bytes, kind: str) -> None:
        self._head(kind, len(body))
        self.send_body(body)

    def _stream(self) -> None:
        server = self.server
        if not server.streams.acquire(blocking=False):
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, f"{MAX_STREAMS} watch already")
            return
        try:
            self._head("text/event-stream", None)
            if self.command == "HEAD":
                return
            looker = server.looker
            seen, past = looker.past()
            self._tell("past", past)
            self._tell("frame", looker.frame)
            while not looker.stopped:
                seen, frame, events = looker.wait(seen)
                for event in events:
                    self._tell("event", msgspec.json.encode(event))
                self._tell("frame", frame)
        except OSError:
            return  # it went away
        finally:
            server.streams.release()

    def _tell(self, kind: str, data: bytes) -> None:
        self.wfile.write(b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n")
        self.wfile.flush()


def _host_of(header: str) -> str:
    """The host in a Host header, without its port."""
    match = re.fullmatch(r"\[([0-9a-fA-F:.]+)\](?::\d+)?|([^:]*)(?::\d+)?", header)
    return (match[1] or match[2] or "") if match else ""


def content_policy(page: str) -> str:
    """A content policy that allows the page's own script and style and no other resource."""

    def digest(tag: str) -> str:
        text = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return "'sha256-" + b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _escape(group: str) -> bytes:
    """The group's name for HTML. Characters that no group's name has are left out."""
    return re.sub(r"[^A-Za-z0-9._-]", "", group).encode()
