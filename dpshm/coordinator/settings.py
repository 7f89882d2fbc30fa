"""A coordinator's settings, checked in one place; every field has its unit and its default.

`SettingsDict` names the same fields for type checkers and editors, where settings are keyword arguments.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, Literal, Required, TypedDict

import msgspec
import numpy as np

from dpshm.board import layout
from dpshm.board.files import segment_path
from dpshm.board.words import MAX_WORD
from dpshm.errors import SettingError
from dpshm.net.addresses import hint, host_of, is_loopback

Balancing = Literal["internal", "hybrid", "external"]
HEAD_ADDRESSES, RELAY_ADDRESSES = 3, 2
KEY_DIGITS = 16
"""Where there are relays, the head's addresses end with the key of the group's prefix indexes, hexadecimal."""
_HINTS = {
    "balancing": "; choose internal, hybrid or external, by who balances (the board's permissions are file_mode)"
}
IMMUTABLE = ("balancing", "waves", "counts_with_kv", "exclude_receiver", "head", "node", "nodes")
"""Settings that every process of a group relies on. A coordinator that takes a live board over must agree."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """A coordinator's settings.

    Attributes:
        group: the deployment's name on this node.
        dp_size: number of data-parallel ranks.
        dp_size_local: number of ranks on this node; less than `dp_size` makes the engines' sockets tcp. Default:
            all.
        balancing: which load balancer chooses ranks: the front-ends of this deployment (internal), those of each
            node (hybrid), or a balancer outside (external). The front-ends' socket is tcp unless internal.
        head: the addresses of the group's coordinator on another node, which this one follows
            (`Coordinator.head_addresses`): it gives this node a board, and leaves the waves to its head. With
            hybrid and external balancing, and between `nodes`.
        nodes: on how many nodes front-ends choose among the ranks of all nodes: a relay between their boards
            brings each the rows and bookings of the others. 1: none. With internal balancing.
        node: the number of this node among them, from 0, which is the head's.
        host: address that tcp sockets are bound to.
        curve_dir: folder of the keys (`dpshm keygen`) that peers must have to connect to a tcp socket.
        insecure: allow tcp sockets without keys on other addresses than the loopback's. Every peer that reaches
            them may start waves and drain ranks.
        waves: whether ranks run in lockstep (mixture of experts). Dense models need no waves.
        stats_interval_ms: least interval between publications of changed counts to stock front-ends; 0: none.
            Default: 100, and 0 with external balancing.
        idle_refresh_ms: interval in ms for publishing unchanged counts again.
        counts_with_kv: counts carry the KV-cache usage (vLLM of 2026), or two numbers a rank (August 2025).
        max_engines: rows for engines; `dp_size` can grow up to it.
        max_frontends: rows for front-ends.
        resend_interval_ms: how long a START may stay unanswered, or rows disagree, before START is sent again. The
            coordinator scans the rows every 100 ms.
        wake_timeout_s: how long START is repeated; then the coordinator gives up with a warning.
        stall_timeout_s: an engine that has work and shows no progress for this long is stalled. Longer than the
            longest step. 0: never.
        ready_timeout_s: how long engines may take to start. 0: for ever.
        exclude_receiver: leave the engine that a first request names out of its START. Only for engines that
            accept every request that they are sent: one that refuses it would stay asleep.
        file_mode: permissions of the board: 0o600, or 0o640, 0o604, 0o644 to let other users read. Its owner alone
            writes.
        file_group: the board's group of users, for a file mode that lets a group read. Default: the process's.
        metrics_port: port to serve Prometheus metrics on; 0: any free port. Default: no metrics.
        metrics_host: address to serve them on.
    """

    group: str
    dp_size: int
    dp_size_local: int | None = None
    balancing: Balancing = "internal"
    head: str | None = None
    nodes: int = 1
    node: int = 0
    host: str = "127.0.0.1"
    curve_dir: str | None = None
    insecure: bool = False
    waves: bool = True
    stats_interval_ms: int | None = None
    idle_refresh_ms: int = 4000
    counts_with_kv: bool = True
    max_engines: int | None = None
    max_frontends: int = layout.DEFAULT_FRONTENDS
    resend_interval_ms: int = 200
    wake_timeout_s: float = 10.0
    stall_timeout_s: float = 60.0
    ready_timeout_s: float = 900.0
    exclude_receiver: bool = False
    file_mode: int = 0o600
    file_group: str | None = None
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"

    @property
    def engine_capacity(self) -> int:
        """Rows for engines."""
        return self.max_engines if self.max_engines is not None else max(layout.DEFAULT_ENGINES, self.dp_size)

    @property
    def interval_ms(self) -> int:
        """`stats_interval_ms`, or its default for this kind of balancing."""
        if self.stats_interval_ms is not None:
            return self.stats_interval_ms
        return 0 if self.balancing == "external" else 100

    @property
    def frontends_local(self) -> bool:
        """Whether front-ends connect over ipc."""
        return (self.balancing == "internal" and self.nodes == 1) or self.head is not None

    @property
    def engines_local(self) -> bool:
        """Whether engines connect over ipc."""
        here = self.nodes == 1 and self.dp_size_local in (None, self.dp_size)
        return here or self.head is not None

    @property
    def head_addresses(self) -> tuple[str, str, str]:
        """Of the head: where front-ends connect, where engines hear, and where they report."""
        stats, starts, reports = (self.head or ",,").split(",")[:HEAD_ADDRESSES]
        return stats, starts, reports

    @property
    def head_relay(self) -> tuple[str, str]:
        """Of the head: where relays send, and where they hear."""
        up, down = (self.head or ",,,,").split(",")[HEAD_ADDRESSES : HEAD_ADDRESSES + RELAY_ADDRESSES]
        return up, down

    @property
    def head_prefix_key(self) -> int | None:
        """The head's key of prefix indexes, 63 bits: one for the group. None: this board has its own."""
        if self.head is None or self.nodes == 1:
            return None
        return int(self.head.rpartition(",")[2], 16)

    @property
    def needs_tcp(self) -> bool:
        """Whether any socket is tcp."""
        return not (self.frontends_local and self.engines_local)


