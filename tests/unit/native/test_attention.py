"""Native attention against a plain softmax over all keys, on queries, keys and values that the executor itself made."""

import numpy as np
import pytest

from headrace._native import available_isas
from headrace.base.errors import ExecutorError
from headrace.executors.native import NativeExecutor
from headrace.graph.builder import GraphBuilder
from headrace.graph.ir import Graph
from headrace.numerics.kv_cache import round_heads, widen_heads
from headrace.numerics.kv_formats import KV_FORMATS, SCALED_FORMATS
from headrace.numerics.rounding import bf16_to_f32, f32_to_bf16
from headrace.numerics.tensor import RawTensor
from tests.support.stepping import Stepper
from tests.support.tiny_llama import random_weights

VOCAB, HIDDEN = 64, 32
TAPS = ("q", "k", "v", "attn")


def one_attention(heads: int, kv_heads: int, dim: int, window: int) -> Graph:
    g = GraphBuilder()
    x = g.embed("embed", VOCAB, HIDDEN)
    q, k, v = g.linear("q", x, heads * dim), g.linear("k", x, kv_heads * dim), g.linear("v", x, kv_heads * dim)
    attn = g.attention(
        "attn", q, k, v, layer=0, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, scale=dim**-0.5, window=window
    )
    return g.build(g.linear("logits", g.select_rows("last", attn), VOCAB))


def reference(q, k, v, heads: int, kv_heads: int, dim: int, window: int):
    """Causal attention of one whole sequence, float64: q [T, heads * dim], k and v [T, kv_heads * dim]."""
    tokens = len(q)
    q_thd = q.astype(np.float64).reshape(tokens, heads, dim)
    k_thd, v_thd = (
        np.repeat(x.astype(np.float64).reshape(tokens, kv_heads, dim), heads // kv_heads, 1) for x in (k, v)
    )
    scores = np.einsum("qhd,khd->hqk", q_thd, k_thd) * dim**-0.5
    distance = np.arange(tokens)[:, None] - np.arange(tokens)[None, :]
    scores[:, (distance < 0) | ((distance >= window) if window else False)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v_thd).reshape(tokens, -1)


def as_cached(x: np.ndarray, kv_format: str, dim: int, *, keys: bool) -> np.ndarray:
    """Keys or values [T, kv_heads * dim] as the cache gives them back."""
    if kv_format == "bf16":
        return bf16_to_f32(f32_to_bf16(np.ascontiguousarray(x)))
    if kv_format in SCALED_FORMATS:
        heads = round_heads(x.reshape(len(x), -1, dim), kv_format, keys=keys)
        return widen_heads(heads, kv_format, keys=keys).reshape(x.shape)
    return x


def tolerances(kv_format: str, isa: str) -> dict[str, float]:
    """Of what attention gives, against exact arithmetic over the cached values: integers meet queries and weights that
    are rounded to 16 bits; with AMX, bf16 meets such that are rounded to bf16."""
    if (kv_format, isa) == ("bf16", "amx"):
        return {"rtol": 4e-3, "atol": 4e-3}
    return {"rtol": 3e-4, "atol": 3e-4} if kv_format in ("int8", "int4") else {"rtol": 1e-5, "atol": 3e-6}


def run(graph: Graph, tokens: list[int], chunks: list[int], **options) -> dict[str, np.ndarray]:
    """The tapped values of one sequence computed in chunks of these sizes, next to another one that moves along."""
    block_size = options.pop("block_size", 16)
    executor = NativeExecutor(
        graph,
        random_weights(graph, seed=3),
        num_blocks=2 * -(-len(tokens) // block_size),
        block_size=block_size,
        max_batched_tokens=2 * len(tokens),
        max_num_seqs=4,
        max_model_len=len(tokens),
        **options,
    )
    stepper, begin, found = Stepper(executor), 0, {name: [] for name in TAPS}
    for size in chunks:
        part = tokens[begin : begin + size]
        result = stepper.run({"other": part[::-1], "asked": part}, sampled=1, taps=TAPS)
        for name in TAPS:
            found[name].append(result.taps[name][size:])
        begin += size
    executor.close()
    return {name: np.concatenate(parts) for name, parts in found.items()}


TOKENS = np.random.default_rng(5).integers(0, VOCAB, 90).tolist()


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "block_size"),
    [
        (4, 2, 16, 0, 16),
        (9, 3, 64, 0, 16),  # the fast path's own shape
        (8, 1, 80, 0, 32),
        (5, 5, 48, 0, 64),
        (6, 2, 24, 0, 16),  # a head that is no whole number of vectors
        (4, 2, 16, 0, 8),  # a block that is less than a vector
        (4, 2, 32, 20, 16),
        (4, 2, 7, 5, 3),
        (3, 1, 96, 0, 16),
        (4, 2, 128, 50, 32),
        (2, 1, 256, 0, 16),
        (6, 6, 64, 33, 16),  # no group at all
        (14, 2, 64, 0, 16),  # a group that is more than a batch
        (100, 1, 16, 0, 16),  # and more than is taken at once
    ],
)
def test_equals_softmax_over_all_keys(isa, kv_format, heads, kv_heads, dim, window, block_size) -> None:
    got = run(
        one_attention(heads, kv_heads, dim, window), TOKENS, [90], isa=isa, kv_format=kv_format, block_size=block_size
    )
    k, v = (as_cached(got[x], kv_format, dim, keys=x == "k") for x in "kv")
    expected = reference(got["q"], k, v, heads, kv_heads, dim, window)
    np.testing.assert_allclose(got["attn"], expected, **tolerances(kv_format, isa))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_the_cache_holds_what_the_rounding_rule_says(isa, kv_format) -> None:
    """A query that sees its own token alone gets that token's value back, bit for bit."""
    for dim, block_size in ((64, 16), (40, 16), (7, 3)):
        got = run(one_attention(4, 2, dim, 1), TOKENS, [90], isa=isa, kv_format=kv_format, block_size=block_size)
        values = as_cached(got["v"], kv_format, dim, keys=False).reshape(90, 2, dim)
        np.testing.assert_array_equal(got["attn"], np.repeat(values, 2, axis=1).reshape(90, -1))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize(
    ("heads", "dim", "window"),
    [
        (9, 16, 0),
        (9, 16, 20),
        (9, 80, 0),
        (42, 16, 0),
        (3, 64, 0),
        (6, 64, 33),
        (9, 128, 0),
        (12, 96, 7),
        (3, 24, 0),
        (33, 64, 0),  # 88 queries at once, eleven units of eight
        (6, 272, 0),
    ],
)
def test_is_the_same_however_the_tokens_are_chunked(isa, kv_format, heads, dim, window) -> None:
    """Few rows read the cache in place, many read a widened copy, or take tile products; a batch of queries has one to
    six, a tile up to 16."""
    graph = one_attention(heads, 3, dim, window)
    whole = run(graph, TOKENS, [90], isa=isa, kv_format=kv_format)["attn"]
    for chunks in ([1] * 90, [2] * 45, [33, 1, 1, 20, 35], [64, 26]):
        for num_threads in (1, 3):
            got = run(graph, TOKENS, chunks, isa=isa, num_threads=num_threads, kv_format=kv_format)["attn"]
            np.testing.assert_array_equal(got, whole)


