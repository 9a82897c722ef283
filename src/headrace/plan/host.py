"""What the operating system says about the machine: nothing here is measured, nothing raises where it says nothing."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass

from headrace import _native
from headrace.base.errors import CapacityError
from headrace.base.system import Read, available_memory, memory_limit, memory_total, read_file


@dataclass(frozen=True, kw_only=True)
class Host:
    """The machine from the outside. Sizes in bytes; 0, empty or "unknown" where the system does not tell.

    Attributes:
        cpu: the processor's name.
        flags: names of the processor's features, as /proc/cpuinfo lists them.
        cpus: numbers of the processors that this process may run on.
        physical_cores: cores that these are hardware threads of.
        cpu_quota: cores' worth of CPU time that the control groups grant; None without a limit.
        memory_total, memory_available, memory_limit: as in `Machine`.
        huge_pages: "always", "madvise", "never" or "unknown".
        caches: size of one cache of each kind, by "L1d", "L2", "L3".
        read: reads the machine's files.
    """

    cpu: str
    flags: frozenset[str]
    cpus: tuple[int, ...]
    physical_cores: int
    cpu_quota: float | None
    memory_total: int
    memory_available: int
    memory_limit: int | None
    huge_pages: str
    caches: Mapping[str, int]
    read: Read

    @classmethod
    def here(cls, root: str = "", cpus: tuple[int, ...] | None = None) -> "Host":
        """This machine; or, for tests, one whose /proc and /sys lie under `root`, with those processors."""

        def read(path: str) -> str | None:
            return read_file(root + path)

        if cpus is None:
            cpus = tuple(sorted(os.sched_getaffinity(0)))
        cpuinfo = _cpuinfo(read)
        try:
            available = available_memory(read)
        except CapacityError:
            available = 0
        return cls(
            cpu=cpuinfo.get("model name") or cpuinfo.get("Processor") or platform.machine() or "unknown",
            flags=frozenset((cpuinfo.get("flags") or cpuinfo.get("Features") or "").split()),
            cpus=cpus,
            physical_cores=_physical_cores(read, cpus),
            cpu_quota=_native.cpu_quota(root) or None,
            memory_total=memory_total(read),
            memory_available=available,
            memory_limit=memory_limit(read),
            huge_pages=_selected(read("/sys/kernel/mm/transparent_hugepage/enabled")),
            caches=_caches(read, cpus[0]),
            read=read,
        )


def _cpuinfo(read: Read) -> dict[str, str]:
    """The first processor's lines, by name."""
    lines = (read("/proc/cpuinfo") or "").split("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _physical_cores(read: Read, cpus: tuple[int, ...]) -> int:
    """Processors that are hardware threads of one core list the same siblings."""
    siblings = {read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    return len(siblings)


def _caches(read: Read, cpu: int) -> dict[str, int]:
    found = {}
    for index in range(10):
        folder = f"/sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
        level, kind, size = ((read(f"{folder}/{name}") or "").strip() for name in ("level", "type", "size"))
        digits = size.rstrip("KM")
        if kind in ("Data", "Unified") and level.isdecimal() and digits.isdecimal():
            unit = {"K": 1 << 10, "M": 1 << 20}.get(size[len(digits) :], 1)
            found[f"L{level}" + ("d" if kind == "Data" else "")] = int(digits) * unit
    return found


def _selected(text: str | None) -> str:
    """The bracketed word of a kernel setting such as ``always [madvise] never``."""
    _, _, rest = (text or "").partition("[")
    return rest.partition("]")[0] or "unknown"
