"""What every subcommand prints with: headings, aligned facts, and a clock while something takes its time."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator


def heading(text: str) -> None:
    """A line that starts a part of the output; bold on a terminal."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def facts(rows: Iterable[tuple[str, object]], *, stderr: bool = False) -> None:
    """Prints names and values in two columns, to stdout or stderr."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}", file=sys.stderr if stderr else sys.stdout, flush=True)


def indented(text: str) -> None:
    """Prints `text`, every line of it moved to the right."""
    print("\n".join(line.rstrip() for line in textwrap.indent(text, "  ").split("\n")), flush=True)


@contextlib.contextmanager
def working(text: str) -> Iterator[None]:
    """Says on stderr what is going on until the block ends; on a terminal with a clock, and erased afterwards."""
    if not sys.stderr.isatty():
        print(f"  {text} ...", file=sys.stderr, flush=True)
        yield
        return
    done = threading.Event()

    def tick() -> None:
        begin = time.monotonic()
        while True:
            print(f"\r  {text} ... {time.monotonic() - begin:.0f} s", end="", file=sys.stderr, flush=True)
            if done.wait(0.5):
                return

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        print("\r\033[K", end="", file=sys.stderr, flush=True)


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
