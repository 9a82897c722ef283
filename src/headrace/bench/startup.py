"""``bench startup``: new processes, from nothing to their first token, and the memory that they take on the way."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from headrace.base.errors import HeadraceError
from headrace.bench.report import Findings, Measurement
from headrace.bench.validity import Check, check_spread, check_warm_up
from headrace.bench.workloads import Batch

PARTS = {"process": "interpreter", "import": "imports", "load": "load", "first_token": "first token"}
TIMEOUT = 600.0


def startup(model: str | None, options: Mapping[str, Any], batch: Batch, *, repeats: int) -> Findings:
    """Start `repeats` processes one after the other, and one before them that does not count: it fills the page cache.

    Args:
        options: of `LLM`.
        batch: one prompt; each process answers it with one token.
    """
    request = {"model": model, "options": dict(options), "prompt": list(batch.prompts[0])}
    runs = [_start(request) for _ in range(1 + repeats)]
    kept = runs[1:]
    totals = tuple(run["total"] for run in kept)
    measurements = [Measurement(name="process to first token", unit="s", samples=totals, lower_is_better=True)]
    for key, name in PARTS.items():
        samples = tuple(run[key] for run in kept)
        measurements.append(Measurement(name=f"  {name}", unit="s", samples=samples, lower_is_better=True))
    if kept[0]["peak_bytes"] is not None:
        measurements.append(
            Measurement(
                name="peak memory",
                unit="MiB",
                samples=tuple(run["peak_bytes"] / 2**20 for run in kept),
                limit=kept[0]["needed_bytes"] / 2**20,
                lower_is_better=True,
            )
        )
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in kept[-1]["parts"].items())
    checks = [
        _check_tokens(runs),
        check_warm_up(totals),
        check_spread([(measurements[0].name, totals)]),
    ]
    notes = (
        f"Parts of the last load, s: {parts}.",
        "Possible memory: packed weights, and the KV blocks that the prompt touches. Mapped pages of files count.",
    )
    return Findings(measurements=measurements, checks=checks, notes=notes)


def _start(request: Mapping[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()  # of a clock that all processes share
    command = [sys.executable, "-m", "headrace.bench.first_token", repr(started), json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise HeadraceError(f"A new process could not start the model: {last}", "Try `headrace generate` with it.")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def _check_tokens(runs: list[dict[str, Any]]) -> Check:
    tokens = {tuple(run["token_ids"]) for run in runs}
    if len(tokens) > 1 or len(runs[0]["token_ids"]) != 1:
        return Check("outputs", "failed", f"{len(runs)} processes gave different first tokens: {sorted(tokens)}")
    return Check("outputs", "ok", f"{len(runs)} processes gave the same token")
