"""Everything that must hold before a change lands: layout, lint, types, tests.

    python tools/check.py            all of it, some minutes
    python tools/check.py lint types only these

The README's commands are among the tests (tests/test_readme.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = {
    "lint": [sys.executable, "-m", "ruff", "check", "."],
    "format": [sys.executable, "-m", "ruff", "format", "--check", "."],
    "types": [sys.executable, "-m", "mypy"],
    # A file of tests is one process's: what its fixtures train, they train once.
    "tests": [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile"],
}


def main() -> int:
    chosen = sys.argv[1:] or list(STEPS)
    unknown = [name for name in chosen if name not in STEPS]
    if unknown:
        print(f"no step {unknown[0]!r}; there are {', '.join(STEPS)}")
        return 2
    # Test problems are small: a second thread makes them slower, and a second process does not.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    for name in chosen:
        began = time.monotonic()
        print(f"== {name}", flush=True)
        code = subprocess.run(STEPS[name], cwd=ROOT, env=environment, check=False).returncode
        print(f"== {name}: {'ok' if code == 0 else 'failed'} in {time.monotonic() - began:.0f} s", flush=True)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
