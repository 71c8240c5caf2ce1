"""What tests of the command `nosa` share."""

from __future__ import annotations

from nosa_jax.cli import main


def fails(arguments: list[str], capsys) -> str:
    """Runs `nosa`, expects exit code 2 and one line on stderr, and returns what it says."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if not line.endswith(" ...")]
    assert line.startswith("nosa: error: ") and "Traceback" not in captured.err
    return line.removeprefix("nosa: error: ")
