import pytest

from headrace.base.errors import InvalidRequestError
from headrace.engine.blocks import BlockPool


def test_a_block_is_free_when_its_last_holder_goes():
    pool = BlockPool(2)
    block = pool.acquire()
    pool.share(block)
    pool.release(block)
    assert (pool.num_free, pool.num_holders(block)) == (1, 1)
    pool.release(block)
    assert pool.num_free == 2
    pool.check_integrity()


def test_blocks_are_distinct_and_the_warmest_comes_first():
    pool = BlockPool(3)
    blocks = [pool.acquire() for _ in range(3)]
    assert sorted(blocks) == [0, 1, 2]
    pool.release(1)
    pool.release(2)
    assert pool.acquire() == 2


def test_misuse_is_caught():
    pool = BlockPool(2)
    block = pool.acquire()
    pool.release(block)
    with pytest.raises(AssertionError, match="free already"):
        pool.release(block)
    with pytest.raises(AssertionError, match="is free"):
        pool.share(block)
    pool._free.append(block)
    with pytest.raises(AssertionError, match="twice"):
        pool.check_integrity()
    pool._free = [0]
    with pytest.raises(AssertionError, match="disagree on blocks"):
        pool.check_integrity()


def test_an_empty_pool_is_refused():
    with pytest.raises(InvalidRequestError, match="at least one block"):
        BlockPool(0)
