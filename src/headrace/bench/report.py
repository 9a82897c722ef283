"""The outcome of a benchmark: measurements beside their limits, checks, and all that it takes to judge or repeat it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.base.errors import InvalidRequestError
from headrace.bench.samples import median, spread
from headrace.bench.validity import Check

SCHEMA = 1
"""Version of the JSON: raised when a field changes its meaning or goes."""

Detail = str | int | float


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One figure, repeated.

    Attributes:
        name: what was measured, unique in its report.
        unit: of the samples and the limit.
        samples: one per repeat, in order.
        limit: what this machine could do at best; None where that is not known.
        lower_is_better: whether the limit is a least value (a time) or a greatest one (a rate).
        details: further columns.
    """

    name: str
    unit: str
    samples: tuple[float, ...]
    limit: float | None = None
    lower_is_better: bool = False
    details: Mapping[str, Detail] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def spread(self) -> float:
        return spread(self.samples)

    @property
    def share(self) -> float | None:
        """Achieved / possible, 0 to 1 and beyond if the limit is not one."""
        if self.limit is None or not self.median:
            return None
        return self.limit / self.median if self.lower_is_better else self.median / self.limit

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "spread": self.spread,
            "limit": self.limit,
            "share": self.share,
            "lower_is_better": self.lower_is_better,
            "samples": list(self.samples),
            "details": dict(self.details),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What one benchmark found.

    Attributes:
        measurements: the figures.
        checks: whether they can be believed.
        notes: what a reader of the table must know.
    """

    measurements: Sequence[Measurement]
    checks: Sequence[Check]
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Findings, and what it takes to judge or repeat them.

    Attributes:
        benchmark: which one.
        environment: machine, date, versions; see `headrace.bench.environment`.
        model: name, file name and bytes.
        settings: the arguments that it ran with.
        findings: what came of it.
    """

    benchmark: str
    environment: Mapping[str, Any]
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    findings: Findings

    @property
    def is_valid(self) -> bool:
        """Whether no check failed. Warnings let the figures stand, with doubt."""
        return not any(check.verdict == "failed" for check in self.findings.checks)

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "benchmark": self.benchmark,
            "valid": self.is_valid,
            "environment": dict(self.environment),
            "model": dict(self.model),
            "settings": dict(self.settings),
            "measurements": [measurement.as_dict() for measurement in self.findings.measurements],
            "checks": [check.as_dict() for check in self.findings.checks],
            "notes": list(self.findings.notes),
        }

    def write_json(self, path: Path) -> None:
        """Raises InvalidRequestError if the file cannot be written."""
        text = json.dumps(self.as_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        try:
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise InvalidRequestError(f"Cannot write {path}: {error.strerror}.", "Name a writable file.") from None

    def text(self) -> str:
        """The table with its notes and verdicts, for people."""
        found = self.findings
        notes = [*found.notes, ""] if found.notes else []
        verdicts = [check.line() for check in found.checks]
        return "\n".join([self._title(), "", *table(found.measurements), "", *notes, *verdicts])

    def _title(self) -> str:
        machine, model = self.environment["machine"], self.model
        return (
            f"{self.benchmark} of {model['name']} ({model['bytes'] / 1e6:.0f} MB) on {machine['cpu']},"
            f" {machine['cores']} cores, {self.environment['date']}"
        )


def table(measurements: Sequence[Measurement]) -> list[str]:
    """Lines of aligned columns; columns that no measurement fills are left out."""
    details = list(dict.fromkeys(key for measurement in measurements for key in measurement.details))
    rows = [
        ["", "median", "unit", "±", "possible", "achieved", *details],
        *(_row(each, details) for each in measurements),
    ]
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for cells in zip(*columns, strict=True):
        padded = [
            cell.ljust(width) if i == 0 or not _is_numeric(columns[i]) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def _row(each: Measurement, details: Sequence[str]) -> list[str]:
    return [
        each.name,
        number(each.median),
        each.unit,
        f"{each.spread:.0%}" if len(each.samples) > 1 else "",
        "" if each.limit is None else number(each.limit),
        "" if each.share is None else f"{each.share:.0%}",
        *(_cell(each.details.get(key, "")) for key in details),
    ]


def number(value: float) -> str:
    """Three to four significant figures, without exponents: 0.0123, 1.23, 123, 12,345."""
    magnitude = abs(value)
    if magnitude >= 1000:
        return f"{value:,.0f}"
    decimals = 0 if magnitude >= 100 else 1 if magnitude >= 10 else 2 if magnitude >= 1 else 4
    return f"{value:.{decimals}f}"


def _cell(value: Detail) -> str:
    return number(value) if isinstance(value, float) else str(value)


def _is_numeric(column: Sequence[str]) -> bool:
    return all(not cell or cell[0].isdigit() for cell in column[1:])
