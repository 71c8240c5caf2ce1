"""What every subcommand prints with: headings, aligned facts, and a clock while something takes its time."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path


@contextlib.contextmanager
def usable_streams() -> Iterator[None]:
    """Streams that are there, even if the process began without them, and an output that takes any character."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # becomes `number`, which no file of ours may be
    before = {name: getattr(sys, name) for name in ("stdin", "stdout", "stderr")}
    for name, stream in before.items():
        if stream is None or getattr(stream, "closed", False):
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 -- closed below
    errors = getattr(sys.stdout, "errors", None)
    set_errors = getattr(sys.stdout, "reconfigure", lambda errors: None)
    set_errors(errors="replace")
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):  # gone by now
            set_errors(errors=errors)
        for name, stream in before.items():
            if getattr(sys, name) is not stream:
                getattr(sys, name).close()
                setattr(sys, name, stream)


def show(text: str = "", *, stderr: bool = False, end: str = "\n") -> None:
    """Prints to stdout or stderr. A terminal that is gone is no error, nor is stderr without a reader."""
    try:
        print(text, end=end, file=sys.stderr if stderr else sys.stdout, flush=True)
    except OSError as error:
        if not stderr and error.errno != errno.EIO:
            raise


def _styled() -> bool:
    """Whether stdout is a terminal that shows bold text, and the user has nothing against it (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def heading(text: str) -> None:
    """A line that starts a part of the output; bold on a terminal."""
    show(f"\n\033[1m{text}\033[0m" if _styled() else f"\n{text}")


def note(text: str) -> None:
    """A line on stderr that the user should see."""
    show(f"nosa: note: {text}", stderr=True)


def note_replaced(path: Path) -> None:
    """Says so where a file of an earlier run is about to be replaced."""
    if path.exists():
        note(f"{path} is of an earlier run and is replaced; what this run does not write stays")


def facts(rows: Iterable[tuple[str, object]], *, stderr: bool = False) -> None:
    """Prints names and values in two columns, to stdout or stderr."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        show(f"  {name:<{width}}  {value}", stderr=stderr)


def indented(text: str) -> None:
    """Prints `text`, every line of it moved to the right."""
    show("\n".join(line.rstrip() for line in textwrap.indent(text, "  ").split("\n")))


@contextlib.contextmanager
def working(text: str) -> Iterator[None]:
    """Says on stderr what is going on until the block ends; on a terminal with a clock, and erased afterwards."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        show(f"  {text} ...", stderr=True)
        yield
        return
    done = threading.Event()

    def tick() -> None:
        begin = time.monotonic()
        while True:
            show(f"\r  {text} ... {time.monotonic() - begin:.0f} s", stderr=True, end="")
            if done.wait(0.5):
                return

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        show("\r\033[K", stderr=True, end="")


@dataclasses.dataclass
class Timer:
    """Wall and processor seconds of named parts of a run."""

    parts: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measures the block as `name`."""
        wall, processor = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.parts[name] = {
                "seconds": round(time.perf_counter() - wall, 2),
                "cpu_seconds": round(time.process_time() - processor, 2),
            }

    @property
    def seconds(self) -> float:
        return sum(part["seconds"] for part in self.parts.values())


def duration(seconds: float | int) -> str:
    """`75.2` as `1 min 15 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def size(count: float | int) -> str:
    """Bytes with a unit, `2560` as `2.50 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