class SettingsDict(TypedDict, total=False):
    """The keyword arguments of a coordinator: see `Settings`."""

    group: Required[str]
    dp_size: Required[int]
    dp_size_local: int | None
    balancing: Balancing
    head: str | None
    nodes: int
    node: int
    host: str
    curve_dir: str | None
    insecure: bool
    waves: bool
    stats_interval_ms: int | None
    idle_refresh_ms: int
    counts_with_kv: bool
    max_engines: int | None
    max_frontends: int
    resend_interval_ms: int
    wake_timeout_s: float
    stall_timeout_s: float
    ready_timeout_s: float
    exclude_receiver: bool
    file_mode: int
    file_group: str | None
    metrics_port: int | None
    metrics_host: str


def check_names(given: Iterable[str]) -> None:
    """Checks that these are names of settings.

    Raises:
        SettingError: names the first that is not, and the one that is most like it.
    """
    names = Settings.__struct_fields__
    for name in sorted(set(given) - set(names)):
        alike = get_close_matches(name, names, 1)
        raise SettingError(
            f"unknown setting {name!r}: "
            + (f"is {alike[0]} meant? Otherwise " if alike else "")
            + f"choose from {', '.join(names)}"
        )


def make_settings(**given: Any) -> Settings:
    """Settings from keyword arguments or a decoded file.

    Raises:
        SettingError: names the setting, the value given, and the values that it may have.
    """
    check_names(given)
    given = {name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
    try:
        settings = msgspec.convert(given, Settings)
    except msgspec.ValidationError as e:
        what, _, at = str(e).partition(" - at `$.")
        name = at.rstrip("`")
        found = f"{name} is {given[name]!r}: " if name in given else ""
        raise SettingError(f"{found}{what[:1].lower()}{what[1:]}{_HINTS.get(name, '')}") from None
    segment_path(settings.group)  # raises for a name that cannot name a group
    limits: list[tuple[str, float | None, float, float]] = [
        ("max_engines", settings.max_engines, 1, layout.MAX_ENGINES),
        ("dp_size", settings.dp_size, 1, settings.max_engines or layout.MAX_ENGINES),
        ("dp_size_local", settings.dp_size_local, 0, settings.dp_size),
        ("max_frontends", settings.max_frontends, 1, layout.MAX_FRONTENDS),
        ("nodes", settings.nodes, 1, settings.max_frontends),
        ("node", settings.node, 0, settings.nodes - 1),
        ("stats_interval_ms", settings.stats_interval_ms, 0, 3_600_000),
        ("idle_refresh_ms", settings.idle_refresh_ms, 1, 3_600_000),
        ("resend_interval_ms", settings.resend_interval_ms, 1, 3_600_000),
        ("wake_timeout_s", settings.wake_timeout_s, 0.001, 86_400),
        ("stall_timeout_s", settings.stall_timeout_s, 0, 86_400),
        ("ready_timeout_s", settings.ready_timeout_s, 0, 604_800),
        ("metrics_port", settings.metrics_port, 0, 65_535),
    ]
    for name, value, low, high in limits:
        if value is not None and not low <= value <= high:
            raise SettingError(f"{name} is {value}, and must be from {low:g} to {high:g}")
    _check_nodes(settings)
    if settings.file_mode & ~0o044 != 0o600:
        raise SettingError(
            f"file_mode is 0o{settings.file_mode:o}, and must be 0o600, 0o640, 0o604 or 0o644 (octal, with 0o): "
            "another user that could write to the board could break every process of the group"
        )
    if (
        settings.needs_tcp
        and settings.curve_dir is None
        and not settings.insecure
        and not (settings.host == "lo" or is_loopback(settings.host))  # "lo": ZMQ takes interfaces too
    ):
        raise SettingError(
            f"host is {settings.host!r}, where other machines can connect, and there are no keys: make some with "
            "`dpshm keygen DIR` and give curve_dir=DIR (--curve-dir DIR), or say insecure=True (--insecure) if "
            "every peer that reaches that address may start waves and drain ranks"
        )
    return settings


def _check_nodes(settings: Settings) -> None:
    if settings.nodes > 1:
        if settings.balancing != "internal":
            raise SettingError(
                f"nodes is {settings.nodes} with {settings.balancing} balancing, where front-ends choose among "
                "the ranks of their own node and need no relay: leave nodes out, or use internal balancing"
            )
        if (settings.head is None) != (settings.node == 0):
            raise SettingError(
                f"node is {settings.node} and head is {settings.head!r}: node 0 is the head and has none, and "
                "each other node needs the head's `Coordinator.head_addresses`"
            )
    if settings.head is None:
        return
    *addresses, key = settings.head.split(",")
    for address in (*addresses, key):
        if why := hint(host_of(address)):
            raise SettingError(f"head has {address}, which cannot be connected to{why}")
    if settings.nodes > 1:
        needed = HEAD_ADDRESSES + RELAY_ADDRESSES
        if len(addresses) != needed or not _is_key(key):
            raise SettingError(
                f"head must be what `Coordinator.head_addresses` of a head with nodes={settings.nodes} gives: "
                f"{needed} addresses and the key of its prefix indexes ({KEY_DIGITS} hexadecimal digits), with "
                f"commas. It has {len(addresses) + 1} parts"
            )
    elif len(addresses) + 1 != HEAD_ADDRESSES or settings.balancing == "internal":
        raise SettingError(
            f"head is {settings.head!r} with {settings.balancing} balancing: it must be the three addresses "
            "that the head's `Coordinator.head_addresses` gives, with commas, and balancing hybrid or "
            "external. With internal balancing say how many `nodes` there are, on all of them, and which `node` "
            "this is; or let ranks of other nodes do without a board (`dpshm.engine.remote`)"
        )


def _is_key(text: str) -> bool:
    return len(text) == KEY_DIGITS and set(text) <= set("0123456789abcdef") and int(text, 16) <= MAX_WORD
