"""The command line, called as a user does, within the test's process."""

from __future__ import annotations

import pytest

from rankscope.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[object, str, str]:
    """Exit code, stdout and stderr of ``rankscope`` with these arguments."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return exit_info.value.code, output.out, output.err
