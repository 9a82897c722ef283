"""Measuring a machine once, and keeping what was measured in the user's cache directory."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from headrace import _native
from headrace.base.errors import InvalidRequestError
from headrace.base.settings import cache_folder, from_environment
from headrace.executors.native_isa import available_isa
from headrace.plan.host import Host
from headrace.plan.load import Disturbance, watch
from headrace.plan.machine import Machine, bandwidths, matrix_rates

MIB = 1 << 20
SMALLEST, LARGEST = MIB // 8, 512 * MIB
UNKNOWN_MEMORY = 512 * MIB  # what is taken to be free where the system does not tell

SLOW_PACE, FAST_PACE = 0.8, 1.25
"""Paces beyond which limits do not describe the machine: it is slower than it was, or it was slow when measured."""

_SECONDS_PER_SIZE, _SECONDS_PER_RATE, _SECONDS_PER_PACE = 0.08, 0.2, 0.05
_VERSION = 1  # of what the file holds and how it was measured


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A machine, and how its rates came about.

    Attributes:
        machine: with rates measured now or before.
        measured_now: whether it was now.
        disturbance: what else happened on the machine while measuring; nothing if measured before. Rates that others
            spoiled are not kept.
        cache_file: where the rates are kept; None where there is no cache directory.
        cache_problem: why they could not be kept; empty if they could.
    """

    machine: Machine
    measured_now: bool
    disturbance: Disturbance
    cache_file: Path | None
    cache_problem: str = ""


def calibrate(host: Host, *, num_threads: int, isa: str, remeasure: bool = False) -> Calibration:
    """This machine as `host` describes it, with its rates: those kept for it, or measured now in about two seconds.

    Args:
        num_threads: threads that steps run on.
        isa: instruction set that they use, one of those available.
        remeasure: measure even if there are kept rates.
    """
    key = _key(host, num_threads, isa)
    file = _cache_file(key)
    kept = None if remeasure or file is None else _read(file, key)
    disturbance, problem = Disturbance(), ""
    if kept is None:
        with watch(host) as seen:
            kept = _measure(host, num_threads, isa)
        disturbance = seen.disturbance()
        if file is None:
            problem = "there is no home directory"
        elif not disturbance.spoils_rates:
            problem = _write(file, {"key": key, **kept})
        measured_now = True
    else:
        measured_now = False
    machine = Machine(
        cpu=host.cpu,
        isas=tuple(_native.available_isas()),
        isa=isa,
        cores=len(host.cpus),
        num_threads=num_threads,
        cpu_quota=host.cpu_quota,
        memory_total=host.memory_total,
        memory_available=host.memory_available,
        memory_limit=host.memory_limit,
        huge_pages=host.huge_pages,
        caches=host.caches,
        read_bandwidth=bandwidths(kept["read_bandwidth"]),
        matrix_rate=matrix_rates(kept["matrix_rate"]),
        measured_at=kept["measured_at"],
    )
    return Calibration(
        machine=machine,
        measured_now=measured_now,
        disturbance=disturbance,
        cache_file=file,
        cache_problem=problem,
    )


def calibrate_here(
    *, num_threads: int | None = None, isa: str | None = None, remeasure: bool = False
) -> tuple[Calibration, Host]:
    """This machine with the threads and the instruction set that the executor would use; None: as the environment says,
    or all cores and the best. Raises InvalidRequestError for an instruction set that is not there."""
    settings, host = from_environment(), Host.here()
    return (
        calibrate(
            host,
            num_threads=num_threads or settings.num_threads or _native.available_cores(),
            isa=available_isa(isa or settings.isa),
            remeasure=remeasure,
        ),
        host,
    )


def working_sets(host: Host) -> list[int]:
    """Bytes to measure reads of: from what fits L1 or L2, each twice the one before, to what fits no cache, which is
    four times the one before; within an eighth of the free memory."""
    most = min(max(LARGEST, 4 * host.caches.get("L3", 0)), (host.memory_available or UNKNOWN_MEMORY) // 8)
    sizes = [SMALLEST]
    while sizes[-1] * 8 <= most:
        sizes.append(sizes[-1] * 2)
    return [*sizes, max(most, 2 * sizes[-1])]


def pace(machine: Machine) -> float:
    """How fast all threads multiply now, as a share of the rate kept for the fastest arithmetic.

    Neighbours on other hardware threads of the same cores, and heat, slow a machine down and leave no trace in its
    counters.
    """
    fastest = max(machine.matrix_rate, key=lambda name: machine.matrix_rate[name])
    threads = _measured_threads(machine.num_threads)
    return _native.matrix_rate(fastest, machine.isa, threads, _SECONDS_PER_PACE) / machine.matrix_rate[fastest]


def _measured_threads(num_threads: int) -> int:
    """More than there are cores would measure their switching."""
    return min(num_threads, _native.available_cores())


def _measure(host: Host, num_threads: int, isa: str) -> dict[str, Any]:
    threads = _measured_threads(num_threads)
    return {
        "read_bandwidth": {
            str(size): _native.read_bandwidth(size, threads, _SECONDS_PER_SIZE) for size in working_sets(host)
        },
        "matrix_rate": {
            name: _native.matrix_rate(name, isa, threads, _SECONDS_PER_RATE) for name in _native.arithmetics(isa)
        },
        "measured_at": date.today().isoformat(),
    }


def _key(host: Host, num_threads: int, isa: str) -> dict[str, Any]:
    """What must be equal for rates to hold: the machine as far as it can be told, and the code that measures."""
    build = os.stat(_native.__file__)
    return {
        "version": _VERSION,
        "cpu": host.cpu,
        "caches": dict(host.caches),
        "memory_total": host.memory_total,
        "cores": len(host.cpus),
        "num_threads": num_threads,
        "isa": isa,
        "build": [build.st_size, build.st_mtime_ns],
    }


def _cache_file(key: Mapping[str, Any]) -> Path | None:
    if (folder := cache_folder()) is None:
        return None
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"machine-{digest}.json"


def _read(file: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """The kept rates; None if there are none for this machine, or none that can be read: they are measured again."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["key"] != key:
            return None
        bandwidths(kept["read_bandwidth"])
        matrix_rates(kept["matrix_rate"])
        date.fromisoformat(kept["measured_at"])
    except (OSError, ValueError, KeyError, TypeError, InvalidRequestError):
        return None
    assert isinstance(kept, dict)
    return kept


def _write(file: Path, values: Mapping[str, Any]) -> str:
    """Replace the file in one step, so that readers see all of it or none; why not, if it cannot be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=file.parent, prefix=file.name, suffix=".tmp", delete=False
        ) as new:
            try:
                json.dump(values, new, indent=1)
                new.flush()
                os.replace(new.name, file)
            except BaseException:
                os.unlink(new.name)
                raise
    except OSError as error:
        return f"{file.parent}: {error.strerror}"
    return ""
