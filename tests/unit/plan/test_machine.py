import dataclasses
import json

import pytest

from headrace.base.errors import InvalidRequestError
from headrace.plan.machine import Machine
from tests.unit.plan.machines import MIB, machine


def test_bandwidth_is_measured_at_the_ends_and_logarithmic_between():
    made = machine()
    assert made.bandwidth(1) == made.bandwidth(MIB) == 100e9
    assert made.bandwidth(256 * MIB) == made.bandwidth(1 << 40) == pytest.approx(10e9)
    assert made.bandwidth(16 * MIB) == pytest.approx(1000**0.5 * 1e9), "half way from 2^20 to 2^28, and from 100 to 10"


def test_bandwidths_are_sorted_and_a_single_one_holds_everywhere():
    assert list(machine(read_bandwidth={8 * MIB: 1e9, MIB: 2e9}).read_bandwidth) == [MIB, 8 * MIB]
    assert machine(read_bandwidth={MIB: 5e9}).bandwidth(64 * MIB) == 5e9


def test_an_arithmetic_may_take_several_products():
    made = machine()
    assert made.rate("bf16") == 8e12
    assert made.rate("bf16x2") == 4e12
    assert made.rate("int8x2") == 8e12


@pytest.mark.parametrize("name", ["fp8", "bf16x0", "bf16xx2", "bf16x-1", "", "x2"])
def test_an_arithmetic_that_is_not_there_is_refused_by_name(name):
    with pytest.raises(InvalidRequestError, match=f"no arithmetic '{name}' with amx. It has f32, bf16, int8"):
        machine().rate(name)


@pytest.mark.parametrize(
    ("quota", "threads", "share"), [(None, 2, 1.0), (4.0, 2, 1.0), (2.0, 2, 1.0), (0.5, 1, 0.5), (1.5, 2, 0.75)]
)
def test_a_quota_below_the_threads_takes_its_share(quota, threads, share):
    assert machine(cpu_quota=quota, num_threads=threads).cpu_share == share


def test_more_threads_than_cores_share_the_cores():
    assert machine(cpu_quota=1.0, num_threads=8).cpu_share == 0.5


@pytest.mark.parametrize("made", [machine(), machine(cpu_quota=1.5, memory_limit=1 << 30, caches={})])
def test_a_machine_survives_json(made):
    assert Machine.from_dict(json.loads(json.dumps(made.as_dict()))) == made


def test_a_machine_is_frozen_all_the_way():
    made = machine()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.cores = 3
    with pytest.raises(TypeError):
        made.matrix_rate["f32"] = 1.0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"colour": "blue"}, "colour"),
        ({"cores": "two"}, "cores"),
        ({"cores": True}, "cores"),
        ({"cpu_quota": 0}, "cpu_quota"),
        ({"isas": "amx"}, "isas"),
        ({"read_bandwidth": {}}, "rates"),
        ({"read_bandwidth": {"big": 1.0}}, "read_bandwidth"),
        ({"read_bandwidth": {"1024": -1.0}}, "1024"),
        ({"read_bandwidth": {"1024": float("nan")}}, "1024"),
        ({"matrix_rate": {"f32": "fast"}}, "f32"),
        ({"matrix_rate": {"int8": 1.0}}, "f32"),
        ({"memory_limit": -1}, "memory_limit"),
    ],
)
def test_a_description_that_is_wrong_is_refused_by_key(change, named):
    with pytest.raises(InvalidRequestError, match=named):
        Machine.from_dict(machine().as_dict() | change)


def test_a_description_that_lacks_a_key_is_refused_by_key():
    values = machine().as_dict()
    del values["isa"]
    with pytest.raises(InvalidRequestError, match="no key 'isa'"):
        Machine.from_dict(values)
    with pytest.raises(InvalidRequestError):
        Machine.from_dict([1])
