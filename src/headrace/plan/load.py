"""Who else used the processors while something ran: other processes, other virtual machines, the group's quota."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from headrace.base.system import Read, counter, group_folders
from headrace.plan.host import Host

_OTHERS, _STEAL = 0.15, 0.05  # of a core; of the time on all cores: below, timers' grain and the kernel's own work


@dataclass(frozen=True, kw_only=True, slots=True)
class Disturbance:
    """What took time from this process.

    Attributes:
        others: cores' worth of time that other processes ran on this process's processors.
        steal: share of their time that the hypervisor gave to other machines.
        throttled: periods in which the control group's quota stopped this process.
    """

    others: float = 0.0
    steal: float = 0.0
    throttled: int = 0

    @property
    def spoils_rates(self) -> bool:
        """Whether the best of many short passes may have been missed. A quota lets some of them run in full."""
        return self.others_matter or self.steal_matters

    @property
    def others_matter(self) -> bool:
        return self.others > _OTHERS

    @property
    def steal_matters(self) -> bool:
        return self.steal > _STEAL


@dataclass(frozen=True, slots=True)
class _Reading:
    """Seconds since some past instant: of the clock, that the host's processors were busy and stolen, of our own."""

    clock: float
    busy: float
    stolen: float
    own: float
    throttled: int


class Watch:
    """Compares the machine's counters at its making with those at `stop`."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._start = _reading(host)
        self._end = self._start

    def stop(self) -> None:
        self._end = _reading(self._host)

    def disturbance(self) -> Disturbance:
        """Between making and `stop`."""
        start, end = self._start, self._end
        seconds = max(end.clock - start.clock, 1e-3)
        return Disturbance(
            others=max(0.0, (end.busy - start.busy) - (end.own - start.own)) / seconds,
            steal=max(0.0, end.stolen - start.stolen) / (seconds * len(self._host.cpus)),
            throttled=max(0, end.throttled - start.throttled),
        )


@contextmanager
def watch(host: Host) -> Iterator[Watch]:
    """Watch the machine while the body runs."""
    watched = Watch(host)
    try:
        yield watched
    finally:
        watched.stop()


def glance(host: Host, seconds: float = 0.3) -> Disturbance:
    """What happens on the machine while this process sleeps."""
    with watch(host) as seen:
        time.sleep(seconds)
    return seen.disturbance()


def _reading(host: Host) -> _Reading:
    busy, stolen = _processor_seconds(host.read, host.cpus)
    own = sum(os.times()[:4])  # of this process and of its children that have ended
    return _Reading(time.perf_counter(), busy, stolen, own, _throttled(host.read))


def _processor_seconds(read: Read, cpus: tuple[int, ...]) -> tuple[float, float]:
    """Busy and stolen seconds of those processors, from lines
    ``cpu0 user nice system idle iowait irq softirq steal``."""
    wanted = {f"cpu{cpu}" for cpu in cpus}
    ticks, stolen = 0, 0
    for line in (read("/proc/stat") or "").splitlines():
        name, *numbers = line.split()
        if name in wanted and len(numbers) >= 8 and all(number.isdecimal() for number in numbers[:8]):
            user, nice, system, _, _, irq, softirq, steal = map(int, numbers[:8])
            ticks += user + nice + system + irq + softirq
            stolen += steal
    per_second = os.sysconf("SC_CLK_TCK")
    return ticks / per_second, stolen / per_second


def _throttled(read: Read) -> int:
    counts = (counter(read(f"{folder}/cpu.stat"), "nr_throttled") for folder in group_folders(read, "cpu"))
    return max((count for count in counts if count is not None), default=0)
