"""What costs speed on this machine, each thing with its remedy."""

import math
import platform
from dataclasses import dataclass

from headrace import _native
from headrace.plan.calibrate import FAST_PACE, SLOW_PACE, Calibration
from headrace.plan.host import Host
from headrace.plan.load import Disturbance
from headrace.plan.machine import Machine


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing that costs speed: a stable code, the cause, the remedy."""

    code: str
    cause: str
    remedy: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """How the native extension was compiled.

    Attributes:
        optimized: with an optimizing compiler setting.
        x86_kernels: with the kernels for AVX2 and better.
        architecture: of the machine that runs it, as the system names it.
    """

    optimized: bool
    x86_kernels: bool
    architecture: str

    @classmethod
    def here(cls) -> "Build":
        build = _native.build()
        return cls(
            optimized=build["optimized"], x86_kernels=build["x86_kernels"], architecture=platform.machine() or "unknown"
        )


def advise(
    calibration: Calibration, host: Host, disturbance: Disturbance, build: Build, *, pace: float = 1.0
) -> list[Advice]:
    """Everything that costs speed here, what costs most first.

    Args:
        disturbance: what else uses the machine, seen while measuring or now.
        pace: see `headrace.plan.calibrate.pace`.
    """
    machine = calibration.machine
    return [
        *_build(machine, build),
        *_cores(machine, host),
        *_disturbance(machine, disturbance),
        *([] if disturbance.spoils_rates or disturbance.throttled else _pace(machine, pace)),
        *_memory(machine),
        *_cache(calibration),
    ]


def _build(machine: Machine, build: Build) -> list[Advice]:
    found = []
    if not build.optimized:
        found.append(
            Advice(
                "not_optimized",
                "The native extension was compiled without optimization.",
                "Build it again with CMAKE_BUILD_TYPE=Release and without -O0 in CXXFLAGS.",
            )
        )
    is_x86 = build.architecture in ("x86_64", "AMD64", "amd64")
    if is_x86 and not build.x86_kernels:
        found.append(
            Advice(
                "no_x86_kernels",
                "The native extension was compiled without its x86 kernels.",
                "Build it again without -DHEADRACE_X86=OFF.",
            )
        )
    elif machine.isas[-1] == "portable":
        what = "This processor has no AVX2" if is_x86 else f"There are no kernels for {build.architecture} yet"
        found.append(Advice("portable", f"{what}: the portable ones run.", "Use a machine with AVX2 or better."))
    if machine.isa != machine.isas[-1]:
        found.append(
            Advice(
                "isa_forced",
                f"HEADRACE_ISA={machine.isa} keeps this machine below the {machine.isas[-1]} that it has.",
                "Unset HEADRACE_ISA.",
            )
        )
    return found


def _cores(machine: Machine, host: Host) -> list[Advice]:
    found = []
    quota, usable = machine.cpu_quota, machine.cores
    if quota is not None and quota < machine.cores:
        usable = math.ceil(quota)
        found.append(
            Advice(
                "quota",
                f"The control group grants {quota:g} of {machine.cores} cores: threads stop when that is used up.",
                "Raise the container's limit (docker run --cpus, Kubernetes resources.limits.cpu, systemd CPUQuota).",
            )
        )
    threads = machine.num_threads
    if threads > usable:
        found.append(
            Advice(
                "too_many_threads",
                f"{threads} threads share {_cores_text(usable)} and wait for each other.",
                f"Unset HEADRACE_THREADS, or set it to {usable}.",
            )
        )
    elif threads < usable:
        found.append(
            Advice(
                "idle_cores",
                f"{threads} of {_cores_text(usable)} have a thread.",
                f"Unset HEADRACE_THREADS, or set it to {usable}.",
            )
        )
    if host.physical_cores < min(threads, machine.cores):
        found.append(
            Advice(
                "hardware_threads",
                f"{threads} threads run on {_cores_text(host.physical_cores)} of two or more hardware threads each,"
                " which share arithmetic units and caches.",
                f"Compare with HEADRACE_THREADS={host.physical_cores}.",
            )
        )
    return found


def _disturbance(machine: Machine, seen: Disturbance) -> list[Advice]:
    found = []
    again = "then measure again: headrace doctor --remeasure."
    if seen.throttled:
        whole = max(1, math.floor(machine.cpu_quota or machine.cores))
        fewer = f", or set HEADRACE_THREADS={whole}" if whole < machine.num_threads else ""
        found.append(
            Advice(
                "throttled",
                f"The quota stopped this process in {seen.throttled} periods while it measured.",
                f"Raise the container's limit{fewer}.",
            )
        )
    if seen.others_matter:
        found.append(
            Advice(
                "busy",
                f"Other processes use {seen.others:.1f} of {_cores_text(machine.cores)} now.",
                f"Stop them or wait for them, {again}",
            )
        )
    if seen.steal_matters:
        found.append(
            Advice(
                "steal",
                f"The hypervisor gives {seen.steal:.0%} of the processors' time to other machines.",
                f"Use dedicated cores or a quieter host, {again}",
            )
        )
    return found


def _pace(machine: Machine, pace: float) -> list[Advice]:
    if SLOW_PACE <= pace <= FAST_PACE:
        return []
    found = f"{machine.num_threads} threads multiply at {pace:.0%} of the rate measured {machine.measured_at}"
    if pace > FAST_PACE:
        return [Advice("limits_slow", f"{found}: that was a slow hour.", "Measure again: headrace doctor --remeasure.")]
    return [
        Advice(
            "slow_now",
            f"{found}: others share these cores' arithmetic units, or heat slows them.",
            "Use dedicated cores or a quieter hour.",
        )
    ]


def _memory(machine: Machine) -> list[Advice]:
    if machine.huge_pages != "never":
        return []
    return [
        Advice(
            "no_huge_pages",
            "Transparent huge pages are off: streamed weights miss the TLB every 4 KiB.",
            "As root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )
    ]


def _cache(calibration: Calibration) -> list[Advice]:
    if not calibration.cache_problem:
        return []
    return [
        Advice(
            "not_cached",
            f"The measured rates cannot be kept ({calibration.cache_problem}): each command measures them again.",
            "Set XDG_CACHE_HOME to a directory that can be written and has space.",
        )
    ]


def _cores_text(count: int) -> str:
    return f"{count} core{'s' if count > 1 else ''}"
