"""Limits against times worked out by hand."""

import pytest

from headrace.base.errors import InvalidRequestError
from headrace.graph.cost import Workload, graph_cost
from headrace.plan.roofline import kernel_arithmetic, limits_for_model, node_limits, step_limit
from tests.unit.plan.machines import FORMATS, HIDDEN, MIB, VOCAB, machine, small


def test_one_row_is_bound_by_the_bandwidth_of_all_that_the_step_reads():
    made = machine()
    graph, work = small(), Workload.decode(1, 1)
    step = step_limit(graph, work, FORMATS, made, "bf16")
    read = 10 * MIB + 4096 + 8 * MIB / VOCAB
    assert graph_cost(graph, work, FORMATS).memory_bytes == read
    assert step.bound == "memory"
    assert step.bytes == read
    assert step.seconds == pytest.approx(read / made.bandwidth(read))
    nodes = {node.name: node for node in node_limits(graph, work, FORMATS, made, "bf16")}
    assert nodes["up"].bytes == 2 * MIB
    assert nodes["up"].seconds == pytest.approx(2 * MIB / made.bandwidth(read)), "not the bandwidth of 2 MiB alone"
    assert nodes["up"].intensity == pytest.approx(1.0), "two FLOPs for two bytes"


def test_many_rows_are_bound_by_the_arithmetic():
    work = Workload.prefill(1000)
    made = machine()
    nodes = {node.name: node for node in node_limits(small(), work, FORMATS, made, "bf16")}
    assert nodes["up"].bound == "compute"
    assert nodes["up"].seconds == pytest.approx(2 * 1000 * HIDDEN * HIDDEN / 8e12)
    assert nodes["logits"].bound == "memory", "one sampled row"
    halved = {node.name: node for node in node_limits(small(), work, FORMATS, made, "bf16x2")}
    assert halved["up"].seconds == pytest.approx(2 * nodes["up"].seconds)
    assert halved["norm"].compute_seconds == nodes["norm"].compute_seconds == pytest.approx(4 * 1000 * HIDDEN / 1e12)


def test_a_step_overlaps_what_its_nodes_do_in_turn():
    work = Workload.prefill(1000)
    nodes = node_limits(small(), work, FORMATS, machine(), "bf16")
    step = step_limit(small(), work, FORMATS, machine(), "bf16")
    assert step.memory_seconds == pytest.approx(sum(node.memory_seconds for node in nodes))
    assert step.compute_seconds == pytest.approx(sum(node.compute_seconds for node in nodes))
    assert step.seconds == max(step.memory_seconds, step.compute_seconds)
    assert step.seconds < step.seconds_in_turn == pytest.approx(sum(node.seconds for node in nodes))
    assert step.seconds_in_turn < step.memory_seconds + step.compute_seconds


def test_nodes_that_cost_nothing_are_left_out():
    names = [node.name for node in node_limits(small(), Workload.decode(1, 1), FORMATS, machine(), "f32")]
    assert names == ["embed", "norm", "up", "last", "logits"]


def test_half_a_core_takes_twice_the_time():
    work = Workload.decode(8, 1)
    whole = step_limit(small(), work, FORMATS, machine(num_threads=1), "f32")
    half = step_limit(small(), work, FORMATS, machine(num_threads=1, cpu_quota=0.5), "f32")
    assert half.seconds == pytest.approx(2 * whole.seconds)


def test_the_usual_workloads():
    limits = {limit.name: limit for limit in limits_for_model(small(), FORMATS, machine(), "f32")}
    assert list(limits) == ["decode1", "decode8", "decode64", "prefill512", "prefill2048"]
    assert limits["decode8"].tokens == 8
    assert limits["prefill512"].tokens_per_second == pytest.approx(512 / limits["prefill512"].step.seconds)
    assert limits["decode64"].tokens_per_second > 8 * limits["decode1"].tokens_per_second, "weights are read once"


def test_an_arithmetic_that_the_machine_lacks_is_refused():
    with pytest.raises(InvalidRequestError, match="int8"):
        step_limit(small(), Workload.decode(1, 1), FORMATS, machine(matrix_rate={"f32": 1e12}), "int8")


@pytest.mark.parametrize(
    ("isa", "activation", "kind", "arithmetic"),
    [
        ("portable", "auto", "blocks", "f32"),
        ("avx2", "auto", "blocks", "int16"),
        ("avx2", "int8", "blocks", "int8"),
        ("avx2", "int8", "plain", "f32"),
        ("avx512", "bf16", "blocks", "f32"),
        ("avx512_vnni", "auto", "blocks", "int8x2"),
        ("avx512_vnni", "int8", "blocks", "int8"),
        ("avx512_vnni", "auto", "plain", "f32"),
        ("amx", "auto", "blocks", "int8x4"),
        ("amx", "f32", "blocks", "bf16x2"),
        ("amx", "bf16", "plain", "bf16"),
        ("amx", "int16", "blocks", "int8x4"),
        ("amx", "int16", "plain", "bf16x2"),
        ("amx", "int16", "row_blocks", "int8x4"),
        ("amx", "int8", "blocks", "int8x2"),
        ("amx", "int8", "row_blocks", "int8x2"),
        ("amx", "auto", "byte_rows", "int8x2"),
        ("amx", "bf16", "byte_rows", "f32"),
        ("avx512_vnni", "int8", "byte_rows", "int8"),
        ("amx", "f32", "row_blocks", "f32"),
    ],
)
def test_what_the_kernels_multiply_in(isa, activation, kind, arithmetic):
    assert kernel_arithmetic(isa, activation, kind=kind) == arithmetic
