"""The few environment variables, all of them, parsed strictly."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from headrace.base.errors import InvalidRequestError

ISA_NAMES = ("portable", "avx2", "avx512", "avx512_vnni", "amx")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the environment says. Every field has one variable, named in `from_environment`."""

    isa: str | None = None
    """HEADRACE_ISA: force one instruction set; must be one that this machine and this build have."""
    num_threads: int | None = None
    """HEADRACE_THREADS: threads of the native executor; default: the cores this process may use."""


def from_environment(environ: Mapping[str, str] | None = None) -> Settings:
    """Read `Settings`; an unknown HEADRACE_ variable or an unreadable value is an error that names it."""
    env = os.environ if environ is None else environ
    known = {"HEADRACE_ISA", "HEADRACE_THREADS"}
    reserved = {"HEADRACE_PEERS"}  # read by the peers' comparison, not by headrace
    for name in env:
        if name.startswith("HEADRACE_") and name not in known | reserved:
            raise InvalidRequestError(
                f"Unknown environment variable {name}.", f"Unset it; headrace reads {', '.join(sorted(known))}."
            )
    isa = env.get("HEADRACE_ISA") or None
    if isa is not None and isa not in ISA_NAMES:
        raise InvalidRequestError(f"HEADRACE_ISA={isa!r} is not an instruction set.", f"Use {', '.join(ISA_NAMES)}.")
    threads = env.get("HEADRACE_THREADS") or None
    if threads is not None and (not threads.isdecimal() or int(threads) < 1):
        raise InvalidRequestError(f"HEADRACE_THREADS={threads!r} is not a count.", "Use a whole number of 1 or more.")
    return Settings(isa=isa, num_threads=int(threads) if threads else None)


def cache_folder() -> Path | None:
    """Where headrace keeps what it can make again: in XDG_CACHE_HOME, or else in ~/.cache. None without a home."""
    try:
        named = Path(os.environ.get("XDG_CACHE_HOME", ""))
        base = named if named.is_absolute() else Path.home() / ".cache"  # a relative one is to be ignored, says XDG
    except RuntimeError:
        return None
    return base / "headrace"
