"""Entry point: picks the subcommand, and turns mistakes of the user into one line and exit code 2."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax

import nosa_jax
from nosa_jax._extras import import_extra
from nosa_jax._paths import user_path
from nosa_jax.cli.demo import Demo
from nosa_jax.cli.doctor import Doctor
from nosa_jax.cli.eval import Eval
from nosa_jax.cli.export import Export
from nosa_jax.cli.flags import as_typed
from nosa_jax.cli.generate import Generate
from nosa_jax.cli.locality import Locality
from nosa_jax.cli.plan import Plan
from nosa_jax.cli.terminal import note, show, usable_streams
from nosa_jax.cli.train import Train
from nosa_jax.parallel import OtherProcessError

# Subcommands: dataclasses whose fields are the flags and whose `run` does the work and returns the exit code.
Command = Demo | Train | Export | Generate | Eval | Locality | Plan | Doctor

TRACEBACK_VARIABLE = "NOSA_TRACEBACK"
_DESCRIPTION = (
    "Native and offloadable sparse attention in JAX. `nosa demo` shows all of it in a few minutes, `nosa --version` "
    f"the version. Set {TRACEBACK_VARIABLE}=1 to see where an error comes from."
)
# What bad input raises: values and files of the user, missing extras, a loss that is no longer finite, and any of these
# in another process.
_MISTAKES = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    FloatingPointError,
    nosa_jax.KernelUnsupportedError,
    OtherProcessError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `nosa` with `argv` (None: the process's own arguments) and returns the exit code.

    0: done, 1: the demo's check failed or the reader of the output has gone, 2: any error, 130: interrupted.
    Raises SystemExit for --help and for arguments that do not parse.
    """
    if argv is None:
        _keep_programs()
    arguments = list(sys.argv[1:] if argv is None else argv)
    command: Command | None = None
    with usable_streams(), warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: note(as_typed(_one_line(str(message)), command))
        try:
            if arguments == ["--version"]:
                show(f"nosa-jax {nosa_jax.__version__}")
                return 0
            command = _parse(arguments or ["--help"])
            return _at_home(command).run()
        except KeyboardInterrupt:
            show("\nnosa: interrupted", stderr=True)
            return 130
        except BrokenPipeError:  # the reader of our output, `head` say, has gone
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:
            if os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
                raise
            show(f"nosa: error: {as_typed(_describe(error), command)}", stderr=True)
            return 2


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, _MISTAKES):
        return _one_line(str(error))
    unexpected = f"unexpected {type(error).__name__}: {_one_line(str(error))}".removesuffix(": ")
    return f"{unexpected} ({TRACEBACK_VARIABLE}=1 shows where it comes from)"


def _keep_programs() -> None:
    """Lets JAX find what this command compiled before in the user's cache folder, unless the user named another.

    JAX_ENABLE_COMPILATION_CACHE=false keeps none.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    with contextlib.suppress(OSError, RuntimeError):  # no home, or one that cannot be written to
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nosa-jax" / "programs"
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _at_home(command: Command) -> Command:
    """The command with ~ in its paths replaced by the home folder."""
    values = {field.name: getattr(command, field.name) for field in dataclasses.fields(command)}
    paths = {name: user_path(name, value) for name, value in values.items() if isinstance(value, Path)}
    return dataclasses.replace(command, **paths)  # type: ignore[arg-type]


def _parse(arguments: list[str]) -> Command:
    if os.environ.get("NO_COLOR"):
        os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "0")  # read when tyro is imported
    tyro = import_extra("tyro")
    return tyro.cli(
        Command,
        prog="nosa",
        description=_DESCRIPTION,
        args=arguments,
        config=(tyro.conf.PositionalRequiredArgs,),
    )
