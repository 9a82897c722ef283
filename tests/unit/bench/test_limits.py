"""Limits of the tiny llama on a made-up machine, against sums by hand."""

import pytest

from headrace.bench.limits import Limits
from headrace.bench.workloads import Batch
from headrace.graph.cost import Formats, Workload, graph_cost
from headrace.plan.machine import Machine
from tests.support.tiny_llama import tiny_llama

GRAPH = tiny_llama()
FORMATS = Formats(param_bytes=dict.fromkeys(GRAPH.params, 1000))
BATCH = Batch(((1,) * 6, (2,) * 3), (3, 5))


def limits(isa="avx512_vnni", activation="auto", main_kind="blocks", read=1e9, rate=1e15):
    machine = Machine(
        cpu="made up",
        isas=("portable", isa),
        isa=isa,
        cores=2,
        num_threads=2,
        cpu_quota=None,
        memory_total=1 << 30,
        memory_available=1 << 30,
        memory_limit=None,
        huge_pages="always",
        caches={},
        read_bandwidth={1 << 17: read, 1 << 29: read},
        matrix_rate={"f32": rate, "int8": 2 * rate},
        measured_at="2026-11-25",
    )
    return Limits(
        machine=machine,
        graph=GRAPH,
        formats=FORMATS,
        main_kind=main_kind,
        activation=activation,
        max_batched_tokens=8,
    )


def test_a_step_bound_by_memory_takes_its_bytes_over_the_bandwidth():
    work = Workload.decode(2, 10)
    assert limits().step_seconds(work) == pytest.approx(graph_cost(GRAPH, work, FORMATS).memory_bytes / 1e9)


def test_a_batch_takes_its_steps():
    assert limits().batch_seconds(BATCH) > 5 * limits().step_seconds(Workload.decode(1, 3)), "one prefill, four decodes"
    assert limits().batch_seconds(BATCH, cached=2) < limits().batch_seconds(BATCH)


def test_the_arithmetic_is_that_of_the_quantized_matrices():
    assert limits().arithmetic("q4_1", 256) == "int8x2"
    assert limits().arithmetic("int4_g128_bf16", 256) == "int8x2"
    for name in ("fp8_g64_f32", "nvfp4", "bf16"):
        assert limits().arithmetic(name, 256) == "f32"
    work, slow = Workload.prefill(8), {"read": 1e18, "rate": 1e9}
    quantized = limits(**slow).step_seconds(work)
    assert limits(main_kind="plain", **slow).step_seconds(work) == pytest.approx(quantized), "2 products at twice"
    assert limits(activation="int8", **slow).step_seconds(work) == pytest.approx(quantized / 2, rel=0.1)


def test_kinds_of_op_add_up_and_elementwise_ones_cost_their_activations():
    work = Workload.decode(1, 10)
    seconds, costs = limits().op_seconds(work), limits().op_costs(work)
    assert set(seconds) == set(costs) - {"slice"}
    assert sum(cost.flops for cost in costs.values()) == graph_cost(GRAPH, work, FORMATS).flops
    assert seconds["glu"] == pytest.approx(costs["glu"].activation_bytes / 1e9)
    assert seconds["linear"] == pytest.approx(max(costs["linear"].memory_bytes, costs["linear"].activation_bytes) / 1e9)


def test_a_matrix_takes_the_longer_of_reading_and_multiplying():
    assert limits().matrix_seconds("q4_1", 64, 1.0, 1e9, 1e6) == pytest.approx(1.0)
    assert limits(rate=1e9).matrix_seconds("q4_1", 64, 4e9, 1.0, 1e6) == pytest.approx(4.0)
    assert limits(rate=1e9).matrix_seconds("f32", 64, 4e9, 1.0, 1e6) == pytest.approx(4.0)


def test_roofs_are_the_measured_ones():
    roofs = limits().roofs()
    assert all(speed == pytest.approx(1e9) for speed in roofs.bandwidths.values())
    assert len(roofs.bandwidths) == 1, "all alike"
    assert roofs.rates == {"f32": 1e15, "int8": 2e15, "int8x2 (used)": 1e15}
