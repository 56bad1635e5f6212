"""docs/cli.md says what the commands say of themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRINTED = "import sys, cli_reference; sys.stdout.buffer.write(cli_reference.reference().encode())"


def test_the_page_is_current() -> None:
    """In a process of its own: click keeps a command's help option as it was where the command was first called."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")])}
    done = subprocess.run([sys.executable, "-c", PRINTED], env=environment, capture_output=True, check=True)
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == done.stdout.decode(), (
        "run python tools/cli_reference.py"
    )
