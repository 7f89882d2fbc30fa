"""Print pip constraints that hold each dependency at the lowest version that `pyproject.toml` allows.

Arguments: the extras whose dependencies are wanted beside those of the core.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path


def lowest(extras: list[str]) -> list[str]:
    """One line ``NAME==LOWEST`` for each dependency of the core and of ``extras``, sorted."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    lines, waiting = set(project["dependencies"]), list(extras)
    while waiting:
        for requirement in project["optional-dependencies"][waiting.pop()]:
            own = re.fullmatch(rf"{project['name']}\[(.+)\]", requirement)
            if own:
                waiting.extend(name.strip() for name in own[1].split(","))
            else:
                lines.add(requirement)
    return sorted(re.sub(r">=", "==", line) for line in lines)


if __name__ == "__main__":
    print("\n".join(lowest(sys.argv[1:])))
