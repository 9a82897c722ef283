"""What this machine has, how fast its memory is read, and the speed limit that follows for a model."""

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.base.system import available_memory

if TYPE_CHECKING:
    from headrace.llm.llm import LLM

MIN_WORKING_SET = 64 << 20


@dataclass(frozen=True, slots=True)
class DecodeLimit:
    """The fastest that one sequence can decode, when reading memory is all that takes time.

    Attributes:
        tokens_per_second: bandwidth / bytes per token.
        bytes_per_token: weights read once, and the keys and values of the context.
        bandwidth: bytes per second, measured over a working set of that size.
    """

    tokens_per_second: float
    bytes_per_token: int
    bandwidth: float


def decode_limit(llm: "LLM", context: int) -> DecodeLimit:
    """The limit for one sequence at `context` cached tokens, with the bandwidth measured now, by the same threads."""
    from headrace import _native

    bytes_per_token = llm.bytes_per_decode_step(context)
    bandwidth = _native.read_bandwidth(max(bytes_per_token, MIN_WORKING_SET), llm.num_threads)
    return DecodeLimit(bandwidth / bytes_per_token, bytes_per_token, bandwidth)


@dataclass(frozen=True, slots=True)
class MachineReport:
    """What `headrace doctor` shows. Bandwidths in bytes per second, keyed by working-set size in MiB."""

    cpu: str
    cores: int
    cpu_quota: float | None
    isas: tuple[str, ...]
    chosen_isa: str
    memory_available: int
    huge_pages: str
    bandwidth: dict[int, float]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """Rows of (name, value) for people."""
        speeds = ", ".join(f"{size} MiB: {speed / 1e9:.1f} GB/s" for size, speed in self.bandwidth.items())
        quota = "none" if self.cpu_quota is None else f"{self.cpu_quota:g} cores"
        return [
            ("CPU", self.cpu),
            ("cores usable", f"{self.cores} (quota: {quota})"),
            ("instruction sets", f"{', '.join(self.isas)} (chosen: {self.chosen_isa})"),
            ("memory available", f"{self.memory_available / 2**30:.1f} GiB"),
            ("huge pages", self.huge_pages),
            ("read bandwidth", speeds),
        ]


def examine() -> MachineReport:
    """Measure this machine: about a second."""
    from headrace import _native
    from headrace.base.settings import from_environment

    settings = from_environment()
    cores, quota = len(os.sched_getaffinity(0)), cpu_quota()
    threads = settings.num_threads or _native.available_cores()
    isas = tuple(_native.available_isas())
    huge_pages = _selected(Path("/sys/kernel/mm/transparent_hugepage/enabled"))
    warnings = []
    if threads > cores:
        warnings.append(
            f"HEADRACE_THREADS={threads} exceeds the {cores} usable cores: threads will wait for each other."
        )
    if quota is not None and quota < cores:
        warnings.append(f"The control group allows {quota:g} of {cores} cores: expect throttling beyond that.")
    if huge_pages == "never":
        warnings.append("Transparent huge pages are off; 'madvise' helps large models.")
    if platform.machine() in ("x86_64", "AMD64") and isas[-1] in ("portable", "avx2"):
        warnings.append("No AVX-512 here: the kernels for this machine are correct, not yet fast.")
    return MachineReport(
        cpu=_cpu_name(),
        cores=cores,
        cpu_quota=quota,
        isas=isas,
        chosen_isa=settings.isa or isas[-1],
        memory_available=available_memory(),
        huge_pages=huge_pages,
        bandwidth={size: _native.read_bandwidth(size << 20, threads) for size in (1, 16, 128, 512)},
        warnings=tuple(warnings),
    )


def cpu_quota() -> float | None:
    """Cores' worth of CPU time that the control group allows; None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _selected(path: Path) -> str:
    """The bracketed word of a kernel setting such as ``always [madvise] never``."""
    try:
        text = path.read_text(encoding="ascii")
    except OSError:
        return "unknown"
    return text[text.find("[") + 1 : text.find("]")]
