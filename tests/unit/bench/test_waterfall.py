from dataclasses import replace
from itertools import pairwise

import pytest

from headrace.bench.waterfall import Load, _Bar, _check_tokens, _spread_positions, settings
from headrace.llm.config import LLMConfig

LOAD = Load(num_seqs=4, prefix_len=32, own_len=8, output_len=8, seconds_per_bar=1)


MACHINE = {"isa": "avx2", "num_threads": 2}


def test_bars_go_from_all_off_to_what_was_asked_for_one_at_a_time():
    bars = settings(["q4_1", "q8_0"], LOAD, {"kv_format": "bf16"}, **MACHINE)
    assert [bar.name for bar in bars] == [
        "naive",
        "+ avx2",
        "+ 2 threads",
        "+ KV cache",
        "+ bf16 weights",
        "+ q4_1/q8_0 weights",
        "+ bf16 KV",
        "+ fusion",
        "+ batching",
        "+ prefix cache",
    ]
    for before, after in pairwise(bars):
        changed = {name for name in after.options if after.options[name] != before.options[name]}
        assert len(changed) + (before.caches_kv != after.caches_kv) == 1, after.name
        LLMConfig.of(dict(after.options))
    last = LLMConfig.of(dict(bars[-1].options))
    assert last == LLMConfig(max_model_len=48, max_num_seqs=4, isa="avx2", num_threads=2)


def test_bars_that_would_change_nothing_are_left_out():
    names = [bar.name for bar in settings(["f32"], LOAD, {"kv_format": "f32"}, isa="portable", num_threads=1)]
    assert names == ["naive", "+ KV cache", "+ fusion", "+ batching", "+ prefix cache"]
    assert "+ bf16 weights" in [bar.name for bar in settings(["bf16"], LOAD, {}, **MACHINE)]


@pytest.mark.parametrize("length", [1, 2, 8, 31, 32])
def test_positions_cover_the_output_evenly_from_the_first_two_on(length):
    positions = _spread_positions(length)
    assert sorted(positions) == list(range(length))
    if length >= 8:
        assert sum(positions[:2]) / 2 == pytest.approx(length / 2, abs=1)


def test_a_bar_that_may_not_change_tokens_and_does_fails():
    bars = settings(["f32"], LOAD, {"kv_format": "f32"}, **MACHINE)[-2:]
    before = _Bar([1.0], {(0, 0, 0): 5, (0, 0, 1): 6})
    assert _check_tokens(bars, [before, _Bar([1.0], {(0, 0, 0): 5, (0, 0, 1): 6})]).verdict == "ok"
    changed = [before, _Bar([1.0], {(0, 0, 0): 5, (0, 0, 1): 7})]
    assert _check_tokens(bars, changed).verdict == "failed"
    assert _check_tokens([bars[0], replace(bars[1], keeps_tokens=False)], changed).verdict == "ok"
