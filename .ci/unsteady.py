"""Run the tests that failed, each twenty times by itself: do they fail again?

    python .ci/unsteady.py CACHE_DIR

`CACHE_DIR` is that of the pytest run in which they failed. Exit status 1: one failed again, or more failed than
luck explains. Otherwise it prints the name of each, a line each, and exits with 0.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TIMES = 20
MOST = 2
"""More tests that fail in one run are no matter of luck."""
LONGEST_S = 1200


def fails_again(test: str) -> bool:
    """Whether a test fails in one of `TIMES` runs."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", test]
    return any(subprocess.call(command, stdout=sys.stderr, timeout=LONGEST_S) for _ in range(TIMES))


def main() -> int:
    """Runs them. Returns the exit status."""
    failed = Path(sys.argv[1]) / "v" / "cache" / "lastfailed"
    tests = sorted(json.loads(failed.read_text())) if failed.exists() else []
    if not 1 <= len(tests) <= MOST or any(map(fails_again, tests)):
        return 1
    print("\n".join(tests))
    return 0


if __name__ == "__main__":
    sys.exit(main())
