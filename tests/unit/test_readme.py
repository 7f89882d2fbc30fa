"""The pages beside the code: what they name exists, their tables equal the code's, and their examples run.

A reader copies from these pages and follows their links. Each test compares one kind of statement with the code.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dpshm import Coordinator, Engine
from dpshm.board import words
from dpshm.board.layout import DEFAULT_ENGINES, DEFAULT_FRONTENDS, PAGE_BYTES, STEP_MODEL_WORDS, make_layout
from dpshm.cli import COMMANDS, load_command
from dpshm.coordinator.settings import Settings, make_settings
from dpshm.policies import NAMES, View
from dpshm.rules import waves
from dpshm.rules.liveness import Verdict
from dpshm.service.serve import read_config
from tests.unit.test_imports import FLOORS

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = sorted(
    path
    for folder in (".", "dpshm", "bench", "tests")
    for path in (ROOT / folder).glob("*.md" if folder == "." else "**/*.md")
)
NAMED_TEST = re.compile(r"`([\w/]+\.py)::(test_\w+)")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def name_of(path: Path) -> str:
    """A page's name in the tests' ids."""
    return str(path.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@cache
def text_of(page: Path) -> str:
    """A page's text."""
    return page.read_text(encoding="utf-8")


def block(page: Path, marker: str) -> str:
    """The fenced block after a marker comment."""
    found = re.search(rf"<!-- {marker} -->\n```\w*\n(.*?)```", text_of(page), re.DOTALL)
    assert found, f"{page} has no block {marker!r}"
    return found.group(1)


