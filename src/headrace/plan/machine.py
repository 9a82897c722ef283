"""A machine as numbers: what it has, and how fast it reads and multiplies."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from headrace.base.errors import InvalidRequestError


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What limits are computed from. Sizes in bytes, rates per second.

    Attributes:
        cpu: the processor's name.
        isas: instruction sets that the build and the processor share, best last.
        isa: the one that is used.
        cores: processors that this process may run on (its affinity).
        num_threads: threads that steps run on.
        cpu_quota: cores' worth of CPU time that the control group grants; None without a limit.
        memory_total: what is built in.
        memory_available: what this process could still take when the machine was described.
        memory_limit: what the control group allows; None without a limit.
        huge_pages: the kernel's setting: "always", "madvise", "never" or "unknown".
        caches: size of one cache of each kind, "L1d", "L2", "L3"; empty where the system does not tell.
        read_bandwidth: bytes per second that all threads together read from working sets of so many bytes.
        matrix_rate: operations per second (two per multiply-add) of all threads, by arithmetic: "f32", "bf16",
            "int16", "int8".
        measured_at: the date of both, ISO 8601.
    """

    cpu: str
    isas: tuple[str, ...]
    isa: str
    cores: int
    num_threads: int
    cpu_quota: float | None
    memory_total: int
    memory_available: int
    memory_limit: int | None
    huge_pages: str
    caches: Mapping[str, int]
    read_bandwidth: Mapping[int, float]
    matrix_rate: Mapping[str, float]
    measured_at: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "isas", tuple(self.isas))
        object.__setattr__(self, "caches", MappingProxyType(dict(self.caches)))
        object.__setattr__(self, "read_bandwidth", MappingProxyType(dict(sorted(self.read_bandwidth.items()))))
        object.__setattr__(self, "matrix_rate", MappingProxyType(dict(self.matrix_rate)))
        assert self.read_bandwidth, "a machine's read bandwidth was measured for at least one working set"
        assert "f32" in self.matrix_rate, "every machine multiplies in f32"

    @property
    def cpu_share(self) -> float:
        """Part of the time that the threads may run: below 1 where the quota grants less than one core to each."""
        running = min(self.num_threads, self.cores)
        return 1.0 if self.cpu_quota is None else min(1.0, self.cpu_quota / running)

    def bandwidth(self, working_set_bytes: float) -> float:
        """Bytes per second for a working set between those measured, on a straight line through the logarithms of both;
        beyond them, that of the nearest."""
        sizes = list(self.read_bandwidth)
        if working_set_bytes <= sizes[0]:
            return self.read_bandwidth[sizes[0]]
        for low, high in itertools.pairwise(sizes):
            if working_set_bytes <= high:
                part = math.log(working_set_bytes / low) / math.log(high / low)
                slow, fast = self.read_bandwidth[high], self.read_bandwidth[low]
                return fast * math.pow(slow / fast, part)
        return self.read_bandwidth[sizes[-1]]

    def rate(self, arithmetic: str) -> float:
        """Operations per second of the model's own multiply-adds: `arithmetic` is one of `matrix_rate`, or such a name
        and "x" and a number where each multiply-add takes that many of it, as "bf16x2" does for f32 activations split
        into two bf16 halves.

        Raises InvalidRequestError, saying what there is, for an arithmetic that this machine does not have.
        """
        name, _, products = arithmetic.partition("x")
        if name not in self.matrix_rate or (products and not products.isdecimal()) or products == "0":
            raise InvalidRequestError(
                f"This machine has no arithmetic {arithmetic!r} with {self.isa}.",
                f"It has {', '.join(self.matrix_rate)}.",
            )
        return self.matrix_rate[name] / int(products or 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; keys of `read_bandwidth` become text there, as JSON wants."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        values["isas"] = list(self.isas)
        values["caches"], values["matrix_rate"] = dict(self.caches), dict(self.matrix_rate)
        values["read_bandwidth"] = {str(size): rate for size, rate in self.read_bandwidth.items()}
        return values

    @classmethod
    def from_dict(cls, values: Any) -> "Machine":
        """The inverse of `as_dict`. Raises InvalidRequestError, naming the key, for what is missing, unknown or of the
        wrong kind."""
        if not isinstance(values, Mapping):
            raise _wrong("a machine", values)
        names = [field.name for field in fields(cls)]
        for name in [*names, *values]:
            if name not in values or name not in names:
                raise InvalidRequestError(
                    f"A machine's description has {'no' if name in names else 'an unknown'} key {name!r}.",
                    "Measure again: headrace doctor --remeasure.",
                )
        checked: dict[str, Any] = {name: _checked(name, values[name]) for name in names}
        checked["read_bandwidth"] = bandwidths(values["read_bandwidth"])
        checked["matrix_rate"] = matrix_rates(values["matrix_rate"])
        return cls(**checked)


def bandwidths(values: Any) -> dict[int, float]:
    """Text sizes to rates, as JSON has them, checked. Raises InvalidRequestError."""
    found = {int(size): rate for size, rate in rates(values).items() if size.isdecimal() and int(size) > 0}
    if not found or len(found) != len(values):
        raise _wrong("read_bandwidth", values)
    return found


def matrix_rates(values: Any) -> dict[str, float]:
    """`rates` with one for "f32", which every machine has. Raises InvalidRequestError."""
    found = rates(values)
    if "f32" not in found:
        raise _wrong("the f32 rate", values)
    return found


def rates(values: Any) -> dict[str, float]:
    """Names to positive, finite numbers, checked. Raises InvalidRequestError."""
    if not isinstance(values, Mapping) or not values:
        raise _wrong("rates", values)
    for name, rate in values.items():
        if not isinstance(name, str) or isinstance(rate, bool) or not isinstance(rate, int | float):
            raise _wrong(f"rate {name!r}", rate)
        if not (math.isfinite(rate) and rate > 0):
            raise _wrong(f"rate {name!r}", rate)
    return {name: float(rate) for name, rate in values.items()}


_TEXTS = ("cpu", "isa", "huge_pages", "measured_at")
_COUNTS = ("cores", "num_threads", "memory_total", "memory_available")


def _checked(name: str, value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    whole = number and isinstance(value, int) and value >= 0
    match name:
        case "isas":
            good = isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
        case "caches":
            good = isinstance(value, Mapping) and all(isinstance(size, int) for size in value.values())
        case "cpu_quota":
            good = value is None or (number and value > 0)
        case "memory_limit":
            good = value is None or whole
        case _:
            good = isinstance(value, str) if name in _TEXTS else whole if name in _COUNTS else True
    if not good:
        raise _wrong(name, value)
    return value


def _wrong(what: str, value: Any) -> InvalidRequestError:
    return InvalidRequestError(
        f"{value!r} does not describe {what} of a machine.", "Measure again: headrace doctor --remeasure."
    )
