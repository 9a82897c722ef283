"""The native executor's edges: what it refuses, what it reports, how it ends."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from headrace._native import available_isas
from headrace.base.errors import CapacityError, ExecutorError
from headrace.engine.sampling import SamplingParams
from headrace.engine.step import SampleRow, Step
from headrace.executors.native import NativeExecutor
from headrace.executors.native_weights import planned_bytes
from headrace.graph.passes import fuse
from headrace.numerics.tensor import RawTensor
from tests.support.stepping import Stepper
from tests.support.tiny_llama import VOCAB, random_weights, tiny_llama


def make(**options) -> NativeExecutor:
    graph = options.pop("graph", None) or tiny_llama()
    weights = options.pop("weights", None) or random_weights(graph)
    limits = {"num_blocks": 8, "block_size": 4, "max_batched_tokens": 16, "max_num_seqs": 8, "max_model_len": 24}
    return NativeExecutor(graph, weights, **{**limits, **options})


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("name", ["f32", "bf16", "q4_1", "q5_0", "q8_0"])
def test_what_is_planned_for_weights_is_what_they_take(isa, name):
    graph = fuse(tiny_llama())
    weights = random_weights(graph, (name,))
    table = weights["embed.weight"].num_bytes
    vectors = sum(4 * param.shape[0] for param in graph.params.values() if len(param.shape) == 1)
    executor = make(graph=graph, weights=weights, isa=isa)
    assert planned_bytes(graph, weights, isa, "f32") == executor.describe()["packed_bytes"] + table + vectors
    executor.close()


@pytest.mark.parametrize("name", ["f32", "q4_1", "q8_0"])
def test_interleaved_heads_are_packed_as_their_rows_in_order_are(name):
    graph = fuse(tiny_llama())
    ordered = random_weights(graph, (name,))
    heads = {f"layers.{i}.{part}.weight": heads for i in range(2) for part, heads in (("q", 4), ("k", 2))}
    stored = dict(ordered)
    for matrix, num_heads in heads.items():
        tensor = ordered[matrix]
        rows = np.arange(tensor.shape[0]).reshape(num_heads, 2, -1).swapaxes(1, 2).reshape(-1)
        stored[matrix] = RawTensor(tensor.format, tensor.shape, tensor.data[rows], num_heads)
        np.testing.assert_array_equal(stored[matrix].data, tensor.data)
    logits = []
    for weights in (ordered, stored):
        executor = make(graph=graph, weights=weights)
        logits.append(Stepper(executor).logits({"a": [1, 2, 3, 4, 5]})["a"])
        executor.close()
    np.testing.assert_array_equal(*logits)


@pytest.fixture
def executor():
    made = make()
    yield made
    made.close()


def int32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


GOOD = Step(
    token_ids=int32(1, 2, 3, 4, 5),
    positions=int32(0, 1, 2, 3, 0),
    seq_starts=int32(0, 4, 5),
    context_lens=int32(4, 1),
    block_tables=np.array([[5, -1], [2, -1]], dtype=np.int32),
    sample_rows=int32(3, 4),
    sampling=(SampleRow(SamplingParams(temperature=0.0), 0, 0),) * 2,
)

BAD = {
    "token beyond the vocabulary": {"token_ids": int32(1, 2, VOCAB, 4, 5)},
    "negative token": {"token_ids": int32(1, -2, 3, 4, 5)},
    "position out of order": {"positions": int32(0, 2, 1, 3, 0)},
    "positions of another length": {"positions": int32(0, 1, 2, 3)},
    "rows of no sequence": {"seq_starts": int32(0, 3, 4)},
    "sequence without rows": {"seq_starts": int32(0, 5, 5)},
    "rows that start late": {"seq_starts": int32(1, 4, 5)},
    "context shorter than its rows": {"context_lens": int32(3, 1)},
    "context beyond the block table": {"context_lens": int32(4, 9), "positions": int32(0, 1, 2, 3, 8)},
    "context beyond the window": {"context_lens": int32(4, 25), "positions": int32(0, 1, 2, 3, 24)},
    "missing block": {"block_tables": np.array([[-1, 1], [2, -1]], dtype=np.int32)},
    "block beyond the pool": {"block_tables": np.array([[5, -1], [8, -1]], dtype=np.int32)},
    "block written by two sequences": {"block_tables": np.array([[5, -1], [5, -1]], dtype=np.int32)},
    "block written by one sequence and read by another": {
        "context_lens": int32(4, 5),
        "positions": int32(0, 1, 2, 3, 4),
        "block_tables": np.array([[5, -1], [5, 2]], dtype=np.int32),
    },
    "sampled row beyond the rows": {"sample_rows": int32(3, 5)},
    "sampled rows out of order": {"sample_rows": int32(4, 3)},
    "too many tokens": {
        "token_ids": int32(*[1] * 17),
        "positions": int32(*range(17)),
        "seq_starts": int32(0, 17),
        "context_lens": int32(17),
        "block_tables": np.arange(5, dtype=np.int32)[None],
    },
    "sampling for fewer rows": {"sampling": GOOD.sampling[:1]},
    "unknown tap": {"taps": ("layers.9.attn",)},
}


@pytest.mark.parametrize("what", BAD)
def test_a_step_that_does_not_fit_changes_nothing(executor, what) -> None:
    expected = executor.execute(GOOD).token_ids
    with pytest.raises(ExecutorError):
        executor.execute(replace(GOOD, **BAD[what]))
    np.testing.assert_array_equal(executor.execute(GOOD).token_ids, expected)


def test_a_step_that_samples_nothing_has_an_empty_result(executor) -> None:
    result = executor.execute(replace(GOOD, sample_rows=int32(), sampling=()))
    assert result.token_ids.shape == (0,)
    assert result.top_ids.shape == (0, 0)


def test_refuses_an_instruction_set_that_is_not_there() -> None:
    with pytest.raises(ExecutorError, match="portable"):
        make(isa="avx1024")


def test_fused_and_unfused_graphs_agree_to_the_bit() -> None:
    """Fusing lays weights side by side; each column's arithmetic stays. Parts may differ in format."""
    graph = tiny_llama()
    weights = random_weights(graph, ("q4_1", "q8_0", "bf16", "f32"))
    work = {"a": [3, 1, 4, 1, 5], "b": [9, 2]}
    taps = [
        Stepper(make(graph=g, weights=weights)).run(work, taps=("logits",)).taps["logits"] for g in (graph, fuse(graph))
    ]
    np.testing.assert_array_equal(*taps)


