"""The measurements behind every limit: what is refused, and what must hold on any machine."""

import itertools
import os

import pytest

from headrace import _native

ISAS = _native.available_isas()


@pytest.mark.parametrize("isa", ISAS)
def test_every_arithmetic_has_a_rate(isa):
    names = _native.arithmetics(isa)
    assert names[0] == "f32"
    for name in names:
        assert 1e8 < _native.matrix_rate(name, isa, 1, 0.01) < 1e15


def test_wider_registers_multiply_more():
    """A compiler that skipped a loop would make it faster than any machine is."""
    wide = [isa for isa in ("portable", "avx2", "avx512") if isa in ISAS]
    rates = [max(_native.matrix_rate("f32", isa, 1, 0.05) for _ in range(3)) for isa in wide]
    assert all(slow < 1.2 * fast for slow, fast in itertools.pairwise(rates)), rates
    assert max(rates) < 64 * 10e9, "a core does at most 64 FLOPs in one of at most 10 thousand million cycles a second"


@pytest.mark.skipif("avx512_vnni" not in ISAS, reason="needs VNNI")
def test_integer_products_reach_their_rate():
    """Four times as many as f32's, in the same registers. Half of it would be lost in moves if a compiler made some."""
    isa = ISAS[-1]
    f32, int8 = (max(_native.matrix_rate(name, isa, 1, 0.05) for _ in range(4)) for name in ("f32", "int8"))
    assert int8 > 2.5 * f32


@pytest.mark.parametrize("name", ["fp8", "", "bf16x2"])
def test_an_arithmetic_that_is_not_there_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"'portable' has no arithmetic '{name}' on this machine, only: f32"):
        _native.matrix_rate(name, "portable", 1)


def test_an_instruction_set_that_is_not_there_is_refused_by_name():
    with pytest.raises(ValueError, match="'mmx' is not available here, only: portable"):
        _native.matrix_rate("f32", "mmx", 1)


def test_threads_that_do_not_start_are_refused():
    with pytest.raises(ValueError, match="100000 threads"):
        _native.matrix_rate("f32", "portable", 100_000)
    with pytest.raises(ValueError, match="100000 threads"):
        _native.read_bandwidth(1 << 20, 100_000)


@pytest.mark.parametrize("size", [0, 1, 4096, 100_000, 1 << 20])
def test_any_working_set_is_read(size):
    for threads in (1, 3):
        assert 1e7 < _native.read_bandwidth(size, threads, 0.01) < 1e13


def test_measuring_leaves_the_thread_where_it_was():
    before = os.sched_getaffinity(0)
    _native.read_bandwidth(1 << 16, 2, 0.01)
    _native.matrix_rate("f32", "portable", 2, 0.01)
    assert os.sched_getaffinity(0) == before