@pytest.mark.parametrize("kv_format", ["bf16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("window", [0, 700])
def test_splits_of_long_contexts_join_to_the_same_bits(window, kv_format) -> None:
    """Few rows, of one sequence or several, hand their splits to different threads; prefill takes them in a row."""
    graph = one_attention(4, 2, 16, window)
    tokens = np.random.default_rng(6).integers(0, VOCAB, 1300).tolist()
    whole = run(graph, tokens, [1300], num_threads=1, kv_format=kv_format)
    chunked = run(graph, tokens, [1280, 5, 5] + [1] * 10, num_threads=3, kv_format=kv_format)
    np.testing.assert_array_equal(chunked["attn"], whole["attn"])
    k, v = (as_cached(whole[x], kv_format, 16, keys=x == "k") for x in "kv")
    expected = reference(whole["q"], k, v, 4, 2, 16, window)
    np.testing.assert_allclose(whole["attn"], expected, **tolerances(kv_format, available_isas()[-1]))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize(
    ("dim", "window", "block_size"), [(32, 0, 16), (32, 20, 16), (48, 0, 16), (24, 0, 8), (7, 9, 3)]
)
def test_what_others_left_in_a_block_does_not_matter(isa, kv_format, dim, window, block_size) -> None:
    """Blocks come back from sequences that went wrong: their keys and values may be no numbers."""
    graph = one_attention(4, 2, dim, window)
    weights = dict(random_weights(graph, seed=3))
    embed = weights["embed.weight"].to_f32().copy()
    embed[VOCAB - 1] = 3e38
    weights["embed.weight"] = RawTensor.from_f32(embed)
    tokens = [t for t in TOKENS if t != VOCAB - 1][:70]
    found = []
    for before in ([], [[VOCAB - 1] * 80]):
        executor = NativeExecutor(
            graph,
            weights,
            num_blocks=-(-80 // block_size),
            block_size=block_size,
            isa=isa,
            kv_format=kv_format,
            max_model_len=80,
        )
        for ids in before:
            spoiled = Stepper(executor).run({"spoiled": ids}, sampled=0, taps=("attn",)).taps["attn"]
            assert not np.isfinite(spoiled).any()
        stepper = Stepper(executor)  # hands out the same blocks from the first on
        parts = [
            stepper.run({"a": part}, sampled=0, taps=("attn",)).taps["attn"]
            for part in (tokens[:37], tokens[37:38], tokens[38:])
        ]
        found.append(np.concatenate(parts))
        executor.close()
    assert np.isfinite(found[0]).all()
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("damaged", ["k", "v"])
def test_a_damaged_key_or_value_shows(isa, kv_format, damaged) -> None:
    """One token's key (or value) overflows: rows that see it are NaN in that KV head, rows before it are not."""
    graph = one_attention(4, 2, 32, 0)
    weights = dict(random_weights(graph, seed=3))
    embed, matrix = (weights[f"{name}.weight"].to_f32().copy() for name in ("embed", damaged))
    embed[:, 0] = np.where(np.arange(VOCAB) == 5, np.float32(10), np.float32(0))
    matrix[:, 0] = 0
    matrix[3, 0] = 3e38  # a feature of the first KV head
    weights |= {"embed.weight": RawTensor.from_f32(embed), f"{damaged}.weight": RawTensor.from_f32(matrix)}
    for name in {"q", "k", "v"} - {damaged}:
        clean = weights[f"{name}.weight"].to_f32().copy()
        clean[:, 0] = 0
        weights[f"{name}.weight"] = RawTensor.from_f32(clean)
    executor = NativeExecutor(graph, weights, num_blocks=8, isa=isa, kv_format=kv_format, max_model_len=64)
    tokens = [t for t in TOKENS if t != 5][:40]
    tokens[20] = 5
    got = Stepper(executor).run({"a": tokens}, sampled=0, taps=("attn",)).taps["attn"].reshape(40, 4, 32)
    executor.close()
    assert np.isfinite(got[:20]).all()
    assert np.isnan(got[20:, :2]).all()
    assert np.isfinite(got[20:, 2:]).all()


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("place", [512, 511, 3])
def test_a_damaged_key_shows_across_splits(isa, kv_format, place) -> None:
    """Where it is the only key of its split that a query sees, and where it is in the one before."""
    graph = one_attention(2, 1, 16, 0)
    weights = dict(random_weights(graph, seed=3))
    embed, matrix = (weights[f"{name}.weight"].to_f32().copy() for name in ("embed", "k"))
    embed[:, 0] = np.where(np.arange(VOCAB) == 5, np.float32(10), np.float32(0))
    matrix[:, 0] = 0
    matrix[3, 0] = 3e38
    weights |= {"embed.weight": RawTensor.from_f32(embed), "k.weight": RawTensor.from_f32(matrix)}
    for name in "qv":
        clean = weights[f"{name}.weight"].to_f32().copy()
        clean[:, 0] = 0
        weights[f"{name}.weight"] = RawTensor.from_f32(clean)
    tokens = np.random.default_rng(6).integers(6, VOCAB, 1100).tolist()
    tokens[place] = 5
    for chunks in ([1100], [513, 587], [512, 1, 511, 1, 75]):
        executor = NativeExecutor(
            graph, weights, num_blocks=70, isa=isa, kv_format=kv_format, max_model_len=1120, max_batched_tokens=1120
        )
        stepper, found, begin = Stepper(executor), [], 0
        for size in chunks:
            part = tokens[begin : begin + size]
            found.append(stepper.run({"a": part}, sampled=0, taps=("attn",)).taps["attn"])
            begin += size
        executor.close()
        got = np.concatenate(found)
        assert np.isfinite(got[:place]).all()
        assert np.isnan(got[place:]).all()


def test_a_head_too_large_for_exact_sums_is_named() -> None:
    with pytest.raises(ExecutorError, match="1024"):
        NativeExecutor(graph := one_attention(1, 1, 1040, 0), random_weights(graph), num_blocks=1, kv_format="int8")
