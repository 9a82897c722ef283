import pytest

from headrace.engine.kv_manager import KVManager
from headrace.engine.prefix_tree import MissReason


def made(num_blocks=8, *, caching=True, max_num_seqs=4):
    return KVManager(num_blocks, 2, max_num_seqs=max_num_seqs, max_len=64, enable_prefix_caching=caching)


def computed(kv, tokens):
    """Open, compute everything, keep it open."""
    opened = kv.open(tokens)
    kv.commit(opened, tokens, len(tokens))
    kv.check_integrity()
    return opened


def test_open_gives_room_for_every_token():
    kv = made()
    opened = kv.open([1, 2, 3, 4, 5])
    assert kv.num_available == 5
    assert (kv.block_tables([opened]) >= 0).tolist() == [[True, True, True]]
    kv.check_integrity()
    kv.close(opened)
    assert kv.num_available == 8
    kv.check_integrity()


def test_a_prefix_is_shared_but_the_last_token_is_left_to_compute():
    kv = made()
    first = computed(kv, [1, 2, 3, 4])
    second = kv.open([1, 2, 3, 4])
    assert second.num_cached_tokens == 2, "both blocks are cached, but the last token's logits are wanted"
    longer = kv.open([1, 2, 3, 4, 5])
    assert longer.num_cached_tokens == 4
    tables = kv.block_tables([first, second, longer])
    assert tables[0, 0] == tables[1, 0] == tables[2, 0]
    assert tables[1, 1] != tables[0, 1] == tables[2, 1]
    assert tables[:, 2].tolist() == [-1, -1, tables[2, 2]], "padded to the longest"
    kv.check_integrity()


def test_open_is_all_or_nothing_and_counts_what_it_would_itself_take_from_the_idle():
    kv = made(3)
    kv.close(computed(kv, [1, 2, 3, 4]))
    assert kv.num_available == 3, "one free, two idle in the tree"
    assert kv.open([1, 2, 3, 4, 5, 6, 7]) is None, "needs four"
    kv.check_integrity()
    opened = kv.open([1, 2, 3, 4, 5])
    assert (opened.num_cached_tokens, kv.num_available) == (4, 0)
    assert kv.open([9]) is None
    kv.check_integrity()


def test_growing_evicts_the_idle_and_fails_cleanly():
    kv = made(3)
    kv.close(computed(kv, [1, 2]))
    opened = kv.open([5, 6])
    assert kv.grow(opened, 2), "fits already"
    assert kv.num_available == 2
    assert kv.grow(opened, 6)
    assert (kv.num_cached, kv.num_available) == (0, 0)
    assert not kv.grow(opened, 7)
    kv.check_integrity()
    assert kv.block_tables([opened]).shape == (1, 3)


def test_blocks_are_shared_as_soon_as_they_are_computed():
    kv = made()
    first = kv.open([1, 2, 3, 4, 5])
    kv.commit(first, [1, 2, 3, 4, 5], 3)
    assert kv.num_cached == 1, "only full blocks"
    assert kv.open([1, 2, 3]).num_cached_tokens == 2
    kv.check_integrity()


def test_a_block_computed_twice_is_kept_once():
    kv = made()
    tokens = [1, 2, 3, 4, 5]
    first, second = kv.open(tokens), kv.open(tokens)
    assert kv.num_available == 2
    kv.commit(first, tokens, 5)
    kv.commit(second, tokens, 5)
    assert kv.num_available == 4, "the second one's two full blocks are free"
    tables = kv.block_tables([first, second])
    assert (tables[0, :2] == tables[1, :2]).all()
    assert tables[0, 2] != tables[1, 2]
    kv.check_integrity()
    kv.close(first)
    kv.check_integrity()
    kv.close(second)
    kv.check_integrity()
    assert (kv.num_available, kv.clear_cache(), kv.num_cached) == (8, 2, 0)
    kv.check_integrity()


def test_uncommitted_blocks_never_reach_the_tree():
    kv = made()
    kv.close(kv.open([1, 2, 3, 4]))
    assert (kv.num_cached, kv.open([1, 2, 3, 4, 5]).num_cached_tokens) == (0, 0)


def test_without_caching_nothing_is_kept():
    kv = made(caching=False)
    tokens = [1, 2, 3, 4]
    kv.close(computed(kv, tokens))
    opened = kv.open(tokens)
    assert (opened.num_cached_tokens, opened.miss.reason) == (0, MissReason.OFF)
    assert (kv.num_cached, kv.clear_cache(), kv.num_available) == (0, 0, 6)
    kv.check_integrity()


def test_clearing_spares_what_is_in_use():
    kv = made()
    used = computed(kv, [1, 2, 3, 4])
    kv.close(computed(kv, [5, 6]))
    assert (kv.clear_cache(), kv.num_cached) == (1, 2)
    kv.check_integrity()
    kv.close(used)


def test_a_leak_is_found():
    kv = made()
    opened = kv.open([1, 2, 3])
    opened.blocks.pop()
    with pytest.raises(AssertionError, match="longer than its sequence"):
        kv.check_integrity()
    kv = made()
    kv._pool.acquire()
    with pytest.raises(AssertionError, match="has 1 holders, 0 expected"):
        kv.check_integrity()


def test_closing_twice_is_caught():
    kv = made()
    opened = kv.open([1])
    kv.close(opened)
    with pytest.raises(AssertionError, match="closed twice"):
        kv.close(opened)


def test_what_is_retired_is_never_found_again_and_goes_with_its_users():
    kv = made(8)
    kv.close(computed(kv, [1, 2, 3, 4]))
    user = computed(kv, [5, 6, 7])
    assert kv.retire_cache() == 2, "the two idle blocks; the one in use stays"
    kv.check_integrity()
    assert (kv.num_cached, kv.num_available) == (0, 6)
    for tokens in ([1, 2, 3], [5, 6, 7]):
        opened = kv.open(tokens)
        assert (opened.num_cached_tokens, opened.miss.reason) == (0, MissReason.UNSEEN)
        kv.close(opened)
    kv.grow(user, 8)
    kv.commit(user, [5, 6, 7, 8, 9, 10, 11, 12], 8)
    assert kv.num_cached == 0, "from old blocks and new weights: its own alone"
    kv.retire_cache()
    kv.check_integrity()
    kv.close(user)
    kv.check_integrity()
    assert kv.num_available == 8
