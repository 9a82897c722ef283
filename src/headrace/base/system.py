"""What the operating system says about memory and control groups.

Functions take `read`, so that tests can stand in for a machine; a file that is not there reads as None.
"""

from collections.abc import Callable
from pathlib import Path

from headrace.base.errors import CapacityError

Read = Callable[[str], str | None]


def read_file(path: str) -> str | None:
    """The file's text, or None if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def group_folders(read: Read, controller: str) -> list[str]:
    """Where this process's control group and those around it keep their files, v2 and v1, innermost first.

    Inside a container the listed path may be the host's, which is not mounted there: some folders may not exist. The
    mount itself, always among them, is then the container's own.
    """
    folders = []
    for line in (read("/proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        mount = f"/sys/fs/cgroup/{controller}" if controllers else "/sys/fs/cgroup"
        path = path.rstrip("/")
        while path:
            folders.append(mount + path)
            path = path.rpartition("/")[0]
    return [*folders, "/sys/fs/cgroup", f"/sys/fs/cgroup/{controller}"]


def memory_total(read: Read = read_file) -> int:
    """Bytes of memory built in; 0 if the system does not tell."""
    return _meminfo(read, "MemTotal") or 0


def memory_limit(read: Read = read_file) -> int | None:
    """Bytes that the control groups allow this process, where that is less than there are."""
    limits = [limit for limit, _ in _group_memory(read)]
    least, total = min(limits, default=None), memory_total(read)
    return None if least is None or (total and least >= total) else least


def available_memory(read: Read = read_file) -> int:
    """Bytes this process can still take: the machine's free memory, or less if its control groups allow less.

    Raises CapacityError if the system does not tell.
    """
    free = _meminfo(read, "MemAvailable")
    amounts = [max(0, limit - used) for limit, used in _group_memory(read)] + ([] if free is None else [free])
    if not amounts:
        raise CapacityError("Cannot tell how much memory is free on this system.", "Pass kv_cache_memory.")
    return min(amounts)


def _meminfo(read: Read, name: str) -> int | None:
    for line in (read("/proc/meminfo") or "").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _group_memory(read: Read) -> list[tuple[int, int]]:
    """Limit and use of each control group that has both. Files that were read and can be dropped are not use."""
    found = []
    for folder in group_folders(read, "memory"):
        for limit_name, usage_name, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = (read(f"{folder}/{limit_name}") or "").strip()
            usage = (read(f"{folder}/{usage_name}") or "").strip()
            if limit.isdecimal() and usage.isdecimal():
                droppable = counter(read(f"{folder}/memory.stat"), cached) or 0
                found.append((int(limit), max(0, int(usage) - droppable)))
    return found


def counter(text: str | None, name: str) -> int | None:
    """The number after `name` in lines of names and numbers, such as ``cpu.stat``'s."""
    for line in (text or "").splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdecimal():
            return int(value)
    return None
