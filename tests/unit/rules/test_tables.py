"""The printed tables of the wave rules: what the README shows is what the machines run from."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpshm.rules import waves
from dpshm.rules.waves import COORDINATOR, ENGINE, CoordinatorEvent, EngineEvent, Row

README = Path(waves.__file__).with_name("README.md")


def rendered(table: tuple[Row, ...]) -> str:
    """A table as the README shows it; print this to bring the README up to date."""
    lines = [("event", "when", "becomes", "commands")]
    for row in table:
        events = ", ".join(kind.__name__ for kind in row.events)
        cells = (" and ".join(row.when) or "otherwise", ", ".join(row.becomes), "; ".join(row.commands))
        lines.append((events, *(cell or "-" for cell in cells)))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


@pytest.mark.parametrize(("name", "table"), [("coordinator", COORDINATOR), ("engine", ENGINE)])
def test_the_readme_shows_the_rules_that_run(name: str, table: tuple[Row, ...]):
    """Guards against a page that explains rules which are no longer those of the code."""
    _, _, after = README.read_text(encoding="utf-8").partition(f"<!-- table: {name} -->\n```text\n")
    shown, _, _ = after.partition("\n```\n")
    assert shown == rendered(table)


@pytest.mark.parametrize(("table", "events"), [(COORDINATOR, CoordinatorEvent), (ENGINE, EngineEvent)])
def test_each_event_has_a_row(table: tuple[Row, ...], events: type):
    """Guards against an event that raises KeyError when it comes."""
    assert {kind for row in table for kind in row.events} == set(events.__args__)


@pytest.mark.parametrize("table", [COORDINATOR, ENGINE])
def test_no_row_hides_behind_another(table: tuple[Row, ...]):
    """Guards against a row that never applies, because an earlier one for the same event asks for less."""
    for at, row in enumerate(table):
        for earlier in table[:at]:
            if set(earlier.events) & set(row.events):
                assert not set(earlier.when) <= set(row.when), (earlier, row)
