"""A machine and a model's limits as lines for people."""

from collections.abc import Mapping, Sequence

from headrace.plan.host import Host
from headrace.plan.machine import Machine
from headrace.plan.roofline import WorkloadLimit

_UNITS = {"f32": "GFLOP/s", "bf16": "GFLOP/s", "int16": "GOP/s", "int8": "GOP/s"}


def machine_lines(machine: Machine, host: Host, *, forced: bool) -> list[str]:
    """What `headrace doctor` shows first. `forced`: the instruction set was asked for."""
    quota = "no quota" if machine.cpu_quota is None else f"quota {machine.cpu_quota:g} cores"
    limit = "" if machine.memory_limit is None else f"; the control group allows {size(machine.memory_limit)}"
    caches = ", ".join(f"{name} {size(num)}" for name, num in machine.caches.items())
    rows = [
        ("CPU", machine.cpu),
        ("cores", f"{machine.cores} usable, {host.physical_cores} physical, {quota}"),
        ("threads", str(machine.num_threads)),
        ("instruction sets", ", ".join(machine.isas)),
        ("chosen", f"{machine.isa} ({'HEADRACE_ISA' if forced else 'the best of them'})"),
        ("memory", f"{size(machine.memory_available)} free of {size(machine.memory_total)}{limit}"),
        ("huge pages", machine.huge_pages),
        ("caches", caches or "unknown"),
        ("measured", machine.measured_at),
        *_rates(machine),
    ]
    return [f"{name:<18}{value}" for name, value in rows]


def limit_lines(limits: Mapping[str, Sequence[WorkloadLimit]], used: str) -> list[str]:
    """Tokens per second: a row for each workload, a column for each arithmetic, `used` being the kernels' own."""
    names = [limit.name for limit in limits[used]]
    header = [f"{name} (kernels)" if name == used else name for name in limits]
    rows = [["tokens/s at best", *header]]
    for i, name in enumerate(names):
        rows.append([name, *(_cell(column[i]) for column in limits.values())])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def size(num_bytes: float) -> str:
    """Bytes in powers of 1024: ``48 KiB``, ``1.3 MiB``, ``22.6 GiB``."""
    for unit, amount in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if num_bytes >= amount:
            return f"{num_bytes / amount:.1f}".removesuffix(".0") + f" {unit}"
    return f"{num_bytes / 1024:.0f} KiB"


def _rates(machine: Machine) -> list[tuple[str, str]]:
    reads = [(f"reads of {size(num)}", f"{rate / 1e9:.1f} GB/s") for num, rate in machine.read_bandwidth.items()]
    return reads + [
        (f"{name} products", f"{rate / 1e9:,.0f} {_UNITS[name]}") for name, rate in machine.matrix_rate.items()
    ]


def _cell(limit: WorkloadLimit) -> str:
    return f"{limit.tokens_per_second:,.0f} {limit.step.bound}"
