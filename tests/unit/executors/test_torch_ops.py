"""Each op's reference against its definition in `headrace.graph.ops`, spelled out in loops."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from headrace.engine.step import Step
from headrace.executors.torch_ops import REFERENCE_OPS, Batch, Call, KVCache
from headrace.graph.ir import Node, RopeTable, Rows
from headrace.graph.ops import OPS

RNG = np.random.default_rng(0)


def values(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape)


def batch_of(
    positions: Sequence[Sequence[int]], blocks: Sequence[Sequence[int]], block_size: int = 4, kv: Sequence[KVCache] = ()
) -> Batch:
    """Sequences by the positions of their rows and the blocks they own; every second row is sampled."""
    lengths = [len(rows) for rows in positions]
    width = max(map(len, blocks))
    step = Step(
        token_ids=np.arange(sum(lengths), dtype=np.int32),
        positions=np.concatenate([np.array(rows, np.int32) for rows in positions]),
        seq_starts=np.cumsum([0, *lengths]).astype(np.int32),
        context_lens=np.array([rows[-1] + 1 for rows in positions], np.int32),
        block_tables=np.array([[*table, *[-1] * (width - len(table))] for table in blocks], np.int32),
        sample_rows=np.arange(0, sum(lengths), 2, dtype=np.int32),
        sampling=(),
    )
    return Batch.of_step(step, kv, block_size, torch.device("cpu"))


def apply(op: str, inputs: Sequence[np.ndarray], params: Sequence[np.ndarray] = (), batch=None, **attrs) -> np.ndarray:
    node = Node("node", op, (), (), attrs, Rows.TOKENS, 1)
    batch = batch or batch_of([range(3)], [[0]])
    tensors = [[torch.from_numpy(array) for array in arrays] for arrays in (inputs, params)]
    return REFERENCE_OPS[op](Call(node, *tensors, batch)).numpy()


def test_every_op_has_its_reference() -> None:
    assert REFERENCE_OPS.keys() == OPS.keys()


def test_embed() -> None:
    table = values(5, 4)
    np.testing.assert_array_equal(apply("embed", [], [table], scale=1.5), 1.5 * table[[0, 1, 2]])


def test_rms_norm_of_groups() -> None:
    x, weight = values(3, 8), values(4)
    found = apply("rms_norm", [x], [weight], eps=0.1, group=4)
    for row in range(3):
        for start in (0, 4):
            run = x[row, start : start + 4]
            expected = run / math.sqrt((run**2).sum() / 4 + 0.1) * weight
            np.testing.assert_allclose(found[row, start : start + 4], expected)


def test_rms_norm_of_bf16_is_computed_in_f32() -> None:
    x = torch.full((1, 4), 3.0, dtype=torch.bfloat16)
    node = Node("node", "rms_norm", (), (), {"eps": 0.0, "group": 4}, Rows.TOKENS, 4)
    made = REFERENCE_OPS["rms_norm"](Call(node, [x], [torch.full((4,), 1.0)], batch_of([range(1)], [[0]])))
    assert made.dtype == torch.bfloat16
    assert made.tolist() == [[1.0] * 4]


def test_linear_joins_its_parts() -> None:
    x, weights, biases = values(3, 4), [values(2, 4), values(5, 4)], [values(2), values(5)]
    plain = apply("linear", [x], weights, parts=2, bias=False)
    np.testing.assert_allclose(plain, np.hstack([x @ weights[0].T, x @ weights[1].T]))
    biased = apply("linear", [x], weights + biases, parts=2, bias=True)
    np.testing.assert_allclose(biased, plain + np.hstack(biases))


def test_slice() -> None:
    x = values(3, 8)
    np.testing.assert_array_equal(apply("slice", [x], start=2, size=5), x[:, 2:7])


def test_add() -> None:
    a, b = values(3, 8), values(3, 8)
    np.testing.assert_array_equal(apply("add", [a, b]), a + b)


def test_glu() -> None:
    gate, up = values(3, 8), values(3, 8)
    silu = gate / (1 + np.exp(-gate))
    gelu = gate / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    np.testing.assert_allclose(apply("glu", [gate, up], activation="silu"), silu * up)
    np.testing.assert_allclose(apply("glu", [gate, up], activation="gelu_tanh"), gelu * up)


def test_rope_turns_pairs_of_the_leading_features() -> None:
    table = RopeTable(inv_freq=(1.0, 0.25), scale=1.5)
    positions, head_dim = [7, 8, 9], 6
    x = values(3, 2 * head_dim)
    found = apply("rope", [x], batch=batch_of([positions], [[0, 1, 2]]), head_dim=head_dim, rope=table)
    expected = x.copy()
    for row, position in enumerate(positions):
        for head in (0, head_dim):
            for i, frequency in enumerate(table.inv_freq):
                a, b = x[row, head + i], x[row, head + i + 2]
                cos, sin = math.cos(position * frequency), math.sin(position * frequency)
                expected[row, head + i] = 1.5 * (a * cos - b * sin)
                expected[row, head + i + 2] = 1.5 * (b * cos + a * sin)
    np.testing.assert_allclose(found, expected)


def test_rope_keeps_its_precision_at_long_positions() -> None:
    """A float32 product of this position and frequency is off by 2e-3 radians."""
    position, frequency = 100_003, 0.7310585786300049
    x = np.array([[1.0, 0.0]], np.float32)
    batch = batch_of([[position]], [list(range(25_001))])
    found = apply("rope", [x], batch=batch, head_dim=2, rope=RopeTable((frequency,)))
    np.testing.assert_allclose(found[0, 0], math.cos(position * frequency), atol=1e-6)


@pytest.mark.parametrize("window", [0, 3])
def test_attention(window: int) -> None:
    """Two sequences in scattered blocks: one wholly new, one that continues; four query heads on two KV heads."""
    heads, kv_heads, dim, size, scale = 4, 2, 6, 4, 0.3
    keys, held_values = torch.from_numpy(values(2, 8, size, kv_heads, dim))
    kv = KVCache("f32", keys, held_values, None, dim)
    history = [(kv.keys.clone(), kv.values.clone())]
    positions, blocks = [range(6), range(5, 7)], [[6, 1], [3, 0]]
    q, k, v = values(8, heads * dim), values(8, kv_heads * dim), values(8, kv_heads * dim)
    found = apply(
        "attention", [q, k, v], batch=batch_of(positions, blocks, size, [kv]),
        layer=0, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, scale=scale, window=window,
    )  # fmt: skip

    def stored(sequence: int, position: int, which: int) -> np.ndarray:
        if position in positions[sequence]:
            row = positions[sequence].index(position) + (6 if sequence else 0)
            return (k, v)[which][row].reshape(kv_heads, dim)
        return history[0][which][blocks[sequence][position // size], position % size].numpy()

    row = 0
    for sequence, own in enumerate(positions):
        for position in own:
            seen = range(max(0, position - window + 1) if window else 0, position + 1)
            for head in range(heads):
                query, shared = q[row, head * dim : (head + 1) * dim], head // 2
                weights = np.exp([scale * query @ stored(sequence, p, 0)[shared] for p in seen])
                expected = weights / weights.sum() @ np.array([stored(sequence, p, 1)[shared] for p in seen])
                np.testing.assert_allclose(found[row, head * dim : (head + 1) * dim], expected)
            row += 1


def test_attention_writes_only_its_own_slots() -> None:
    kv = KVCache.zeros((4, 2, 1, 2), "f32", torch.device("cpu"))
    ones = np.ones((3, 2), np.float32)
    apply(
        "attention", [ones] * 3, batch=batch_of([[1, 2, 3]], [[2, 0]], 2, [kv]),
        layer=0, num_heads=1, num_kv_heads=1, head_dim=2, scale=1.0, window=0,
    )  # fmt: skip
    written = [(2, 1), (0, 0), (0, 1)]
    assert [tuple(slot) for slot in kv.keys[:, :, 0, 0].nonzero().tolist()] == sorted(written)
    assert [tuple(slot) for slot in kv.values[:, :, 0, 0].nonzero().tolist()] == sorted(written)


def test_select_rows() -> None:
    x = values(3, 8)
    np.testing.assert_array_equal(apply("select_rows", [x]), x[[0, 2]])
