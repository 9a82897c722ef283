"""Machines as trees of files: what /proc and /sys of another machine would hold."""

from collections.abc import Mapping
from pathlib import Path

GIB = 1 << 30
MEMINFO = f"MemTotal: {8 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {4 * GIB // 1024} kB\n"
STAT = "cpu  0 0 0 0\n" + "".join(f"cpu{i} 0 0 0 0 0 0 0 0 0 0\n" for i in range(4))


def write_root(folder: Path, files: Mapping[str, str]) -> str:
    """Write the files, named from /, under the folder; returns the root to read them with."""
    for name, text in files.items():
        path = folder / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(folder)


V2_HALF_A_CORE = {
    "/proc/self/cgroup": "0::/\n",
    "/sys/fs/cgroup/cpu.max": "50000 100000\n",
    "/sys/fs/cgroup/cpu.stat": "usage_usec 1\nnr_periods 10\nnr_throttled 3\n",
    "/sys/fs/cgroup/memory.max": f"{2 * GIB}\n",
    "/sys/fs/cgroup/memory.current": f"{GIB}\n",
    "/sys/fs/cgroup/memory.stat": f"anon {GIB // 2}\ninactive_file {GIB // 2}\n",
    "/proc/meminfo": MEMINFO,
}
V1_HALF_A_CORE = {
    "/proc/self/cgroup": "5:memory:/\n4:cpuacct,cpu:/\n0::/\n",
    "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
    "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    "/sys/fs/cgroup/cpu/cpu.stat": "nr_periods 10\nnr_throttled 3\n",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
    "/sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
    "/sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GIB // 2}\n",
    "/proc/meminfo": MEMINFO,
}
UNLIMITED = {
    "/proc/self/cgroup": "0::/user.slice/app.scope\n",
    "/sys/fs/cgroup/user.slice/cpu.max": "max 100000\n",
    "/sys/fs/cgroup/user.slice/memory.max": "max\n",
    "/sys/fs/cgroup/user.slice/memory.current": f"{GIB}\n",
    "/proc/meminfo": MEMINFO,
}
NESTED = UNLIMITED | {
    "/sys/fs/cgroup/user.slice/app.scope/cpu.max": "300000 100000\n",
    "/sys/fs/cgroup/user.slice/cpu.max": "150000 100000\n",
    "/sys/fs/cgroup/user.slice/memory.max": f"{3 * GIB}\n",
}
V1_UNLIMITED = V1_HALF_A_CORE | {
    "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
}
HOST_PATH_IN_CONTAINER = V1_HALF_A_CORE | {
    "/proc/self/cgroup": "5:memory:/docker/0123abcd\n4:cpu,cpuacct:/docker/0123abcd\n",
}
