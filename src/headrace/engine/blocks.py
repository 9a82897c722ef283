"""Numbered KV blocks with reference counts. Only numbers: the executor owns the bytes."""

from headrace.base.errors import InvalidRequestError


class BlockPool:
    """Blocks 0 … num_blocks - 1. A block is free exactly while nobody holds it. Every operation is O(1)."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise InvalidRequestError(f"A KV pool needs at least one block, not {num_blocks}.")
        self.num_blocks = num_blocks
        # A stack: the block freed last, still warm in the machine's caches, is handed out first.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_holders = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def acquire(self) -> int:
        """Take a free block, with one holder. The caller has made sure that there is one."""
        block = self._free.pop()
        self._num_holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a holder to a held block."""
        assert self._num_holders[block] > 0, f"block {block} is free"
        self._num_holders[block] += 1

    def release(self, block: int) -> None:
        """Remove a holder; the block is free when the last one goes."""
        remaining = self._num_holders[block] - 1
        assert remaining >= 0, f"block {block} is free already"
        self._num_holders[block] = remaining
        if remaining == 0:
            self._free.append(block)

    def num_holders(self, block: int) -> int:
        return self._num_holders[block]

    def check_integrity(self) -> None:
        """Assert that the free list is exactly the blocks that nobody holds, each once."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is in the free list twice"
        unheld = {block for block, holders in enumerate(self._num_holders) if holders == 0}
        assert free == unheld, f"free list and holders disagree on blocks {sorted(free ^ unheld)}"
