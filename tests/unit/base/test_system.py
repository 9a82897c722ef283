import pytest

from headrace.base.errors import CapacityError
from headrace.base.system import available_memory

GIB = 1 << 30


def test_a_control_group_can_allow_less_than_the_machine_has():
    files = {
        "/proc/meminfo": "MemTotal: 100 kB\nMemAvailable:    1048576 kB\n",
        "/sys/fs/cgroup/memory.max": "900000000\n",
        "/sys/fs/cgroup/memory.current": "100000000\n",
    }
    assert available_memory(files.get) == 800_000_000
    assert available_memory((files | {"/sys/fs/cgroup/memory.max": "max\n"}).get) == GIB
    with pytest.raises(CapacityError):
        available_memory({}.get)
