"""The tree with blocks of two tokens; block numbers are the test's own."""

import time

from headrace.engine.prefix_tree import Miss, MissReason, PrefixTree


def made(max_remembered=100):
    return PrefixTree(2, max_remembered)


def add(tree, tokens, blocks):
    """A user that matches what it can, computes the rest in the given blocks, and leaves. Returns the blocks held."""
    match = tree.match(tokens, len(tokens) // 2)
    node = tree.lock(match)
    start = len(match.blocks)
    node, held = tree.insert(node, tokens, start, blocks[start:])
    tree.check_integrity([node])
    tree.unlock(node)
    tree.check_integrity([])
    return match.blocks + held


def blocks_of(tree, tokens):
    return tree.match(tokens, len(tokens) // 2).blocks


def why(tree, tokens):
    max_blocks = (len(tokens) - 1) // 2
    return tree.explain(tokens, max_blocks, tree.match(tokens, max_blocks))


def test_match_finds_the_longest_prefix_of_full_blocks():
    tree = made()
    add(tree, [1, 2, 3, 4, 5, 6], [10, 11, 12])
    assert blocks_of(tree, [1, 2, 3, 4, 5, 6, 7, 8]) == [10, 11, 12]
    assert blocks_of(tree, [1, 2, 3, 9, 5, 6]) == [10]
    assert blocks_of(tree, [1, 2, 3]) == [10]
    assert blocks_of(tree, [9, 2, 3, 4]) == []
    assert tree.match([1, 2, 3, 4], 1).blocks == [10], "no further than asked"


def test_a_match_that_ends_inside_an_edge_does_not_go_on_below_it():
    tree = made()
    add(tree, [1, 1, 2, 2, 3, 3], [10, 11, 12])
    add(tree, [1, 1, 2, 2, 4, 4], [-1, -1, 13])
    assert blocks_of(tree, [1, 1, 3, 3]) == [10], "3, 3 follows 2, 2 only"


def test_matching_alone_changes_nothing():
    tree = made()
    add(tree, [1, 2, 3, 4], [10, 11])
    tree.match([1, 2, 9, 9], 2)
    assert len(list(tree.nodes())) == 1, "split only when locked"


def test_an_edge_splits_at_a_block_boundary():
    tree = made()
    add(tree, [1, 2, 3, 4, 5, 6], [10, 11, 12])
    assert len(list(tree.nodes())) == 1
    assert add(tree, [1, 2, 3, 4, 7, 7], [-1, -1, 13]) == [10, 11, 13]
    assert sorted(sorted(node.blocks) for node in tree.nodes()) == [[10, 11], [12], [13]]


def test_a_split_keeps_users_on_the_blocks_they_use():
    tree = made()
    tokens = [1, 2, 3, 4, 5, 6]
    long_user, _ = tree.insert(tree.lock(tree.match(tokens, 3)), tokens, 0, [10, 11, 12])
    short_user = tree.lock(tree.match([1, 2, 9, 9], 2))
    tree.check_integrity([long_user, short_user])
    tree.unlock(long_user)
    tree.check_integrity([short_user])
    assert tree.num_idle == 2, "the first block is still in use"
    tree.unlock(short_user)
    assert tree.num_idle == 3


def test_a_lone_user_makes_its_edge_longer_but_a_shared_edge_stays():
    tree = made()
    tokens = [1, 2, 3, 4, 5, 6]
    user, _ = tree.insert(tree.lock(tree.match(tokens, 0)), tokens, 0, [10])
    user, _ = tree.insert(user, tokens, 1, [11])
    assert [node.blocks for node in tree.nodes()] == [[10, 11]]
    other = tree.lock(tree.match(tokens, 2))
    user, _ = tree.insert(user, tokens, 2, [12])
    assert sorted(node.blocks for node in tree.nodes()) == [[10, 11], [12]]
    tree.check_integrity([user, other])


def test_the_same_block_computed_twice_stays_once():
    tree = made()
    tokens = [1, 2, 3, 4, 5, 6]
    first, second = (tree.lock(tree.match(tokens, 3)) for _ in range(2))
    first, held = tree.insert(first, tokens, 0, [10, 11])
    assert held == [10, 11]
    second, held = tree.insert(second, tokens, 0, [20, 21, 22])
    assert held == [10, 11, 22], "the tree's own, then the new one"
    tree.check_integrity([first, second])
    assert tree.num_blocks == 3


def test_a_duplicate_of_part_of_an_edge_splits_it():
    tree = made()
    add(tree, [1, 2, 3, 4], [10, 11])
    user, held = tree.insert(tree.root, [1, 2], 0, [20])
    assert held == [10]
    tree.check_integrity([user])
    assert tree.num_idle == 1


def test_eviction_takes_the_least_recently_used_and_ends_before_beginnings():
    tree = made()
    add(tree, [1, 1, 2, 2], [10, 11])
    add(tree, [3, 3], [12])
    add(tree, [1, 1, 4, 4], [-1, 13])
    tree.unlock(tree.lock(tree.match([3, 3], 1)))  # used again: now the youngest
    assert [tree.evict() for _ in range(4)] == [11, 13, 10, 12]
    tree.check_integrity([])
    assert (tree.num_blocks, tree.num_idle) == (0, 0)


def test_what_is_in_use_is_never_evicted():
    tree = made()
    add(tree, [1, 1, 2, 2], [10, 11])
    add(tree, [3, 3], [12])
    user = tree.lock(tree.match([1, 1, 2, 2], 2))
    assert tree.num_idle == 1
    assert tree.evict() == 12
    assert tree.num_idle == 0
    tree.unlock(user)
    assert [tree.evict(), tree.evict()] == [11, 10]


def test_eviction_does_not_slow_down_with_the_tree():
    def seconds(num_leaves):
        tree = PrefixTree(1, num_leaves // 2)
        for i in range(num_leaves):
            tree.unlock(tree.insert(tree.root, [i], 0, [i])[0])
        started = time.perf_counter()
        for _ in range(200):
            tree.evict()
        return time.perf_counter() - started

    small, large = (min(seconds(n) for _ in range(3)) for n in (400, 12_800))
    assert large < 8 * small, "32 times the leaves: a scan would take 32 times as long"


def test_the_eviction_heap_stays_small_without_evictions():
    tree = made()
    add(tree, [1, 2], [10])
    for _ in range(1000):
        tree.unlock(tree.lock(tree.match([1, 2], 1)))
    assert len(tree._leaves) <= 2 * tree.num_blocks + 65
    tree.check_integrity([])


def test_a_miss_says_why():
    tree = made()
    assert why(tree, [1, 2]) == Miss(MissReason.SHORT, 0), "the last token is always computed: no full block before it"
    assert why(tree, [1, 2, 3]) == Miss(MissReason.UNSEEN, 0)
    add(tree, [1, 2, 3, 4, 5, 6], [10, 11, 12])
    assert why(tree, [1, 2, 3, 4, 5, 6, 7]) == Miss(MissReason.NONE, 6)
    assert why(tree, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == Miss(MissReason.UNSEEN, 6), "nothing was computed beyond"
    assert why(tree, [1, 2, 3, 9, 5]) == Miss(MissReason.DIVERGED, 3), "inside an edge"
    assert why(tree, [1, 9, 3]) == Miss(MissReason.DIVERGED, 1), "at the root"
    assert why(tree, [9, 2, 3]) == Miss(MissReason.UNSEEN, 0)
    assert tree.evict() == 12
    assert why(tree, [1, 2, 3, 4, 5, 6, 7]) == Miss(MissReason.EVICTED, 4)
    add(tree, [1, 2, 3, 4, 5, 6], [10, 11, 12])
    assert why(tree, [1, 2, 3, 4, 5, 6, 7]) == Miss(MissReason.NONE, 6)


def test_divergence_is_measured_from_the_nearest_of_many():
    tree = made()
    for i, second in enumerate([0, 3, 5, 8]):
        add(tree, [7, 7, second, 0], [100, 200 + i])
    add(tree, [7, 7, 5, 9], [100, 300])
    assert why(tree, [7, 7, 5, 4, 0]) == Miss(MissReason.DIVERGED, 3)
    assert why(tree, [7, 7, 9, 9, 0]) == Miss(MissReason.DIVERGED, 2)


def test_the_memory_of_evictions_is_bounded():
    tree = made(max_remembered=1)
    add(tree, [1, 2], [10])
    add(tree, [3, 4], [11])
    tree.evict()
    tree.evict()
    assert why(tree, [3, 4, 0]).reason is MissReason.EVICTED
    assert why(tree, [1, 2, 0]).reason is MissReason.UNSEEN
