"""What a coordinator can be told, checked in one place; every field has its unit and its default."""

from __future__ import annotations

import ipaddress
from typing import Any, Literal

import msgspec

from dpshm.board import layout
from dpshm.board.files import segment_path
from dpshm.errors import SettingError

Mode = Literal["internal", "hybrid", "external"]
_HINTS = {
    "balancing": "; choose internal, hybrid or external, by who balances (the board's permissions are file_mode)"
}
IMMUTABLE = ("balancing", "waves", "counts_with_kv", "exclude_receiver")
"""What every process of a group relies on: a coordinator that takes a live board over must agree in these."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """A coordinator's settings.

    Attributes:
        group: the deployment's name on this node.
        dp_size: number of data-parallel ranks.
        dp_size_local: those on this node; fewer than `dp_size` makes the engines' sockets tcp. Default: all.
        balancing: who balances: the front-ends of this deployment (internal), of each node (hybrid), or somebody
            outside (external). Not internal makes the front-ends' socket tcp.
        host: the address that tcp sockets are bound to.
        curve_dir: folder of the keys (`dpshm keygen`) that peers must have who come in through a tcp socket.
        insecure: tcp sockets without keys may be bound to other addresses than the loopback's: whoever reaches
            them may start waves and drain ranks.
        waves: whether ranks run in lockstep (mixture of experts); dense models need no waves.
        stats_interval_ms: stock front-ends hear changed counts at most this often; 0: never. Default: 100, and
            0 with external balancing.
        idle_refresh_ms: and unchanged ones this often.
        counts_with_kv: counts carry the KV-cache usage (2026), or two numbers a rank (August 2025).
        max_engines: rows for engines; `dp_size` can grow up to it.
        max_frontends: rows for front-ends.
        resend_interval_ms: how long START may go unheeded, or rows disagree, before START is sent again; rows are
            looked at every 100 ms.
        wake_timeout_s: how long a wake-up is repeated before it is given up with a warning.
        stall_timeout_s: an engine with work that shows no sign of life for so long is stalled; longer than
            the longest step. 0: never.
        ready_timeout_s: how long the engines may take to come up. 0: for ever.
        exclude_receiver: leave the engine that a first request names out of its START. Only for engines that
            take whatever they are sent: one that refuses the request would stay asleep.
        file_mode: permissions of the board. Its owner always writes; others can be let read: 0o640, 0o644.
        file_group: the board's group, for a file mode that lets a group read. Default: that of the process.
        metrics_port: serve Prometheus metrics there; 0: any free port. Default: none are served.
        metrics_host: and on that address.
    """

    group: str
    dp_size: int
    dp_size_local: int | None = None
    balancing: Mode = "internal"
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
        return self.balancing == "internal"

    @property
    def engines_local(self) -> bool:
        """Whether engines connect over ipc."""
        return self.dp_size_local is None or self.dp_size_local == self.dp_size

    @property
    def needs_tcp(self) -> bool:
        """Whether any socket is tcp."""
        return not (self.frontends_local and self.engines_local)


def make_settings(**given: Any) -> Settings:
    """Settings from keyword arguments or a decoded file.

    Raises:
        SettingError: names the setting, what it was, and what it may be.
    """
    unknown = sorted(given.keys() - set(Settings.__struct_fields__))
    if unknown:
        raise SettingError(f"unknown setting {unknown[0]!r}: choose from {', '.join(Settings.__struct_fields__)}")
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
    if settings.file_mode & ~0o044 != 0o600:
        raise SettingError(
            f"file_mode is 0o{settings.file_mode:o}, and must be 0o600, 0o640, 0o604 or 0o644 (octal, with 0o): "
            "whoever else could write to the board could break every process of the group"
        )
    if (
        settings.needs_tcp
        and settings.curve_dir is None
        and not settings.insecure
        and not _is_loopback(settings.host)
    ):
        raise SettingError(
            f"host is {settings.host!r}, where other machines can connect, and there are no keys: make some with "
            "`dpshm keygen DIR` and give curve_dir=DIR (--curve-dir DIR), or say insecure=True (--insecure) if "
            "whoever reaches that address may start waves and drain ranks"
        )
    return settings


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", "lo")
