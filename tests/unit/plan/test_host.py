"""Machines that are not this one, as trees of files."""

import pytest

from headrace import _native
from headrace.plan.host import Host
from tests.unit.plan.hosts import (
    GIB,
    HOST_PATH_IN_CONTAINER,
    MEMINFO,
    NESTED,
    UNLIMITED,
    V1_HALF_A_CORE,
    V1_UNLIMITED,
    V2_HALF_A_CORE,
    write_root,
)


@pytest.mark.parametrize(
    ("files", "quota", "cores"),
    [
        (V2_HALF_A_CORE, 0.5, 1),
        (V1_HALF_A_CORE, 0.5, 1),
        (HOST_PATH_IN_CONTAINER, 0.5, 1),
        (V2_HALF_A_CORE | {"/sys/fs/cgroup/cpu.max": "1000 100000\n"}, 0.01, 1),
        (NESTED, 1.5, 2),
        (UNLIMITED, None, None),
        (V1_UNLIMITED, None, None),
        ({"/sys/fs/cgroup/cpu.max": "garbage\n"}, None, None),
        ({"/sys/fs/cgroup/cpu.max": "50000 0\n"}, None, None),
        ({}, None, None),
    ],
)
def test_a_quota_caps_the_cores(tmp_path, files, quota, cores):
    root = write_root(tmp_path, files)
    assert Host.here(root).cpu_quota == quota
    everything = _native.available_cores(str(tmp_path / "nothing"))
    assert _native.available_cores(root) == (everything if cores is None else min(cores, everything))


@pytest.mark.parametrize(
    ("files", "limit", "available"),
    [
        (V2_HALF_A_CORE, 2 * GIB, 3 * GIB // 2),
        (V1_HALF_A_CORE, 2 * GIB, 3 * GIB // 2),
        (HOST_PATH_IN_CONTAINER, 2 * GIB, 3 * GIB // 2),
        (NESTED, 3 * GIB, 2 * GIB),
        (UNLIMITED, None, 4 * GIB),
        (V1_UNLIMITED, None, 4 * GIB),
        ({"/proc/meminfo": MEMINFO}, None, 4 * GIB),
        ({}, None, 0),
    ],
)
def test_a_memory_limit_caps_what_is_free(tmp_path, files, limit, available):
    host = Host.here(write_root(tmp_path, files))
    assert (host.memory_limit, host.memory_available) == (limit, available)
    assert host.memory_total == (8 * GIB if "/proc/meminfo" in files else 0)


def test_a_machine_that_tells_nothing(tmp_path):
    host = Host.here(str(tmp_path), cpus=(0,))
    assert host.cpu
    assert (host.huge_pages, host.caches, host.flags, host.physical_cores) == ("unknown", {}, frozenset(), 1)


def test_three_processors_on_two_cores(tmp_path):
    siblings = {0: "0,2\n", 1: "1\n", 2: "0,2\n"}
    cache = "/sys/devices/system/cpu/cpu0/cache/index"
    files = {
        f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": text for cpu, text in siblings.items()
    } | {
        "/proc/cpuinfo": "processor : 0\nmodel name : Fast CPU @ 9 GHz\nflags : fpu avx2\n\nprocessor : 1\n",
        f"{cache}0/level": "1",
        f"{cache}0/type": "Data",
        f"{cache}0/size": "48K",
        f"{cache}1/level": "1",
        f"{cache}1/type": "Instruction",
        f"{cache}1/size": "32K",
        f"{cache}2/level": "3",
        f"{cache}2/type": "Unified",
        f"{cache}2/size": "36M",
        "/sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n",
    }
    host = Host.here(write_root(tmp_path, files), cpus=(0, 1, 2))
    assert host.cpu == "Fast CPU @ 9 GHz"
    assert host.flags == {"fpu", "avx2"}
    assert host.physical_cores == 2
    assert host.caches == {"L1d": 48 << 10, "L3": 36 << 20}
    assert host.huge_pages == "never"


def test_this_machine():
    host = Host.here()
    assert host.cpus
    assert 1 <= host.physical_cores <= len(host.cpus)
    assert host.memory_total >= host.memory_available > 0
