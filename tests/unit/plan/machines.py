"""A machine and a model at round numbers, for tests of what is computed from them."""

from typing import Any

from headrace.graph.builder import GraphBuilder
from headrace.graph.cost import Formats
from headrace.graph.ir import Graph
from headrace.plan.machine import Machine

MIB = 1 << 20


def machine(**changes: Any) -> Machine:
    """Two cores at round numbers: 100 GB/s from 1 MiB, 10 GB/s from 256 MiB; 1 TFLOP/s f32, 8 bf16, 16 int8."""
    values: dict[str, Any] = {
        "cpu": "Test CPU",
        "isas": ("portable", "avx2", "avx512", "avx512_vnni", "amx"),
        "isa": "amx",
        "cores": 2,
        "num_threads": 2,
        "cpu_quota": None,
        "memory_total": 8 << 30,
        "memory_available": 4 << 30,
        "memory_limit": None,
        "huge_pages": "madvise",
        "caches": {"L1d": 48 << 10, "L2": 2 * MIB, "L3": 32 * MIB},
        "read_bandwidth": {MIB: 100e9, 256 * MIB: 10e9},
        "matrix_rate": {"f32": 1e12, "bf16": 8e12, "int8": 16e12},
        "measured_at": "2026-11-25",
    }
    return Machine(**(values | changes))


HIDDEN, VOCAB = 1024, 4096


def small() -> Graph:
    """Embed, norm, one matrix of 1024 x 1024, logits over the embedding's table: 2 and 8 MiB at two bytes."""
    g = GraphBuilder()
    x = g.embed("embed", VOCAB, HIDDEN)
    x = g.linear("up", g.rms_norm("norm", x, eps=1e-5), HIDDEN)
    return g.build(g.linear("logits", g.select_rows("last", x), VOCAB, weight="embed.weight"))


FORMATS = Formats(param_bytes={"embed.weight": 8 * MIB, "norm.weight": 4096, "up.weight": 2 * MIB})
