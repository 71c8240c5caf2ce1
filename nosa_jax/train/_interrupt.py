"""Ctrl-C as a request to stop, not as an exception in the middle of a step whose buffers are already donated."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def interrupt_flag() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; a second one raises KeyboardInterrupt as usual."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield flag
        return
    before = signal.getsignal(signal.SIGINT) or signal.default_int_handler

    def handle(*_: object) -> None:
        flag.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)
