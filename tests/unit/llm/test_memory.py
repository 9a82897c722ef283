import pytest

from headrace.base.errors import CapacityError, InvalidRequestError
from headrace.llm.memory import HEADROOM, plan_memory

GIB = 1 << 30


def plan(**changes):
    arguments = {
        "block_bytes": 1 << 20,
        "block_size": 16,
        "weight_bytes": GIB,
        "context_length": 4096,
        "max_model_len": None,
        "max_num_seqs": 4,
        "kv_cache_memory": None,
        "available": 8 * GIB,
    }
    return plan_memory(**(arguments | changes))


def test_plenty_of_memory_gives_every_sequence_its_full_context():
    made = plan()
    assert made.num_blocks == 4 * 4096 // 16
    assert made.max_model_len == 4096


def test_half_of_what_is_free_is_the_most_taken_unasked():
    made = plan(max_num_seqs=1000)
    assert made.kv_bytes <= (8 * GIB * HEADROOM - GIB) / 2
    assert made.kv_bytes > (8 * GIB * HEADROOM - GIB) / 2 - (1 << 20)


def test_the_context_shrinks_to_what_fits_unless_it_was_asked_for():
    assert plan(kv_cache_memory=64 << 20).max_model_len == 64 * 16
    with pytest.raises(CapacityError, match="max_model_len 1024"):
        plan(kv_cache_memory=64 << 20, max_model_len=2048)
    with pytest.raises(CapacityError) as caught:
        plan(kv_cache_memory=1 << 10)
    assert "max_model_len" not in caught.value.remedy  # none is short enough


def test_too_much_kv_says_what_would_fit():
    with pytest.raises(CapacityError) as caught:
        plan(kv_cache_memory=20 * GIB)
    assert "20.00 GiB" in caught.value.cause
    assert "6.20 GiB" in caught.value.remedy  # 8 * 0.9 - 1


def test_no_context_beyond_the_model_s_own():
    with pytest.raises(InvalidRequestError, match="4097 exceeds the 4096"):
        plan(max_model_len=4097)
    assert plan(max_model_len=4096).max_model_len == 4096


def test_weights_that_do_not_fit():
    with pytest.raises(CapacityError, match=r"weights need 10\.00 GiB"):
        plan(weight_bytes=10 * GIB)
