"""Which KV blocks a sequence has: the one object that the scheduler asks."""

from collections.abc import Sequence as Tokens

import numpy as np

from headrace.engine.blocks import BlockPool
from headrace.engine.prefix_tree import Miss, MissReason, Node, PrefixTree
from headrace.engine.step import Int32

_REMEMBERED_PER_BLOCK = 4  # evicted blocks remembered, per block of the pool


class SequenceBlocks:
    """A sequence's KV blocks. Opaque: only `KVManager` looks inside or changes it.

    ::

        0 ....... num_shared ....... len(blocks)
        |-- in the tree --|-- private --|

    The blocks in the tree are full, computed, and never written again; every write goes to a private block.

    Attributes:
        num_cached_tokens: tokens that were computed before the sequence came; readable by all.
        miss: why there are no more of them; readable by all.
    """

    __slots__ = ("blocks", "capacity", "miss", "node", "num_cached_tokens", "num_shared", "row", "tree")

    def __init__(
        self,
        row: int,
        tree: PrefixTree | None,
        node: Node | None,
        shared: list[int],
        num_cached_tokens: int,
        miss: Miss,
    ) -> None:
        self.row = row  # of the manager's block table
        self.tree = tree  # None: prefixes are not cached
        self.node = node
        self.blocks = shared
        self.num_shared = len(shared)
        self.capacity = num_cached_tokens  # tokens that fit
        self.num_cached_tokens = num_cached_tokens
        self.miss = miss


