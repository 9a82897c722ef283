"""The C library's heap: what was freed goes back to the system on demand."""

import ctypes


def give_back() -> None:
    """Return free pages of the heap to the system, those between live blocks too; nothing where the C library cannot.

    glibc keeps what was freed. Where large temporaries alternate with small results that stay, holes of the former
    remain between the latter, and memory grows with the number of results.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
