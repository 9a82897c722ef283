"""One line of progress on a terminal, replaced by the next; nothing where standard error is not one."""

import sys


def status(text: str = "") -> None:
    """Show a text in place of the last one; empty: clear it."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
