"""A progress bar over the requests of a long batch."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHOWN_FROM = 16
"""Batches of at least this many prompts show a bar, on a terminal."""


@contextmanager
def progress(total: int, wanted: bool | None) -> Iterator[Callable[[int], None]]:
    """Yields a function to call once per finished request, with its output tokens.

    `wanted` None shows the bar for batches of `SHOWN_FROM` prompts or more, if standard error is a terminal.
    """
    show = wanted if wanted is not None else total >= SHOWN_FROM and sys.stderr.isatty()
    if not show:
        yield lambda _: None
        return
    from tqdm import tqdm

    start, done = time.perf_counter(), 0
    with tqdm(total=total, unit="req", dynamic_ncols=True) as bar:

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            bar.set_postfix_str(f"{done / (time.perf_counter() - start):.0f} tok/s", refresh=False)
            bar.update()

        yield advance
