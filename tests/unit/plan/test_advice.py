"""Each thing that costs speed is said, with a remedy, where it holds and only there."""

from dataclasses import replace

import pytest

from headrace.plan.advice import Build, advise
from headrace.plan.calibrate import Calibration
from headrace.plan.host import Host
from headrace.plan.load import Disturbance
from tests.unit.plan.machines import machine

HOST = replace(Host.here(), cpus=(0, 1), physical_cores=2)
GOOD = Build(optimized=True, x86_kernels=True, architecture="x86_64")


def codes(*, host=HOST, seen=Disturbance(), build=GOOD, problem="", pace=1.0, **changes) -> list[str]:  # noqa: B008
    calibration = Calibration(
        machine=machine(**changes), measured_now=True, disturbance=seen, cache_file=None, cache_problem=problem
    )
    found = advise(calibration, host, seen, build, pace=pace)
    for advice in found:
        assert advice.cause.endswith("."), advice
        assert advice.remedy, advice
    return [advice.code for advice in found]


def test_nothing_is_wrong_with_a_good_machine():
    assert codes() == []


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("idle_cores", {"num_threads": 1}),
        ("too_many_threads", {"num_threads": 3}),
        ("isa_forced", {"isa": "avx2"}),
        ("no_huge_pages", {"huge_pages": "never"}),
        ("not_cached", {"problem": "/cache: Read-only file system"}),
        ("hardware_threads", {"host": replace(HOST, physical_cores=1)}),
        ("busy", {"seen": Disturbance(others=0.7)}),
        ("steal", {"seen": Disturbance(steal=0.2)}),
        ("slow_now", {"pace": 0.5}),
        ("limits_slow", {"pace": 1.9}),
        ("throttled", {"seen": Disturbance(throttled=3), "cpu_quota": 2.0}),
        ("not_optimized", {"build": replace(GOOD, optimized=False)}),
        ("no_x86_kernels", {"build": replace(GOOD, x86_kernels=False), "isas": ("portable",), "isa": "portable"}),
        ("portable", {"isas": ("portable",), "isa": "portable"}),
        (
            "portable",
            {
                "build": replace(GOOD, x86_kernels=False, architecture="riscv64"),
                "isas": ("portable",),
                "isa": "portable",
            },
        ),
        ("quota", {"cpu_quota": 0.5, "num_threads": 1}),
        ("quota", {"cpu_quota": 1.5, "num_threads": 2}),
    ],
)
def test_what_costs_speed(code, changes):
    assert codes(**changes) == [code]


def test_half_a_core_makes_two_threads_too_many():
    assert codes(cpu_quota=0.5, num_threads=2) == ["quota", "too_many_threads"]


def test_threads_beyond_the_whole_cores_of_a_quota_are_named_when_it_throttles():
    calibration = Calibration(
        machine=machine(cpu_quota=1.5), measured_now=True, disturbance=Disturbance(), cache_file=None
    )
    (advice,) = [each for each in advise(calibration, HOST, Disturbance(throttled=1), GOOD) if each.code == "throttled"]
    assert "HEADRACE_THREADS=1" in advice.remedy


def test_three_cores_of_which_one_is_a_hardware_thread():
    host = replace(HOST, cpus=(0, 1, 2), physical_cores=2)
    assert codes(host=host, cores=3, num_threads=3) == ["hardware_threads"]
    assert codes(host=host, cores=3, num_threads=2) == ["idle_cores"]


@pytest.mark.parametrize("seen", [Disturbance(others=0.1), Disturbance(steal=0.03)])
def test_a_little_is_not_worth_mention(seen):
    assert codes(seen=seen) == []


def test_one_core_with_one_thread_is_fine():
    assert codes(host=replace(HOST, cpus=(0,), physical_cores=1), cores=1, num_threads=1) == []


def test_this_build():
    assert Build.here().optimized


def test_what_is_slow_for_a_known_reason_is_said_once():
    assert codes(pace=0.5, seen=Disturbance(others=0.7)) == ["busy"]
