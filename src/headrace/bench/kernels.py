"""``bench kernels``: each matrix shape and number format of a model by itself, per number of rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from headrace import _native
from headrace.base.errors import ExecutorError
from headrace.bench.limits import Limits
from headrace.bench.report import Findings, Measurement
from headrace.bench.validity import Check, check_spread
from headrace.graph.ir import Graph
from headrace.numerics.tensor import RawTensor

BEYOND_L2 = 8 << 20
"""Bytes of packed copies that each round goes through, so that every run finds its weight beyond L2, as in a model."""
SECONDS_PER_SAMPLE = 0.05
MAX_COPIES = 256
"""So that a matrix too small for any of this does not take minutes to pack."""
TOLERANCE = 1e-3
COARSE_TOLERANCE = {"bf16": 2e-2, "int8": 5e-2}
"""Of the largest output, by activation: a kernel further from numpy's f32 product than that computes something else."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A matrix that a model multiplies by: one of `count` alike."""

    name: str
    tensor: RawTensor
    count: int

    @property
    def label(self) -> str:
        out, features = self.tensor.shape
        return f"{self.tensor.format.name} {features}→{out}"


def shapes(graph: Graph, weights: Mapping[str, RawTensor]) -> list[Shape]:
    """The different shapes and formats of a graph's linears, in the graph's order."""
    found: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for node in graph.nodes:
        if node.op == "linear":
            for name in node.params[: node.integer("parts")]:
                key = (weights[name].format.name, weights[name].shape)
                found.setdefault(key, []).append(name)
    return [Shape(names[0], weights[names[0]], len(names)) for names in found.values()]


def kernels(
    matrices: Sequence[Shape],
    limits: Limits,
    *,
    rows: Sequence[int],
    isa: str,
    activation: str,
    num_threads: int,
    repeats: int,
) -> Findings:
    """Time every matrix with every number of rows. Each sample is the least of many runs: what the kernel can do, not
    what a busy machine gives it."""
    measurements: list[Measurement] = []
    for shape in matrices:
        for count in rows:
            timings = [_time(shape, count, isa, activation, num_threads) for _ in range(1 + repeats)][1:]
            measurements.append(_measurement(shape, count, timings, limits))
    checks = [
        _check_products(matrices, isa, activation),
        Check("warm-up", "ok", "one discarded sample of each"),
        check_spread([(each.name, each.samples) for each in measurements]),
    ]
    return Findings(measurements=measurements, checks=checks)


def _time(shape: Shape, rows: int, isa: str, activation: str, num_threads: int) -> dict[str, float]:
    out, features = shape.tensor.shape
    x = np.random.default_rng(1).standard_normal((rows, features), dtype=np.float32)
    copies = min(MAX_COPIES, max(1, BEYOND_L2 // shape.tensor.num_bytes))
    # About 100 GFLOP/s, 20 GB/s, 20 us to wake threads: only the number of rounds hangs on it, and three are the least.
    round_seconds = copies * (2 * rows * out * features / 1e11 + shape.tensor.num_bytes / 2e10 + 2e-5)
    rounds = max(3, min(100, int(SECONDS_PER_SAMPLE / round_seconds)))
    data = np.ascontiguousarray(shape.tensor.data)
    return _native.linear_benchmark(shape.tensor.format.name, data, x, isa, activation, num_threads, copies, rounds)


def _measurement(shape: Shape, rows: int, timings: Sequence[dict[str, float]], limits: Limits) -> Measurement:
    out, features = shape.tensor.shape
    samples = tuple(1e6 * timing["run_seconds"] for timing in timings)
    seconds = sorted(timing["run_seconds"] for timing in timings)[len(timings) // 2]
    flops, stored = 2 * rows * out * features, shape.tensor.num_bytes
    return Measurement(
        name=f"{shape.label}, {rows} row{'s' if rows > 1 else ''}",
        unit="us",
        samples=samples,
        limit=1e6 * limits.matrix_seconds(shape.tensor.format.name, features, flops, stored, max(BEYOND_L2, stored)),
        lower_is_better=True,
        details={
            "kernel": timings[0]["kernel"],
            "GB/s": stored / seconds / 1e9,
            "TFLOP/s": flops / seconds / 1e12,
            "prepare us": 1e6 * min(timing["prepare_seconds"] for timing in timings),
            "in model": shape.count,
        },
    )


def _check_products(matrices: Sequence[Shape], isa: str, activation: str) -> Check:
    """Each kernel's product is that of the same numbers in numpy."""
    for shape in matrices:
        # Some rows of the matrix say as much as all; a language-model head has very many.
        tensor = RawTensor(
            shape.tensor.format, (min(256, shape.tensor.shape[0]), shape.tensor.shape[1]), shape.tensor.data[:256]
        )
        x = np.random.default_rng(2).standard_normal((4, tensor.shape[1]), dtype=np.float32)
        try:
            y = _native.linear_test(tensor.format.name, np.ascontiguousarray(tensor.data), x, isa, activation)
        except ValueError as error:
            raise ExecutorError(f"No native kernel takes {shape.name}: {error}.") from error
        truth = x @ tensor.to_f32().T
        distance = float(np.abs(y - truth).max() / np.abs(truth).max())
        if not distance <= COARSE_TOLERANCE.get(activation, TOLERANCE):
            return Check("outputs", "failed", f"{shape.label}: a product is off by {distance:.1g} of the largest")
    return Check("outputs", "ok", f"the products of {len(matrices)} matrices are numpy's")