def section(page: Path, title: str) -> str:
    """The text between a heading and the next heading."""
    text = FENCE.sub(lambda fence: fence.group().replace("\n#", "\n #"), text_of(page))  # comments are no headings
    found = re.search(rf"^#+ {title}\n(.*?)(?=^#{{1,6}} |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"{page} has no section {title!r}"
    return found.group(1)


def rows(text: str) -> list[list[str]]:
    """The cells of the rows of a text's tables, without heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rules = {i for i, line in enumerate(lines) if re.fullmatch(r"[|\- ]+", line)}
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for i, line in enumerate(lines)
        if i not in rules and i + 1 not in rules
    ]


def run(code: str, *arguments: str, strict: bool = True) -> str:
    """What a program prints that stands on a page."""
    warnings = ["-W", "error"] if strict else []
    done = subprocess.run(
        [sys.executable, *warnings, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# What stands on every page.


def test_the_pages_are_found() -> None:
    """Guards against a test of pages that reads none."""
    found = {name_of(page) for page in PAGES}
    assert {"README.md", "CONTRIBUTING.md", "dpshm/README.md", "dpshm/board/README.md", "tests/README.md"} <= found


def test_the_first_page_is_short() -> None:
    """Guards against a README that a user does not read to its end."""
    assert len(text_of(README).splitlines()) <= 130


def test_the_first_page_leads_to_every_other() -> None:
    """Guards against a page that no reader finds."""
    reached, todo = {README}, [README]
    while todo:
        page = todo.pop()
        for target, _ in links(page):
            other = (page.parent / target).resolve() if target else page
            if other.suffix == ".md" and other not in reached:
                reached.add(other)
                todo.append(other)
    assert set(PAGES) - reached == set()


def links(page: Path) -> Iterator[tuple[str, str]]:
    """The links of a page within the repository, pictures too: the path and the anchor, either may be empty."""
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(page))):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


@cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#{1,6} (.*)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_every_link_leads_somewhere(page: Path) -> None:
    """Guards against a link to a page, a picture or a heading that was moved."""
    broken = []
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{path}#{anchor}")
    assert broken == []


@every_page
def test_every_named_file_exists(page: Path) -> None:
    """Guards against a page that sends its reader to a file that was moved."""
    package = ROOT / "dpshm"
    places = (ROOT, page.parent, package, ROOT / "tests", ROOT / "bench")
    named = set(re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|md))`", text_of(page)))
    named |= set(re.findall(r"`((?:[\w-]+/)+)`", text_of(page)))
    named -= {"emptyDir/"}
    assert sorted(name for name in named if not any((place / name).exists() for place in places)) == []


@every_page
def test_every_named_test_exists(page: Path) -> None:
    """Guards against a test that was renamed or removed, and is still said to keep a promise."""
    missing = []
    for path, name in set(NAMED_TEST.findall(text_of(page))):
        file = ROOT / "tests" / path.removeprefix("tests/")
        tree = ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else ast.Module([], [])
        if name not in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}:
            missing.append(f"{path}::{name}")
    assert missing == []


def exists(dotted: str) -> bool:
    """Whether ``dpshm.a.b.C.d`` names a module, or what one defines; found by reading, since some need extras."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:end])
        file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if file.is_file():
            return defines(ast.parse(file.read_text(encoding="utf-8")).body, parts[end:])
    return False


def defines(body: list[ast.stmt], parts: list[str]) -> bool:
    """Whether some statements define a name, or import it from where it is defined; and it the next, if any."""
    if not parts:
        return True
    name, *rest = parts
    for node in body:
        match node:
            case ast.ClassDef() | ast.FunctionDef() if node.name == name:
                return defines(node.body, rest)
            case ast.Assign(targets=targets) if name in [t.id for t in targets if isinstance(t, ast.Name)]:
                return not rest
            case ast.AnnAssign(target=ast.Name(id=found)) if found == name:
                return not rest
            case ast.ImportFrom() if name in [alias.asname or alias.name for alias in node.names]:
                return exists(".".join([str(node.module), name, *rest]))
    return False


DOTTED = re.compile(r"`~?(dpshm(?:\.\w+)+)(?:\([^`]*)?`")


@every_page
def test_every_named_module_exists(page: Path) -> None:
    """Guards against a page that names a module or a class that was moved."""
    assert sorted(name for name in set(DOTTED.findall(text_of(page))) if not exists(name)) == []


def test_every_module_that_the_code_names_exists() -> None:
    """Guards against a docstring or a comment that names a module or a class that was moved."""
    files = [path for folder in ("dpshm", "tests", "bench") for path in sorted((ROOT / folder).rglob("*.py"))]
    missing = {
        f"{name_of(path)}: {name}"
        for path in files
        for name in DOTTED.findall(path.read_text(encoding="utf-8"))
        if path != Path(__file__) and not exists(name)
    }
    assert missing == set()


@every_page
def test_every_variable_is_read_somewhere(page: Path) -> None:
    """Guards against a page that names an environment variable which nothing reads."""
    sources = "\n".join(
        path.read_text(encoding="utf-8") for folder in ("dpshm", "tests") for path in (ROOT / folder).rglob("*.py")
    )
    named = set(re.findall(r"\bDPSHM(?:_[A-Z]+)+\b", text_of(page)))
    assert sorted(name for name in named if f'"{name}"' not in sources) == []


# Commands.


@cache
def commands() -> dict[str, set[str]]:
    """The subcommands of ``dpshm`` with their options; those of ``dpshm`` itself are under ""."""
    typer = pytest.importorskip("typer", reason="the command line is an extra")
    app = typer.Typer()
    for name in COMMANDS:
        app.command(name)(load_command(name))

    def options(command: Any) -> set[str]:
        return {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}

    group = typer.main.get_command(app)
    return {"": options(group) | {"--version"}} | {name: options(group.commands[name]) for name in COMMANDS}


def test_the_commands_are_the_real_ones() -> None:
    """Guards against a test of commands that knows none."""
    assert "--json" in commands()["stat"]
    assert "--install-completion" in commands()[""]


@every_page
def test_every_command_exists(page: Path) -> None:
    """Guards against a page that tells its reader to run a command, or to give an option, that is not there."""
    text = text_of(page).replace("\\\n", " ")
    code = re.findall(r"`(dpshm [^`\n]+)`", text)
    for fence in re.findall(r"^```(?:sh|ini)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        code += re.findall(r"(?:^|[/= ])(dpshm [a-z-][^\n]*)", fence)
    wrong = []
    for line in code:
        parts = line.partition("#")[0].split()[1:]
        name = parts[0] if re.fullmatch(r"[a-z]+", parts[0]) else ""
        if re.fullmatch(r"[\d.]+", parts[0]):
            continue  # a version
        known = commands().get(name)
        given = {part.partition("=")[0] for part in parts if re.match(r"--?[a-z]", part)}
        if known is None or not given <= known:
            wrong.append(line)
    assert wrong == []


def test_every_command_is_in_the_operators_table() -> None:
    """Guards against a command that an operator never learns of."""
    table = section(ROOT / "dpshm/ops/README.md", "Commands")
    assert {name for name in commands() if name} == set(re.findall(r"`dpshm ([a-z]+)", table))


# Examples.


def test_the_library_example_runs_as_printed() -> None:
    """Guards against a README whose example no longer fits the code."""
    printed = run(block(README, "example"))
    assert re.match(r"send it to rank [01] with the stamp \(0, 512, 0\)\n", printed)
    # The other rank may still be going from paused to running.
    assert len(re.findall(r"^[01] (?:idle|waking|running) 0 requests$", printed, re.MULTILINE)) == 2


@pytest.mark.parametrize("marker", ["demo", "test"])
def test_each_command_makes_its_own_environment(marker: str) -> None:
    """Guards against a README command that needs something set up before it."""
    command = block(README, marker)
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install")
    assert command.count("\n") == 1


def test_the_board_is_read_without_this_library() -> None:
    """Guards against a page for readers in other languages that no longer fits the board."""
    code = block(ROOT / "dpshm/board/README.md", "example")
    assert not re.search(r"^(?:import|from) (?:dpshm|numpy)", code, re.MULTILINE)
    group = f"page-{os.getpid()}"
    with (
        Coordinator(group=group, dp_size=2, waves=False),
        Engine.attach(group, dp_rank=0),
        Engine.attach(group, dp_rank=1) as engine,
    ):
        engine.receive(None)
        engine.publish(waiting=3, running=7, kv_cache_usage=0.25)
        printed = run(code, group, strict=False).splitlines()
    assert printed == [
        f"group {group} wave 0 paused",
        "rank 0 alive waiting 0 running 0 kv 0.0 outstanding 0",
        "rank 1 alive waiting 3 running 7 kv 0.25 outstanding 10",
    ]


def test_a_policy_of_ones_own_runs_as_printed() -> None:
    """Guards against a page for writers of policies whose example no longer fits the code."""
    assert run(block(ROOT / "dpshm/policies/README.md", "example")) == "rank 0\n"


def test_the_table_of_a_view_is_complete() -> None:
    """Guards against a field that a policy's writer never learns of, and one that is gone."""
    table = rows(section(ROOT / "dpshm/policies/README.md", "Write one"))
    named = {name for row in table for name in re.findall(r"`(\w+)", row[0])}
    public = {name for name in vars(View) if not name.startswith("_")}
    assert named == public - {"of", "columns"}


def test_the_service_settings_are_accepted(tmp_path: Path) -> None:
    """Guards against a page whose configuration file is refused."""
    config = tmp_path / "dpshm.toml"
    config.write_text(block(ROOT / "dpshm/ops/README.md", "settings"))
    assert make_settings(**read_config(config)).file_mode == 0o640


# Tables that equal the code.


def test_every_promise_names_a_test() -> None:
    """Guards against a promise that nothing keeps."""
    promised = rows(section(ROOT / "tests/README.md", "Promises"))
    assert len(promised) > 20
    assert [row for row in promised if not NAMED_TEST.search(row[2])] == []


def test_the_table_of_policies_is_complete() -> None:
    """Guards against a policy that users never learn of, and one that is gone."""
    table = rows(section(ROOT / "dpshm/policies/README.md", "Which one"))
    assert sorted(re.sub(r"[` ]|\(default\)", "", row[0]) for row in table) == list(NAMES)


def test_the_table_of_settings_is_complete() -> None:
    """Guards against a setting that users never learn of, one that is gone, and a default that changed."""
    table = rows(section(ROOT / "dpshm/coordinator/README.md", "Settings"))
    assert [row[0].strip("`") for row in table] == list(Settings.__struct_fields__)
    defaults = msgspec.to_builtins(Settings(group="g", dp_size=1))
    for name, default, _ in table:
        value = defaults[name.strip("`")]
        if re.fullmatch(r"`[^`]+`", default):
            assert default.strip("`") == (f"0o{value:o}" if "mode" in name else str(value))
        elif re.fullmatch(r"\d+", default):
            assert int(default) == value


def test_the_table_of_folders_is_that_of_the_imports() -> None:
    """Guards against a design that names a direction of imports which no test enforces."""
    table = rows(section(ROOT / "dpshm/README.md", "Folders"))
    drawn = {int(floor): set(re.findall(r"(\w+)(?:/|\.py)`", folders)) for floor, folders, _ in table}
    assert drawn == {number: set(rooms) for number, rooms in enumerate(FLOORS, 1)}


@pytest.mark.parametrize("folder", sorted({page.parent for page in PAGES}), ids=name_of)
def test_a_table_of_files_is_complete(folder: Path) -> None:
    """Guards against a file that a reader of its folder's page never hears of."""
    table = re.search(r"^\| file \| .*?\n\n", text_of(folder / "README.md"), re.DOTALL | re.MULTILINE)
    if table is None:
        return  # the folder's page is about something else
    named = {name for row in rows(table.group()) for name in re.findall(r"`([\w/]+\.py)`", row[0])}
    assert named == {path.name for path in folder.glob("*.py")} - {"__init__.py"}


BOARD = ROOT / "dpshm/board/README.md"
ROW_SECTIONS = {
    "coordinator row": "Coordinator row",
    "engine rows": "Engine row",
    "step rows": "Step row",
    "front-end rows": "Front-end row",
}


def test_the_size_of_the_board():
    """Guards against a container whose /dev/shm has the size that a page tells, and no room for the board."""
    size = make_layout(DEFAULT_ENGINES, DEFAULT_FRONTENDS).size
    (told,) = re.findall(
        r"board needs (\d+) KiB for (\d+) engines and (\d+) front-ends", text_of(ROOT / "dpshm/ops/README.md")
    )
    assert tuple(map(int, told)) == (size >> 10, DEFAULT_ENGINES, DEFAULT_FRONTENDS)


def test_the_memory_map_is_the_real_one() -> None:
    """Guards against a drawn offset that a reader uses and that is wrong, and a column that is not drawn."""
    layout = make_layout(DEFAULT_ENGINES, DEFAULT_FRONTENDS)
    drawn: dict[str, int] = {}
    end = 0
    for offset, size, content in re.findall(
        r"^ (0x[0-9a-f]{5}) +(\d+)  (\S.*?)(?:  |$)", section(BOARD, "Memory map"), re.MULTILINE
    ):
        assert int(offset, 16) == end, f"{content} does not begin where the line above ends"
        end += int(size)
        what = content.partition("[")[0]
        if what in ROW_SECTIONS:
            for inner, word, *_ in rows(section(BOARD, ROW_SECTIONS[what])):
                drawn[word.strip("`")] = int(offset, 16) + int(inner, 16)
        else:
            drawn[what] = int(offset, 16)
    assert drawn.pop("header") == 0
    assert drawn.pop("unused, to the end of the page") > PAGE_BYTES
    assert drawn == {name: column.offset for name, column in layout.columns.items()}
    assert end == layout.size


def test_the_step_models_words_are_the_real_ones() -> None:
    """Guards against a drawn order of the ten words that a reader uses and that is wrong."""
    found = re.search(r"`step_model` has ten words.*?\(what", text_of(BOARD), re.DOTALL)
    assert found
    assert tuple(re.findall(r"`(\w+)`", found.group())[1:]) == STEP_MODEL_WORDS


def test_the_packed_words_are_the_real_ones() -> None:
    """Guards against a drawn bit that a reader uses and that is wrong."""
    unpack: dict[str, Any] = {
        "load": lambda word: dict(
            zip(("waiting", "running", "kv_cache_usage"), words.unpack_load(word), strict=True)
        ),
        "control": lambda word: dict(zip(("wave", "phase"), words.unpack_control(word), strict=True)),
        "engine_state": lambda word: dict(
            zip(("wave", "running", "paused"), words.unpack_state(word), strict=True)
        ),
        "progress": lambda word: dict(zip(("wave", "step"), words.unpack_progress(word), strict=True)),
        "change": lambda word: words.unpack_change(word)._asdict(),
        "mark": lambda word: {
            "verdict": Verdict(word & words.VERDICT_MASK),
            "stuck": word & words.STUCK,
            "unknown": word & words.UNKNOWN,
            "remote": word & words.REMOTE,
            "relayed": word & words.RELAYED,
            "drained": word & words.DRAINED,
            "on_behalf": word & words.ON_BEHALF,
        },
    }
    seen: dict[str, set[str]] = {}
    for name, field, bits, _ in rows(section(BOARD, "Packed words")):
        word, (low, high) = name.strip("`"), map(int, bits.split("-"))
        seen.setdefault(word, set()).add(field)
        for bit in range(low, high + 1):
            found = unpack[word](1 << bit)
            if (word, field, bit) == ("control", "phase", 0):
                assert found["phase"] is waves.Phase.WAKING
            assert [key for key, value in found.items() if value] == [field], f"bit {bit} of {word}"
        outside = unpack[word](1 << high + 1 | (1 << low >> 1))
        assert not outside.get(field), f"{field} of {word} has more bits than drawn"
    assert seen == {word: set(of(0)) for word, of in unpack.items()}


def test_every_cited_rule_is_one_of_the_six() -> None:
    """Guards against a comment that cites a rule which the design does not have."""
    rules = re.findall(r"^### Rule (\d):", text_of(ROOT / "dpshm/README.md"), re.MULTILINE)
    assert rules == ["1", "2", "3", "4", "5", "6"]
    cited = {
        (name_of(path), number)
        for path in sorted((ROOT / "dpshm").rglob("*.py"))
        for number in re.findall(r"\b[Rr]ule (\d+)\b", path.read_text(encoding="utf-8"))
    }
    assert cited
    assert {where for where in cited if where[1] not in rules} == set()
