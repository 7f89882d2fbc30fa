"""The public `Coordinator`: the coordinator's threads and, if asked for, the group's metrics beside them.

It stands above `dpshm.ops`, which reads boards as any observer does; so the coordinator itself needs no tool.
"""

from __future__ import annotations

import weakref
from typing import Unpack

from dpshm.coordinator.handle import CoordinatorThreads
from dpshm.coordinator.settings import SettingsDict, make_settings


class Coordinator(CoordinatorThreads):
    """Coordinates one group from threads of this process, until `close`.

    Takes the settings of `dpshm.coordinator.settings.Settings` as keyword arguments; `group` and `dp_size` are
    needed. `own_process` says that this process is a coordinator alone. Then its memory has a bound, whatever
    peers send.

    Attributes:
        settings: the settings.
        board: the group's board.
        stats_publish_address: where front-ends connect.
        engine_addresses: (input, output): where engines hear of waves, and where they report.
        metrics_address: (host, port) where metrics are served; None if they are not.

    Raises:
        GroupInUse: a live coordinator has the group.
        SegmentNoSpace: there is no room for the board.
        SettingError: a setting is out of range, or metrics cannot be served.
    """

    def __init__(self, *, own_process: bool = False, **settings: Unpack[SettingsDict]) -> None:
        super().__init__(make_settings(**settings), own_process=own_process)
        self.metrics_address: tuple[str, int] | None = None
        self._close_metrics: weakref.finalize[..., Coordinator] | None = None
        if self.settings.metrics_port is not None:
            try:
                self._serve_metrics(self.settings.metrics_host, self.settings.metrics_port)
            except BaseException:
                self.close()
                raise

    def _serve_metrics(self, host: str, port: int) -> None:
        from dpshm.ops.metrics import MetricsServer  # needs an extra

        metrics = MetricsServer(self.board.segment.group, host, port)
        self.metrics_address = metrics.address
        self._close_metrics = weakref.finalize(self, metrics.close)

    def close(self) -> None:
        """Ends metrics and threads, closes the sockets, removes the segment and the sockets' folder."""
        if self._close_metrics is not None:
            self._close_metrics()
        super().close()
