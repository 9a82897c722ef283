"""A radix tree over KV blocks, keyed by their tokens: which blocks already hold a prefix.

As in SGLang's RadixAttention (arXiv:2312.07104), but in whole blocks: an edge holds one or more full blocks and splits
only at block boundaries.
"""

import heapq
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from enum import Enum

Key = tuple[int, ...]
"""The tokens of one block."""


class MissReason(Enum):
    """Why a match ended where it did."""

    NONE = "none"  # every block that could be served was
    OFF = "off"  # prefix caching is off
    SHORT = "short"  # no full block before the last token, which is always computed
    UNSEEN = "unseen"  # what is cached ends here: nothing was ever computed beyond, or not lately
    EVICTED = "evicted"  # was here, and made room for others
    DIVERGED = "diverged"  # what is cached goes on with another token


@dataclass(frozen=True, slots=True)
class Miss:
    """Why, and at which token: the first one not served, or for `DIVERGED` the first one that differs."""

    reason: MissReason
    at: int


class Node:
    """An edge of the tree and the node at its end. Whoever uses a node uses all blocks of its edge."""

    __slots__ = ("blocks", "children", "digests", "keys", "last_used", "num_users", "parent", "serial", "sorted_keys")

    def __init__(self, parent: "Node | None", keys: list[Key], blocks: list[int], digests: list[int], serial: int):
        self.parent = parent
        self.keys = keys
        self.blocks = blocks
        self.digests = digests  # per block, of all tokens from the root through it: the memory of evictions
        self.children: dict[Key, Node] = {}
        self.sorted_keys: list[Key] = []  # of the children; neighbors share the longest prefix with a missing key
        self.num_users = 0  # sequences whose path runs through or ends here
        self.last_used = 0
        self.serial = serial  # breaks ties in the heap

    @property
    def is_evictable(self) -> bool:
        return self.num_users == 0 and not self.children and bool(self.blocks)


@dataclass(frozen=True, slots=True)
class Match:
    """The cached blocks of a prefix. Good only until the tree next changes.

    Attributes:
        blocks: in order of position.
        num_idle: how many of them nobody uses now, which counts them among `PrefixTree.num_idle`.
        node: the deepest node reached.
        num_of_node: how many blocks of its edge matched (all but for a match that ends inside it).
    """

    blocks: list[int]
    num_idle: int
    node: Node
    num_of_node: int


