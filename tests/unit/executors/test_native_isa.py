"""Which instruction set is asked for."""

import pytest

from headrace import _native
from headrace.executors.native_isa import isa_rounding_inputs


@pytest.mark.parametrize(
    ("available", "asked", "activation", "found"),
    [
        (["portable", "avx2", "avx512", "avx512_vnni", "amx"], None, "int8", "avx512_vnni"),
        (["portable", "avx2", "avx512", "avx512_vnni", "amx"], None, "int16", None),
        (["portable", "avx2", "avx512", "avx512_vnni", "amx"], "amx", "int8", None),
        (["portable", "avx2"], None, "int8", None),
    ],
)
def test_int8_is_of_inputs_unless_the_environment_says_otherwise(monkeypatch, available, asked, activation, found):
    monkeypatch.setattr(_native, "available_isas", lambda: available)
    if asked is None:
        monkeypatch.delenv("HEADRACE_ISA", raising=False)
    else:
        monkeypatch.setenv("HEADRACE_ISA", asked)
    assert isa_rounding_inputs(activation) == found