class KVManager:
    """Hands out the blocks of one pool to sequences, sharing those that hold equal prefixes.

    Every block is in exactly one state: free, in the prefix tree (used by any number of sequences, or idle and
    evictable), or private to one sequence.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, max_num_seqs: int, max_len: int, enable_prefix_caching: bool
    ) -> None:
        """`max_len`: tokens that one sequence may come to hold."""
        self.block_size = block_size
        self._pool = BlockPool(num_blocks)
        self._tree = self._new_tree() if enable_prefix_caching else None
        self._retired: list[PrefixTree] = []  # nobody finds anything in them; their blocks go when their users go
        width = min(num_blocks, self._num_blocks_for(max_len))
        self._table: Int32 = np.full((max_num_seqs, width), -1, np.int32)
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._live: dict[int, SequenceBlocks] = {}

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_open(self) -> int:
        """Sequences that hold blocks."""
        return len(self._live)

    @property
    def num_available(self) -> int:
        """Blocks that can be had now: free ones, and idle ones in the tree."""
        return self._pool.num_free + (self._tree.num_idle if self._tree else 0)

    @property
    def num_cached(self) -> int:
        """Blocks that sequences to come can find, in use or idle."""
        return self._tree.num_blocks if self._tree else 0

    def open(self, tokens: Tokens[int]) -> SequenceBlocks | None:
        """Blocks for all of `tokens`, the longest cached prefix among them; all or nothing.

        At least the last token is left to compute, because its logits are wanted. Returns None, and changes nothing,
        if too few blocks can be had. The caller must `close` what it gets, and may not open more than `max_num_seqs`.
        """
        max_cached = (len(tokens) - 1) // self.block_size
        num_needed = self._num_blocks_for(len(tokens))
        if self._tree is None:
            if num_needed > self.num_available:
                return None
            opened = SequenceBlocks(self._free_rows.pop(), None, None, [], 0, Miss(MissReason.OFF, 0))
        else:
            match = self._tree.match(tokens, max_cached)
            if num_needed - len(match.blocks) > self.num_available - match.num_idle:
                return None
            miss = self._tree.explain(tokens, max_cached, match)
            node = self._tree.lock(match)
            num_cached_tokens = len(match.blocks) * self.block_size
            opened = SequenceBlocks(self._free_rows.pop(), self._tree, node, match.blocks, num_cached_tokens, miss)
            for block in opened.blocks:
                self._pool.share(block)
            self._table[opened.row, : opened.num_shared] = opened.blocks
        self._live[opened.row] = opened
        self.grow(opened, len(tokens))
        return opened

    def grow(self, opened: SequenceBlocks, num_tokens: int) -> bool:
        """Make room for `num_tokens` tokens in all, evicting if need be. False, and nothing changed, if it cannot."""
        if num_tokens <= opened.capacity:
            return True
        num_new = self._num_blocks_for(num_tokens) - len(opened.blocks)
        if num_new > self.num_available:
            return False
        for _ in range(num_new):
            if self._pool.num_free == 0:
                assert self._tree is not None
                self._pool.release(self._tree.evict())
            block = self._pool.acquire()
            self._table[opened.row, len(opened.blocks)] = block
            opened.blocks.append(block)
        opened.capacity = len(opened.blocks) * self.block_size
        return True

    def commit(self, opened: SequenceBlocks, tokens: Tokens[int], num_computed: int) -> None:
        """Tell that the KV of the first `num_computed` tokens is computed: full blocks become shareable at once.

        If another sequence has meanwhile computed the same block, that one takes the place of this sequence's own,
        which is freed. Both hold the same bytes: that is the determinism contract. (On an executor whose bits depend
        on the batch they are equal only up to its rounding, and so is the output.)
        """
        num_full = num_computed // self.block_size
        start = opened.num_shared
        if opened.tree is None or opened.tree is not self._tree or num_full == start:
            return
        assert opened.node is not None
        own = opened.blocks[start:num_full]
        opened.node, held = self._tree.insert(opened.node, tokens, start, own)
        for index, (mine, theirs) in enumerate(zip(own, held, strict=True), start):
            self._pool.share(theirs)  # by the tree if it is mine and new there, by the sequence if it was the tree's
            if mine != theirs:
                self._pool.release(mine)
                opened.blocks[index] = theirs
                self._table[opened.row, index] = theirs
        opened.num_shared = num_full

    def close(self, opened: SequenceBlocks) -> None:
        """Give everything back. Blocks in the tree stay cached until evicted; private ones are free at once."""
        assert self._live.pop(opened.row, None) is opened, "closed twice"
        self._table[opened.row, : len(opened.blocks)] = -1
        self._free_rows.append(opened.row)
        for block in opened.blocks:
            self._pool.release(block)
        if opened.tree is not None and opened.node is not None:
            opened.tree.unlock(opened.node)
            if opened.tree is not self._tree:
                self._drain(opened.tree)

    def block_tables(self, sequences: list[SequenceBlocks]) -> Int32:
        """int32 [S, B], one row per sequence, padded with -1 to the longest; a copy."""
        width = max(len(opened.blocks) for opened in sequences)
        return self._table[[opened.row for opened in sequences], :width]

    def clear_cache(self) -> int:
        """Evict every idle block from the tree; how many there were. Blocks in use stay."""
        return self._evict_idle(self._tree) if self._tree else 0

    def retire_cache(self) -> int:
        """Let no sequence find what was computed until now, as after a change of weights; how many blocks became free.

        Sequences that are open keep the blocks they have. What they go on to compute is theirs alone: it follows from
        old blocks and new weights, and so from when the change came.
        """
        if self._tree is None:
            return 0
        retired, self._tree = self._tree, self._new_tree()
        self._retired.append(retired)
        return self._drain(retired)

    def check_integrity(self) -> None:
        """Assert that every block is accounted for exactly once, and that all counts and tables agree."""
        self._pool.check_integrity()
        holders = [0] * self.num_blocks
        in_tree: set[int] = set()
        trees = [self._tree, *self._retired] if self._tree is not None else []
        for tree in trees:
            tree.check_integrity(
                [opened.node for opened in self._live.values() if opened.tree is tree and opened.node is not None]
            )
            in_tree |= {block for node in tree.nodes() for block in node.blocks}
            for node in tree.nodes():
                for block in node.blocks:
                    holders[block] += 1
        assert not any(tree.num_idle for tree in self._retired), "a retired tree keeps idle blocks"
        if self._tree is not None:
            assert all(opened.tree in trees and opened.node for opened in self._live.values()), (
                "a sequence does not hold its place in a tree"
            )
        for opened in self._live.values():
            self._check_sequence(opened, in_tree)
            for block in opened.blocks:
                holders[block] += 1
        for block, expected in enumerate(holders):
            found = self._pool.num_holders(block)
            assert found == expected, f"block {block} has {found} holders, {expected} expected"
            assert block in in_tree or expected <= 1, f"private block {block} is shared"
        assert sorted([*self._free_rows, *self._live]) == list(range(len(self._table))), "a table row leaked"
        assert (self._table[self._free_rows] == -1).all(), "an unused table row is not blank"

    def _check_sequence(self, opened: SequenceBlocks, in_tree: set[int]) -> None:
        row = self._table[opened.row]
        assert row[: len(opened.blocks)].tolist() == opened.blocks, "a table row is stale"
        assert (row[len(opened.blocks) :] == -1).all(), "a table row is longer than its sequence"
        assert opened.capacity == len(opened.blocks) * self.block_size, "capacity is stale"
        assert len(set(opened.blocks)) == len(opened.blocks), "a sequence has a block twice"
        assert in_tree.issuperset(opened.blocks[: opened.num_shared]), "a shared block is not in the tree"
        assert in_tree.isdisjoint(opened.blocks[opened.num_shared :]), "a private block is in the tree"
        path: list[int] = []
        node = opened.node
        while node is not None:
            path[:0] = node.blocks
            node = node.parent
        assert path == opened.blocks[: opened.num_shared], "a sequence's path in the tree is not its blocks"

    def _new_tree(self) -> PrefixTree:
        return PrefixTree(self.block_size, _REMEMBERED_PER_BLOCK * self.num_blocks)

    def _evict_idle(self, tree: PrefixTree) -> int:
        num_evicted = tree.num_idle
        for _ in range(num_evicted):
            self._pool.release(tree.evict())
        return num_evicted

    def _drain(self, retired: PrefixTree) -> int:
        """Free what nobody uses any more of a retired tree, and forget the tree with its last user."""
        num_evicted = self._evict_idle(retired)
        if not any(opened.tree is retired for opened in self._live.values()):
            assert retired.num_blocks == 0, "blocks of a tree outlive its users"
            self._retired.remove(retired)
        return num_evicted

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)
