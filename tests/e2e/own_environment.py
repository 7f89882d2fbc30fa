"""An environment of its own for a test file whose packages are too large for that of the other tests.

It is made once, where a variable asks for it, by default in ``~/.cache/dpshm``. The test file then runs in it.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]


class OwnEnvironment(NamedTuple):
    """One environment.

    Attributes:
        name: what is tested in it.
        wanted: the variable that is 1 where it is wanted.
        place: the variable that names its folder.
        needs: what pip installs, the large package first.
        imports: modules, comma-separated, that are all there in a finished one.
    """

    name: str
    wanted: str
    place: str
    needs: tuple[str, ...]
    imports: str

    def interpreter(self) -> Path:
        """Its Python; skips the test where none is wanted or can be made."""
        if os.environ.get(self.wanted) != "1":
            pytest.skip(f"{self.needs[0]} is too large to be installed unasked: {self.wanted}=1 runs this")
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        default = Path.home() / ".cache" / "dpshm" / f"{self.name}-{version}"
        folder = Path(os.environ.get(self.place, default))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two runs of the suite at a time make one environment
            python = folder / "bin" / "python"
            if not python.exists():
                subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            has_all = [str(python), "-c", f"import {self.imports}"]
            if subprocess.run(has_all, capture_output=True, check=False).returncode:
                install = [str(python), "-m", "pip", "install", "--quiet", "--only-binary=:all:", *self.needs]
                done = subprocess.run(install, capture_output=True, text=True, check=False)
                if done.returncode:
                    said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
                    pytest.skip(f"{self.needs[0]} for Python {version} cannot be installed here; pip said: {said}")
        return python

    def run(self, file: str) -> None:
        """Runs a test file in it; fails if a test does, or if none ran."""
        done = subprocess.run(
            [self.interpreter(), "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        summary = done.stdout.strip().splitlines()[-1]
        assert " passed" in summary, summary
        print(summary)