@pytest.mark.parametrize("isa", available_isas())
def test_instruction_sets_agree(isa) -> None:
    graph = tiny_llama()
    weights = random_weights(graph, ("q4_1", "q8_0", "bf16", "f32"))
    logits = [
        Stepper(make(graph=graph, weights=weights, isa=name, kv_format="f32"))
        .run({"a": [3, 1, 4, 1, 5]}, taps=("logits",))
        .taps["logits"]
        for name in ("portable", isa)
    ]
    assert np.abs(logits[1] - logits[0]).max() <= 1e-4 * np.abs(logits[0]).max()


def test_biases_are_added() -> None:
    from headrace.graph.builder import GraphBuilder

    g = GraphBuilder()
    x = g.embed("embed", 40, 32)
    graph = g.build(g.linear("logits", g.select_rows("last", x), 40, bias=True))
    weights = dict(random_weights(graph))
    bias = np.arange(40, dtype=np.float32)
    weights["logits.bias"] = RawTensor.from_f32(bias)
    got = Stepper(make(graph=graph, weights=weights)).run({"a": [1, 2]}, taps=("last", "logits")).taps
    expected = got["last"] @ weights["logits.weight"].to_f32().T + bias
    np.testing.assert_allclose(got["logits"], expected, rtol=1e-4, atol=1e-4)


def test_embeddings_are_scaled() -> None:
    from headrace.graph.builder import GraphBuilder

    g = GraphBuilder()
    graph = g.build(g.select_rows("last", g.embed("embed", 20, 20, scale=3.0)))
    weights = random_weights(graph)
    got = Stepper(make(graph=graph, weights=weights)).run({"a": [1, 7]}, taps=("last",)).taps["last"]
    np.testing.assert_array_equal(got, 3 * weights["embed.weight"].to_f32()[[1, 7]])


def test_says_what_was_chosen_and_where_time_went() -> None:
    executor = make(isa="portable", num_threads=1)
    assert (executor.num_threads, executor.isa) == (1, "portable")
    told = executor.describe()
    assert sum(kernel["count"] for kernel in told["kernels"]) == 15
    assert told["kv_bytes"] == 2 * 2 * 8 * 4 * 2 * 16 * 2  # layers, k and v, blocks, tokens, heads, features, bytes
    executor.profile(start=True)
    executor.execute(GOOD)
    profile = executor.profile()
    assert profile["linear"][1] == 15
    assert all(seconds >= 0 for seconds, _ in profile.values())