class PrefixTree:
    """Blocks by their tokens, with users and least-recently-used eviction.

    The tree holds numbers only, and never decides that a block is free: `evict` and `insert` hand back blocks that it
    no longer or never held. A block that has a user, or lies on the way to one, is never evicted.
    """

    def __init__(self, block_size: int, max_remembered: int) -> None:
        """`max_remembered`: evicted blocks remembered, only to tell `EVICTED` from `UNSEEN`."""
        self.block_size = block_size
        self.num_blocks = 0
        self.num_idle = 0
        """Blocks that nobody uses: all of them can be evicted."""
        self.root = Node(None, [], [], [], 0)
        self._time = 0
        self._num_nodes_made = 0
        self._leaves: list[tuple[int, int, Node]] = []  # heap by (last_used, serial); stale entries are skipped
        self._evicted: OrderedDict[int, None] = OrderedDict()  # digests, oldest first
        self._max_remembered = max_remembered

    # -- Reading ----------------------------------------------------------------------------------------------------

    def match(self, tokens: Tokens[int], max_blocks: int) -> Match:
        """The longest cached prefix of at most `max_blocks` blocks. Does not change the tree."""
        blocks: list[int] = []
        node, num_idle, num_of_node = self.root, 0, 0
        while len(blocks) < max_blocks:
            child = node.children.get(self._key(tokens, len(blocks)))
            if child is None:
                break
            num_of_node = self._match_edge(child, tokens, len(blocks), max_blocks)
            blocks += child.blocks[:num_of_node]
            num_idle += num_of_node if child.num_users == 0 else 0
            node = child
            if num_of_node < len(child.blocks):
                break
        return Match(blocks, num_idle, node, num_of_node)

    def explain(self, tokens: Tokens[int], max_blocks: int, match: Match) -> Miss:
        """Why `match` is no longer than it is. O(block_size · log children)."""
        num_matched = len(match.blocks)
        at = num_matched * self.block_size
        if max_blocks == 0:
            return Miss(MissReason.SHORT, 0)
        if num_matched == max_blocks:
            return Miss(MissReason.NONE, at)
        key = self._key(tokens, num_matched)
        node, inside = match.node, match.num_of_node
        if _digest(node.digests[inside - 1] if inside else 0, key) in self._evicted:
            return Miss(MissReason.EVICTED, at)
        if inside < len(node.keys):
            return Miss(MissReason.DIVERGED, at + _common_prefix(key, node.keys[inside]))
        place = bisect_left(node.sorted_keys, key)
        neighbors = node.sorted_keys[max(place - 1, 0) : place + 1]
        common = max((_common_prefix(key, neighbor) for neighbor in neighbors), default=0)
        if not neighbors or at + common == 0:
            return Miss(MissReason.UNSEEN, at)
        return Miss(MissReason.DIVERGED, at + common)

    # -- Using ------------------------------------------------------------------------------------------------------

    def lock(self, match: Match) -> Node:
        """Become a user of the matched blocks. Returns the node to `insert` under and to `unlock`."""
        node = match.node
        if match.num_of_node < len(node.blocks):
            node = self._split(node, match.num_of_node)
        self._add_user(node, self.root)
        return node

    def unlock(self, node: Node) -> None:
        """Stop using the blocks on the way to `node`: they become the most recently used, evictable ones."""
        self._time += 1
        current: Node | None = node
        while current is not None and current is not self.root:
            current.num_users -= 1
            assert current.num_users >= 0, "unlocked more often than locked"
            if current.num_users == 0:
                current.last_used = self._time
                self.num_idle += len(current.blocks)
                if not current.children:
                    self._push_leaf(current)
            current = current.parent

    def insert(self, node: Node, tokens: Tokens[int], start: int, blocks: list[int]) -> tuple[Node, list[int]]:
        """Add a user's computed blocks, those numbered `start`, `start` + 1, … of `tokens`, below its `node`.

        Where the tree already has such a block (two sequences computed the same at once), the tree's own stays.

        Returns:
            The user's new node, and the blocks that now hold these tokens: for each, the given one or the tree's.
        """
        held: list[int] = []
        while len(held) < len(blocks):
            child = node.children.get(self._key(tokens, start + len(held)))
            if child is None:
                node = self._append(node, tokens, start + len(held), blocks[len(held) :])
                return node, held + blocks[len(held) :]
            length = self._match_edge(child, tokens, start + len(held), start + len(blocks))
            if length < len(child.blocks):
                child = self._split(child, length)
            self._add_user(child, node)
            held += child.blocks
            node = child
        return node, held

    def evict(self) -> int:
        """Forget the least recently used block that nobody uses and return it. O(log n). There must be one."""
        while not self._is_current(self._leaves[0]):
            heapq.heappop(self._leaves)
        leaf = self._leaves[0][2]
        block = leaf.blocks.pop()
        key = leaf.keys.pop()
        self._remember(leaf.digests.pop())
        self.num_blocks -= 1
        self.num_idle -= 1
        if not leaf.blocks:
            heapq.heappop(self._leaves)
            self._remove_child(leaf, key)
        return block

    def _remove_child(self, leaf: Node, key: Key) -> None:
        parent = leaf.parent
        assert parent is not None
        del parent.children[key]
        del parent.sorted_keys[bisect_left(parent.sorted_keys, key)]
        if parent is not self.root and parent.is_evictable:
            self._push_leaf(parent)

    # -- Structure --------------------------------------------------------------------------------------------------

    def _key(self, tokens: Tokens[int], block_index: int) -> Key:
        return tuple(tokens[block_index * self.block_size : (block_index + 1) * self.block_size])

    def _match_edge(self, child: Node, tokens: Tokens[int], start: int, stop: int) -> int:
        """Blocks of `child`'s edge, whose first is known to match, that equal blocks `start` … `stop` of `tokens`."""
        length = 1
        longest = min(len(child.keys), stop - start)
        while length < longest and child.keys[length] == self._key(tokens, start + length):
            length += 1
        return length

    def _add_user(self, node: Node, above: Node) -> None:
        """Count a user on every node from `node` up to, not including, `above`."""
        current: Node | None = node
        while current is not None and current is not above:
            if current.num_users == 0:
                self.num_idle -= len(current.blocks)
            current.num_users += 1
            current = current.parent

    def _append(self, node: Node, tokens: Tokens[int], start: int, blocks: list[int]) -> Node:
        """Put blocks that no child of `node` holds below it, for a user of `node`."""
        keys = [self._key(tokens, start + i) for i in range(len(blocks))]
        digest = node.digests[-1] if node.digests else 0
        digests = []
        for key in keys:
            digest = _digest(digest, key)
            digests.append(digest)
            self._evicted.pop(digest, None)
        self.num_blocks += len(blocks)
        if node is not self.root and not node.children and node.num_users == 1:
            # The only user goes on: a longer edge instead of a chain of nodes.
            node.keys += keys
            node.blocks += blocks
            node.digests += digests
            return node
        child = self._new_node(node, keys, list(blocks), digests)
        child.num_users = 1
        node.children[keys[0]] = child
        insort(node.sorted_keys, keys[0])
        return child

    def _split(self, node: Node, length: int) -> Node:
        """Part an edge after `length` blocks. `node` keeps the lower part, so that its users' references stay right."""
        parent = node.parent
        assert parent is not None, "the root has no edge to part"
        assert 0 < length < len(node.blocks)
        upper = self._new_node(parent, node.keys[:length], node.blocks[:length], node.digests[:length])
        upper.num_users = node.num_users
        upper.last_used = node.last_used
        parent.children[upper.keys[0]] = upper
        node.parent = upper
        node.keys, node.blocks, node.digests = node.keys[length:], node.blocks[length:], node.digests[length:]
        upper.children[node.keys[0]] = node
        upper.sorted_keys.append(node.keys[0])
        return upper

    def _new_node(self, parent: Node, keys: list[Key], blocks: list[int], digests: list[int]) -> Node:
        self._num_nodes_made += 1
        return Node(parent, keys, blocks, digests, self._num_nodes_made)

    # -- Eviction order ---------------------------------------------------------------------------------------------

    def _push_leaf(self, node: Node) -> None:
        heapq.heappush(self._leaves, (node.last_used, node.serial, node))
        if len(self._leaves) > 2 * self.num_blocks + 64:  # at least half are stale: O(1) amortized
            self._leaves = [entry for entry in self._leaves if self._is_current(entry)]
            heapq.heapify(self._leaves)

    @staticmethod
    def _is_current(entry: tuple[int, int, Node]) -> bool:
        last_used, _, node = entry
        return node.is_evictable and node.last_used == last_used

    def _remember(self, digest: int) -> None:
        self._evicted[digest] = None
        if len(self._evicted) > self._max_remembered:
            self._evicted.popitem(last=False)

    # -- Checking ---------------------------------------------------------------------------------------------------

    def nodes(self) -> Iterator[Node]:
        """All nodes but the root, parents before children."""
        pending = list(self.root.children.values())
        while pending:
            node = pending.pop()
            yield node
            pending += node.children.values()

    def check_integrity(self, users: list[Node]) -> None:
        """Assert every invariant, given the node that each user holds."""
        expected_users: dict[int, int] = {}
        for user in users:
            current: Node | None = user
            while current is not None and current is not self.root:
                expected_users[id(current)] = expected_users.get(id(current), 0) + 1
                current = current.parent
        current_leaves = {id(entry[2]) for entry in self._leaves if self._is_current(entry)}
        num_blocks = num_idle = 0
        seen: set[int] = set()
        for node in [self.root, *self.nodes()]:
            assert node.sorted_keys == sorted(node.children), "the children's order is stale"
            for key, child in node.children.items():
                assert child.parent is node, "a child knows another parent"
                assert child.keys[0] == key, "a child is filed under another key"
            if node is self.root:
                continue
            assert node.blocks, "an edge is empty"
            assert len(node.blocks) == len(node.keys) == len(node.digests), "an edge is uneven"
            assert all(len(key) == self.block_size for key in node.keys), "a block is not full"
            assert node.num_users == expected_users.pop(id(node), 0), "users are miscounted"
            assert not seen.intersection(node.blocks), "a block is in the tree twice"
            seen.update(node.blocks)
            assert not node.is_evictable or id(node) in current_leaves, "an evictable leaf is not in the heap"
            num_blocks += len(node.blocks)
            num_idle += len(node.blocks) if node.num_users == 0 else 0
        assert not expected_users, "a user holds a node that is not in the tree"
        assert (num_blocks, num_idle) == (self.num_blocks, self.num_idle), "blocks are miscounted"


def _digest(parent: int, key: Key) -> int:
    return hash((parent, key))


def _common_prefix(left: Key, right: Key) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), len(left))
