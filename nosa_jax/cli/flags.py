"""Messages of the library in the words of the command line: flags where Python says arguments."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

# Arguments of the library that no flag has the name of, by subcommand.
_OTHER_NAMES = {
    "Train": {
        "patterns": "--files",
        "tokens": "--files",
        "corpus.train": "--files",
        "corpus.heldout": "--files, held out",
        "corpus": "--files",
        "source": "--files",
        "directory": "--out",
        "path": "--out",
        "dtype": "--token-dtype",
        "coordinator_address": "--coordinator",
        "model": "--init",
        "TrainConfig.model": "--preset and --variant",
    },
    "Export": {"directory": "run-folder", "path": "out"},
    "Demo": {"path": "--out"},
    "Generate": {"tokens": "--prompt", "max_length": "--prompt with --max-new-tokens"},
    "Eval": {"task": "--tasks", "length": "--lengths", "prefill_chunk": "--chunk"},
    "Locality": {"max_length": "--prompt-length with --new-tokens"},
}


@contextlib.contextmanager
def called(flag: str, *arguments: str) -> Iterator[None]:
    """What the library says inside of any of `arguments`, first in a message, it says of `flag`."""
    try:
        yield
    except (TypeError, ValueError, FileNotFoundError, FileExistsError) as error:
        name, colon, rest = str(error).partition(":")
        if not colon or name not in arguments or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise type(error)(f"{flag}:{rest}") from error


def as_typed(message: str, command: Any) -> str:
    """`message` with the flags of `command` (None: of none) in place of the arguments that they set.

    `Sampling.top_k` and `max_new_tokens` become `--top-k` and `--max-new-tokens`, `resume=True` and `field=` become
    `--resume` and `--field`, and who is to pass None leaves the flag out. A name that is an English word too is
    replaced only where it is surely an argument: first in the message, or with its class or its value.
    """
    if command is None:
        return message
    required = dataclasses.MISSING
    names = {
        field.name: "--" + field.name.replace("_", "-")
        for field in dataclasses.fields(command)
        if field.default is not required
    }
    others = _OTHER_NAMES.get(type(command).__name__, {})
    if getattr(command, "data", ()):  # what is trained on is not --files then
        others = {name: flag.replace("--files", "--data") for name, flag in others.items()}
    names |= others

    def flag(match: re.Match[str]) -> str:
        owner, name, value = match["owner"] or "", match["name"], match["value"]
        if name == "data" and value is not None:  # an axis of a mesh
            return match[0]
        if not (match.start() == 0 or owner or value is not None or "_" in name):
            return match[0]
        text = names.get(owner + name, names[name])
        if value == "None":
            return f"no {text}"
        if value == "False":
            return text.replace("--", "--no-", 1)
        return text if value in (None, "", "True") else f"{text} {value}"

    known = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    own = r"(?P<owner>(?:Sampling|CacheConfig|TrainConfig|OptimizerConfig)\.)?"
    value = r"(?:=(?P<value>\d+(?:\.\d+)?|\w+|(?=[.,;) ])))?"
    pattern = rf"(?<![\w./'-]){own}(?P<name>{known}){value}(?![\w/'-]|\.\w)"
    return re.sub(pattern, flag, message).replace("pass None", "leave it out")
