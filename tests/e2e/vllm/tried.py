"""Which tests with real vLLM servers ran on which release, and how they ended: `tried.json`, and the table of it.

    python -m pytest tests/e2e/vllm/test_dense.py --junitxml dense.xml
    python -m tests.e2e.vllm.tried add 0.32.0 dense.xml

adds what pytest reported, test by test, and writes the table into ``dpshm/vllm/README.md``; ``--own`` and
``--stock`` say that these were vLLM's own tests, with dpshm and without it. `tests.unit.vllm.test_versions`
compares file, table and `dpshm.vllm.versions.TESTED`. A test that was not run is not in the file.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[3]
FILE = Path(__file__).with_suffix(".json")
PAGE = ROOT / "dpshm/vllm/README.md"
MARK = "<!-- tried -->\n"
OWN, STOCK = "vLLM's own, with dpshm", "vLLM's own, without"
HOW = ("passed", "failed", "skipped")

Tried = dict[str, dict[str, dict[str, str]]]
"""By release and file of tests: how each test ended, one of `HOW`."""


def load() -> Tried:
    """What has run so far."""
    found: Tried = json.loads(FILE.read_text()) if FILE.exists() else {}
    return found


def add(tried: Tried, release: str, report: Path, own: str | None = None) -> None:
    """Adds a report of pytest's (``--junitxml``) to what has run.

    Args:
        tried: what has run; it is changed.
        release: of vLLM.
        report: the file.
        own: `OWN` or `STOCK` for vLLM's own tests.
    """
    for case in ElementTree.parse(report).iter("testcase"):
        file = own or f"{case.attrib['classname'].rpartition('.')[2]}.py"
        ends = {child.tag for child in case}
        how = "failed" if ends & {"failure", "error"} else "skipped" if "skipped" in ends else "passed"
        tried.setdefault(release, {}).setdefault(file, {})[case.attrib["name"]] = how


def releases(tried: Tried) -> list[str]:
    """The releases on which anything passed, newest first."""
    passed = [r for r, files in tried.items() if any("passed" in tests.values() for tests in files.values())]
    return sorted(passed, key=lambda release: [int(n) for n in release.split(".")], reverse=True)


def table(tried: Tried) -> str:
    """The table in Markdown: a row for each file of tests, a column for each release.

    A file's tests that were not run are counted without their parameters.
    """
    columns = releases(tried)
    files = sorted({file for by_file in tried.values() for file in by_file}, key=lambda f: (f in (OWN, STOCK), f))
    lines = [["tests", *columns], ["---"] * (len(columns) + 1)]
    for file in files:
        name = file if file in (OWN, STOCK) else f"`tests/e2e/vllm/{file}`"
        there = functions(FILE.with_name(file)) if FILE.with_name(file).exists() else set()
        lines.append([name, *(_cell(tried[release].get(file), there) for release in columns)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(tests: dict[str, str] | None, there: set[str]) -> str:
    if not tests:
        return "not run"
    counts = Counter(tests.values())
    counts["not run"] = len(there - {name.partition("[")[0] for name in tests})
    others = [f"{counts[how]} {how}" for how in (*HOW[1:], "not run") if counts[how]]
    return ", ".join([f"{counts['passed']} of {len(tests)}", *others])


def functions(file: Path) -> set[str]:
    """The names of a file's tests, without parameters."""
    return set(re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.MULTILINE))


def main() -> None:
    """Adds reports, or prints the table."""
    parser = argparse.ArgumentParser(description="Which tests ran on which release of vLLM.")
    commands = parser.add_subparsers(dest="command")
    adding = commands.add_parser("add", help="add reports of pytest's")
    adding.add_argument("release")
    adding.add_argument("reports", nargs="+", type=Path)
    kind = adding.add_mutually_exclusive_group()
    kind.add_argument("--own", dest="own", action="store_const", const=OWN)
    kind.add_argument("--stock", dest="own", action="store_const", const=STOCK)
    options = parser.parse_args()
    tried = load()
    if options.command == "add":
        for report in options.reports:
            add(tried, options.release, report, options.own)
        FILE.write_text(json.dumps(tried, indent=1, sort_keys=True) + "\n")
        before, _, after = PAGE.read_text().partition(MARK)
        rest = after.partition("\n\n")[2]
        PAGE.write_text(f"{before}{MARK}{table(tried)}\n{rest}")
    print(table(tried), end="")


if __name__ == "__main__":
    main()
