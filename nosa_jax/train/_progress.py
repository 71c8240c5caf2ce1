"""What a run shows: a bar on a terminal, elsewhere a line now and then, so that log files stay short."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from typing import Any

from nosa_jax._extras import import_extra

# Where there is no terminal: a line after so many seconds, or after this share of the run, whatever comes first. So a
# short run shows more than its beginning and its end, and a long one is not silent for hours.
_SECONDS = 10.0
_SHARE = 0.1


class Progress:
    """Shows steps on stderr and says a few things on stdout. A stream that is gone ends the showing, not the run."""

    def __init__(self, steps: int, done: int, *, shown: bool) -> None:
        tqdm = import_extra("tqdm").tqdm
        terminal = shown and _is_terminal(sys.stderr)
        self.shown, self._steps, self._step = shown, steps, done
        self._bar: Any = tqdm(total=steps, initial=done, unit="step", disable=not terminal, dynamic_ncols=True)
        self._lines = shown and not terminal
        self._due_time, self._due_step = 0.0, 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self) -> None:
        """One step more."""
        self._step += 1
        self._bar.update()

    def note(self, text: str) -> None:
        """How the last step went, see `describe`: beside the bar, or on a line of its own, not for every step."""
        self._bar.set_postfix_str(text, refresh=False)
        due = time.monotonic() >= self._due_time or self._step >= min(self._due_step, self._steps)
        if self._lines and due:
            self._due_time = time.monotonic() + _SECONDS
            self._due_step = self._step + math.ceil(self._steps * _SHARE)
            _write(f"step {self._step}/{self._steps}: {text}", sys.stderr)

    def say(self, text: str) -> None:
        """A line on stdout, where anything is shown at all."""
        if not self.shown:
            return
        with self._bar.external_write_mode() if not self._bar.disable else contextlib.nullcontext():
            _write(text, sys.stdout)


def describe(record: dict[str, Any]) -> str:
    """How a step went, from its record of kind `train`: loss, tokens per second, the share of the devices' peak where
    that is known, and how many steps were skipped so far, if any."""
    parts = [f"loss {record['loss']:.3f}", f"{record['tokens_per_second']:,.0f} tokens/s"]
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:.0%}")
    if skipped := record.get("skipped"):
        parts.append(f"{skipped:,.0f} step{'s' if skipped > 1 else ''} skipped")
    return ", ".join(parts)


def _is_terminal(stream: Any) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # it is closed
        return False


def _write(text: str, stream: Any) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal or the reader is gone; the stream is closed
        if stream is not None:  # closed when the process began
            print(text, file=stream, flush=True)