def test_close_can_be_called_twice() -> None:
    executor = make()
    executor.close()
    executor.close()


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": GOOD.token_ids.astype(np.int64)},
        {"positions": GOOD.positions.astype(np.float32)},
        {"token_ids": GOOD.token_ids[None]},
        {"block_tables": GOOD.block_tables[0]},
        {"block_tables": GOOD.block_tables[:, :0]},
        {"sampling": (replace(GOOD.sampling[0], output_ids=(2**40,)),) * 2},
        {"sampling": (replace(GOOD.sampling[0], index=2**70),) * 2},
    ],
)
def test_refuses_arrays_that_are_not_what_they_should_be(executor, change) -> None:
    expected = executor.execute(GOOD).token_ids
    with pytest.raises(ExecutorError):
        executor.execute(replace(GOOD, **change))
    np.testing.assert_array_equal(executor.execute(GOOD).token_ids, expected)


def test_takes_arrays_that_are_not_contiguous(executor) -> None:
    expected = executor.execute(GOOD).token_ids
    spread = np.repeat(GOOD.token_ids, 3)[::3]
    got = executor.execute(replace(GOOD, token_ids=spread, block_tables=np.asfortranarray(GOOD.block_tables)))
    np.testing.assert_array_equal(got.token_ids, expected)


def test_weights_that_are_not_numbers_are_an_error() -> None:
    graph = tiny_llama()
    weights = dict(random_weights(graph))
    weights["embed.weight"] = RawTensor.from_f32(np.full(graph.params["embed.weight"].shape, np.nan, np.float32))
    executor = make(graph=graph, weights=weights)
    for _ in range(2):
        with pytest.raises(ExecutorError, match="not finite"):
            executor.execute(GOOD)


@pytest.mark.parametrize("limit", ["num_blocks", "block_size", "max_batched_tokens", "max_num_seqs", "max_model_len"])
def test_refuses_limits_that_are_not_counts(limit) -> None:
    with pytest.raises(ExecutorError, match=rf"{limit} is 0"):
        make(**{limit: 0})


def test_refuses_a_cache_that_no_machine_has_and_says_what_fits() -> None:
    with pytest.raises(CapacityError, match=r"At most [1-9]\d* fit"):
        make(num_blocks=2**31 - 1, block_size=2**14)


def test_refuses_more_threads_than_any_machine_serves() -> None:
    with pytest.raises(ExecutorError, match="100000000 threads, of at most"):
        make(num_threads=100_000_000)


def test_ends_without_close_and_leaves_no_thread() -> None:
    def num_threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before = num_threads()
    for _ in range(3):
        executor = make(num_threads=4)
        executor.execute(GOOD)
        assert num_threads() == before + 3
        del executor
        assert num_threads() == before


def test_says_so_in_a_forked_process_and_lets_it_end() -> None:
    """Threads do not survive a fork: using them would wait for ever, and so would stopping them."""
    executor = make(num_threads=2)
    executor.execute(GOOD)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            executor.execute(GOOD)
        except ExecutorError as error:
            code = 0 if "forked" in str(error) else 2
        del executor
        os._exit(code)
    deadline = time.monotonic() + 10
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)
    executor.execute(GOOD)


def test_runs_one_step_at_a_time() -> None:
    """Two callers at once: each gets its own result or is refused; neither gets the other's."""
    executor = make()
    expected = executor.execute(GOOD).token_ids
    refused = []

    def call() -> None:
        for _ in range(200):
            try:
                np.testing.assert_array_equal(executor.execute(GOOD).token_ids, expected)
            except ExecutorError as error:
                refused.append(str(error))

    with ThreadPoolExecutor(2) as callers:
        for done in [callers.submit(call) for _ in range(2)]:
            done.result()
    assert all("another step" in text for text in refused)


def test_fusion_saves_ops_and_changes_no_bit():
    graph, work = fuse(tiny_llama()), {"a": [1, 2, 3, 4, 5], "b": [6, 7]}
    ops, logprobs = [], []
    for fused in (True, False):
        executor = make(graph=graph, weights=random_weights(graph, ("q8_0",)), num_blocks=16, fuse=fused)
        logprobs.append(Stepper(executor).run(work).logprobs)
        ops.append(executor.describe()["num_ops"])
        executor.close()
    assert ops[0] < ops[1]
    np.testing.assert_array_equal(logprobs[0], logprobs[1])
