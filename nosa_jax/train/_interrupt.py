"""Signals to end as a request to stop, not as an exception in the middle of a step whose buffers are donated."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

# Ctrl-C; `kill`, schedulers and shutdown; a terminal that is closed.
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def interrupt_flag() -> Iterator[threading.Event]:
    """An event that the first SIGINT (Ctrl-C), SIGTERM or SIGHUP sets.

    A second Ctrl-C raises KeyboardInterrupt as usual; the other two may come twice, and wait. What is ignored stays
    ignored, as SIGHUP under nohup and SIGINT in what a script starts with `&`; so does what a handler in C takes, which
    could not be put back.
    """
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield flag
        return
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

    def handle(number: int, _: object) -> None:
        flag.set()
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    for number in before:
        signal.signal(number, handle)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
