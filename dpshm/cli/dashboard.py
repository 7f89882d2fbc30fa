"""``dpshm dashboard``: a Grafana dashboard and alert rules for the metrics."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from dpshm.ops.grafana import ALERTS
from dpshm.ops.grafana import dashboard as build


def dashboard(
    alerts: Annotated[bool, typer.Option("--alerts", help="The Prometheus alert rules instead (YAML).")] = False,
) -> None:
    r"""Print a Grafana dashboard (JSON), or Prometheus alert rules, for the metrics of --metrics-port.

    \b
    Examples:
      dpshm dashboard > dpshm.json              import it in Grafana
      dpshm dashboard --alerts > dpshm.yaml     name it in Prometheus' rule_files
    """
    if alerts:
        typer.echo(ALERTS.read_text(encoding="utf-8"), nl=False)
    else:
        typer.echo(msgspec.json.format(msgspec.json.encode(build())).decode())
