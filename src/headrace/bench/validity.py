"""Checks that keep a benchmark from lying quietly. A wrong output fails it; what may have slowed it down warns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from headrace.bench.samples import median, spread
from headrace.bench.workloads import Batch
from headrace.plan.calibrate import FAST_PACE, SLOW_PACE, Calibration
from headrace.plan.load import Disturbance

MAX_SPREAD = 0.10
"""IQR / median of a figure's repeats beyond which it is called noisy."""
MAX_WARM_UP = 1.25
"""How much slower than the median of the others the first repeat may be before the warm-up is called too short."""
MAX_CLIENT_SHARE = 0.10
"""Share of the time that may pass outside the executor: beyond it, engine and client are what is measured."""

Verdict = Literal["ok", "warning", "failed"]
Outputs = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Check:
    """What was checked, what came of it, and the figures behind it."""

    name: str
    verdict: Verdict
    detail: str

    def as_dict(self) -> dict[str, str]:
        return {"name": self.name, "verdict": self.verdict, "detail": self.detail}

    def line(self) -> str:
        return f"{self.verdict:<8} {self.name}: {self.detail}"


def worst(checks: Sequence[Check]) -> Check:
    """The gravest of some checks of one kind: the first that failed, else the first that warns, else all is well."""
    for verdict in ("failed", "warning"):
        for check in checks:
            if check.verdict == verdict:
                return check
    return Check(checks[0].name, "ok", "; ".join(check.detail for check in checks))


def check_outputs(batch: Batch, repeats: Sequence[Outputs]) -> Check:
    """Every request gave as many tokens as were asked for, and every repeat gave the same ones.

    Args:
        repeats: token ids of each request, of each repeat of the batch or of one with shorter lengths, which must have
            produced the beginnings of the same outputs. The first is compared with `batch`.
    """
    name = "outputs"
    lengths = tuple(map(len, repeats[0]))
    if lengths != batch.lengths:
        wrong = sum(a != b for a, b in zip(lengths, batch.lengths, strict=False))
        return Check(name, "failed", f"{wrong} of {len(batch.lengths)} outputs have not the length that was asked for")
    for i, outputs in enumerate(repeats[1:], start=2):
        for request, (first, other) in enumerate(zip(repeats[0], outputs, strict=True)):
            if list(first[: len(other)]) != list(other):
                place = _first_difference(first, other)
                return Check(name, "failed", f"run {i} of request {request} differs from run 1 at token {place}")
    return Check(name, "ok", f"{len(repeats)} runs of {len(batch.prompts)} requests gave the same tokens")


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def check_spread(figures: Sequence[tuple[str, Sequence[float]]], bound: float = MAX_SPREAD) -> Check:
    """Repeats agree. `figures` are names and samples."""
    repeated = {name: spread(samples) for name, samples in figures if len(samples) > 1}
    if not repeated:
        return Check("spread", "warning", "nothing was repeated: one sample says nothing about noise")
    noisy = {name: value for name, value in repeated.items() if value > bound}
    if noisy:
        shown = ", ".join(f"{name} {value:.0%}" for name, value in noisy.items())
        return Check("spread", "warning", f"IQR / median above {bound:.0%}: {shown}")
    return Check("spread", "ok", f"IQR / median at most {max(repeated.values()):.0%}")


def check_warm_up(seconds: Sequence[float]) -> Check:
    """The first kept repeat is not slower than the rest: what happens once had happened before it."""
    if len(seconds) < 2:
        return Check("warm-up", "ok", "one discarded run")
    ratio = seconds[0] / median(seconds[1:])
    if ratio > MAX_WARM_UP:
        return Check("warm-up", "warning", f"the first kept run took {ratio:.2f} × the others: it was still warming up")
    return Check("warm-up", "ok", f"one discarded run; the first kept one took {ratio:.2f} × the others")


def check_client(seconds: float, execute_seconds: float, bound: float = MAX_CLIENT_SHARE) -> Check:
    """Most time passes in the executor, not in the engine or in whoever asks."""
    share = 1 - execute_seconds / seconds
    shown = f"{share:.1%} of the time outside the executor"
    return Check("client", "warning" if share > bound else "ok", shown + (": client-bound" if share > bound else ""))


def check_disturbance(seen: Disturbance) -> list[Check]:
    """Throttling, steal and other load while something was measured."""
    others = f"other processes took {seen.others:.2f} cores' worth of CPU time"
    stolen = f"the hypervisor gave {seen.steal:.1%} of the CPU time to other machines"
    stopped = f"the control group's quota stopped this process in {seen.throttled} periods"
    return [
        Check("throttling", "warning" if seen.throttled else "ok", stopped if seen.throttled else "none"),
        Check("steal", "warning" if seen.steal_matters else "ok", stolen),
        Check("other load", "warning" if seen.others_matter else "ok", others),
    ]


def check_limits(calibration: Calibration) -> Check:
    """What is possible was measured while nothing else ran."""
    when = f"measured {calibration.machine.measured_at}"
    if calibration.disturbance.spoils_rates:
        return Check("limits", "warning", f"{when}, while others used the machine: more may be possible")
    return Check("limits", "ok", f"{when}, undisturbed")


def check_pace(before: float, after: float) -> Check:
    """The machine is as fast as when its limits were measured: `headrace.plan.calibrate.pace` around the benchmark."""
    shown = f"products at {before:.0%} of the measured rate before, {after:.0%} after"
    if min(before, after) < SLOW_PACE:
        return Check("pace", "warning", f"{shown}: neighbours on its cores, or heat; shares of the limits are too low")
    if max(before, after) > FAST_PACE:
        return Check(
            "pace", "warning", f"{shown}: the limits were measured at a slow hour (headrace doctor --remeasure)"
        )
    return Check("pace", "ok", shown)
