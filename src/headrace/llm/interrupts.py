"""Ctrl-C between two steps of the engine, never in the middle of one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Let a SIGINT that comes inside wait for the end.

    A KeyboardInterrupt can be raised between any two lines, so inside a step it would leave blocks and sequences
    half accounted for. Python delivers it to the main thread alone: elsewhere, and where SIGINT is not handled in
    Python, there is nothing to do.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: waiting.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting:
            handler(*waiting[0])
