"""Greedy steps, whose logits are looked at where they are made and never written: same tokens, same refusals."""

import numpy as np
import pytest

from headrace._native import available_isas
from headrace.base.errors import ExecutorError
from headrace.engine.sampling import SamplingParams
from headrace.engine.step import SampleRow, Step
from headrace.executors.native import NativeExecutor
from headrace.graph.builder import GraphBuilder
from headrace.numerics.tensor import RawTensor
from tests.support.raw_tensors import quantized

VOCAB, FEATURES, MAX_ROWS = 1021, 64, 40
GREEDY = SampleRow(SamplingParams(temperature=0.0), 0, 0)
WITH_LOGPROBS = SampleRow(SamplingParams(temperature=0.0, logprobs=0), 0, 0)

rng = np.random.default_rng(2)
EMBEDDINGS = rng.standard_normal((VOCAB, FEATURES)).astype(np.float32)
WEIGHT = rng.standard_normal((VOCAB, FEATURES)).astype(np.float32)
WEIGHT[900:] = WEIGHT[: VOCAB - 900]  # ties, far apart
BIAS = rng.standard_normal(VOCAB).astype(np.float32)
BIAS[900:] = BIAS[: VOCAB - 900]


def executor_of(*, embeddings=EMBEDDINGS, weight=WEIGHT, number_format="f32", bias=None, **options) -> NativeExecutor:
    """Fed token i, its logits are `weight` times row i of the embeddings."""
    g = GraphBuilder()
    x = g.select_rows("last", g.embed("embed", VOCAB, FEATURES))
    graph = g.build(g.linear("logits", x, VOCAB, bias=bias is not None))
    weights = {"embed.weight": RawTensor.from_f32(embeddings), "logits.weight": quantized(weight, number_format)}
    if bias is not None:
        weights["logits.bias"] = RawTensor.from_f32(bias)
    return NativeExecutor(
        graph, weights, num_blocks=MAX_ROWS, max_num_seqs=MAX_ROWS, max_batched_tokens=MAX_ROWS, max_model_len=16,
        **options,
    )  # fmt: skip


def step_of(rows, taps=()) -> Step:
    """Row i feeds token i, a sequence of its own."""
    count, starts = np.arange(len(rows), dtype=np.int32), np.arange(len(rows) + 1, dtype=np.int32)
    ones = np.ones_like(count)
    return Step(count, 0 * ones, starts, ones, count[:, None].copy(), count, tuple(rows), taps)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("number_format", ["f32", "q8_0", "q4_1"])
@pytest.mark.parametrize("bias", [None, BIAS], ids=["", "bias"])
@pytest.mark.parametrize("count", [1, 3, MAX_ROWS])
def test_the_token_is_the_first_highest_of_the_written_logits(isa, number_format, bias, count):
    for num_threads in (1, 3):
        executor = executor_of(number_format=number_format, bias=bias, isa=isa, num_threads=num_threads)
        greedy = executor.execute(step_of([GREEDY] * count))
        written = executor.execute(step_of([GREEDY] * count, taps=("logits",)))
        executor.close()
        np.testing.assert_array_equal(greedy.token_ids, written.taps["logits"].argmax(1))
        np.testing.assert_array_equal(greedy.token_ids, written.token_ids)
        assert greedy.token_ids.max() < 900, "of a tie, the first"


def test_a_row_that_asks_for_more_changes_no_other():
    executor = executor_of()
    alone = executor.execute(step_of([GREEDY] * 9))
    mixed = executor.execute(step_of([GREEDY] * 8 + [WITH_LOGPROBS]))
    np.testing.assert_array_equal(mixed.token_ids, alone.token_ids)
    assert np.isfinite(mixed.logprobs[8])
    executor.close()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sample", [GREEDY, WITH_LOGPROBS], ids=["greedy", "logprobs"])
@pytest.mark.parametrize("isa", available_isas())
def test_a_row_whose_logits_are_not_finite_is_named(value, sample, isa):
    embeddings = EMBEDDINGS.copy()
    embeddings[4, 7] = value
    executor = executor_of(embeddings=embeddings, isa=isa)
    assert len(executor.execute(step_of([sample] * 4)).token_ids) == 4
    with pytest.raises(ExecutorError, match="row 4"):
        executor.execute(step_of([sample] * 6))
    executor.close()


@pytest.mark.parametrize("sample", [GREEDY, WITH_LOGPROBS], ids=["greedy", "logprobs"])
@pytest.mark.parametrize("isa", available_isas())
def test_one_damaged_logit_is_enough(sample, isa):
    """Even where the highest of the others lies far from it."""
    weight = WEIGHT.copy()
    weight[700, 7] = np.nan
    executor = executor_of(weight=weight, isa=isa)
    with pytest.raises(ExecutorError, match="row 0"):
        executor.execute(step_of([sample] * 6))
    executor.close()


def test_logits_of_minus_infinity_are_never_the_highest():
    bias = np.full(VOCAB, -np.inf, np.float32)
    bias[1000] = 0.0
    executor = executor_of(bias=bias)
    assert executor.execute(step_of([GREEDY] * 3)).token_ids.tolist() == [1000] * 3
    bias[1000] = -np.inf
    executor.close()
    executor = executor_of(bias=bias)
    with pytest.raises(ExecutorError, match="row 0"):
        executor.execute(step_of([GREEDY] * 3))
    executor.close()
