"""Entry point: picks the subcommand, and turns mistakes of the user into one line and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import nosa_jax
from nosa_jax._extras import import_extra
from nosa_jax.cli.demo import Demo
from nosa_jax.cli.doctor import Doctor
from nosa_jax.cli.generate import Generate
from nosa_jax.cli.locality import Locality
from nosa_jax.cli.plan import Plan
from nosa_jax.cli.train import Train

# Subcommands: dataclasses whose fields are the flags and whose `run` does the work and returns the exit code.
Command = Demo | Train | Generate | Locality | Plan | Doctor

TRACEBACK_VARIABLE = "NOSA_TRACEBACK"
_DESCRIPTION = (
    "Native and offloadable sparse attention in JAX. `nosa demo` shows all of it in a few minutes. "
    f"Set {TRACEBACK_VARIABLE}=1 to see where an error comes from."
)
# What bad input raises: values and files of the user, missing extras, a loss that is no longer finite.
_MISTAKES = (ValueError, OSError, ImportError, FloatingPointError, nosa_jax.KernelUnsupportedError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `nosa` with `argv` (None: the process's own arguments) and returns the exit code.

    0: done, 1: the demo's check failed, 2: a mistake in the arguments or files, 130: interrupted.
    Raises SystemExit for --help and for arguments that do not parse.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"nosa-jax {nosa_jax.__version__}")
        return 0
    try:
        return _parse(arguments or ["--help"]).run()
    except KeyboardInterrupt:
        print("\nnosa: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, `head` say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _MISTAKES as error:
        if os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
            raise
        print(f"nosa: error: {_describe(error)}", file=sys.stderr)
        return 2


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _parse(arguments: list[str]) -> Command:
    tyro = import_extra("tyro")
    return tyro.cli(
        Command,
        prog="nosa",
        description=_DESCRIPTION,
        args=arguments,
        config=(tyro.conf.PositionalRequiredArgs,),
    )
