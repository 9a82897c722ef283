"""The native sampler against the reference, through an executor whose logits are a row of its embedding table."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace._native import available_isas
from headrace.base.errors import ExecutorError
from headrace.engine.sampling import SamplingParams
from headrace.engine.step import SampleRow, Step
from headrace.executors.native import NativeExecutor
from headrace.executors.sampler import sample
from headrace.graph.builder import GraphBuilder
from headrace.numerics.tensor import RawTensor

MAX_ROWS = 16


def executor_of(logits: np.ndarray, isa: str | None = None, num_threads: int = 2) -> NativeExecutor:
    """An executor that, fed token i, has the logits of row i: a table look-up is the whole model. logits [V, V]."""
    g = GraphBuilder()
    x = g.embed("embed", len(logits), len(logits))
    # A model needs attention for its KV cache to have bytes; this one does without either.
    graph = g.build(g.select_rows("last", x))
    weights = {"embed.weight": RawTensor.from_f32(np.ascontiguousarray(logits, np.float32))}
    return NativeExecutor(
        graph, weights, num_blocks=MAX_ROWS, max_num_seqs=MAX_ROWS, max_batched_tokens=MAX_ROWS, max_model_len=16,
        isa=isa, num_threads=num_threads,
    )  # fmt: skip


def step_of(rows: list[SampleRow]) -> Step:
    """Row i feeds token i, a sequence of its own."""
    count = np.arange(len(rows), dtype=np.int32)
    ones = np.ones_like(count)
    starts = np.arange(len(rows) + 1, dtype=np.int32)
    return Step(count, 0 * ones, starts, ones, count[:, None].copy(), count, tuple(rows))


VOCAB = 300
LOGITS = (3 * np.random.default_rng(1).standard_normal((VOCAB, VOCAB))).astype(np.float32)
LOGITS[:, 50:60] = LOGITS[:, :10]  # ties
LOGITS[3:6] = np.round(LOGITS[3:6])  # many of them

ids = st.lists(st.integers(0, VOCAB - 1), max_size=6).map(tuple)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 40, 1000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 1.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -2.0, 5.5]), max_size=4),
    logprobs=st.sampled_from([None, 0, 1, 5, 20]),
)
sample_rows = st.builds(
    SampleRow,
    params,
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 1000),
    ids,
    ids,
    ids.filter(lambda x: len(x) < 5),
)


@pytest.fixture(scope="module", params=available_isas())
def executor(request):
    made = executor_of(LOGITS, request.param)
    yield made
    made.close()


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(sample_rows, min_size=1, max_size=MAX_ROWS))
def test_equals_the_reference(executor, rows) -> None:
    got, expected = executor.execute(step_of(rows)), sample(LOGITS[: len(rows)], rows)
    np.testing.assert_array_equal(got.token_ids, expected.token_ids)
    np.testing.assert_array_equal(got.top_ids, expected.top_ids)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, rtol=3e-7, equal_nan=True)
    np.testing.assert_allclose(got.top_logprobs, expected.top_logprobs, rtol=3e-7, atol=1e-12, equal_nan=True)


def test_draws_as_often_as_probable(executor) -> None:
    counts = np.zeros(VOCAB)
    for begin in range(0, 4000, MAX_ROWS):
        rows = [SampleRow(SamplingParams(temperature=1.0), 11, begin + i) for i in range(MAX_ROWS)]
        got = executor.execute(step_of(rows)).token_ids
        np.testing.assert_array_equal(got, sample(LOGITS[:MAX_ROWS], rows).token_ids)
        counts[got[0]] += 1
    probabilities = np.exp(LOGITS[0] - LOGITS[0].max())
    assert counts.argmax() in np.argsort(-probabilities)[:5]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_refuses_logits_that_are_not_finite(bad) -> None:
    logits = LOGITS[:40, :40].copy()
    logits[1, 37] = bad
    executor = executor_of(logits)
    greedy = SampleRow(SamplingParams(temperature=0.0), 0, 0)
    assert executor.execute(step_of([greedy])).token_ids.tolist() == [logits[0].argmax()]
    with pytest.raises(ExecutorError, match="row 1"):
        executor.execute(step_of([greedy, greedy]))
    assert executor.execute(step_of([greedy])).token_ids.tolist() == [logits[0].argmax()]


def test_refuses_a_row_with_every_token_banned(executor) -> None:
    row = SampleRow(SamplingParams(temperature=0.0), 0, 0, banned_ids=tuple(range(VOCAB)))
    with pytest.raises(ExecutorError, match="banned"):
        executor.execute(step_of([row]))


@pytest.mark.parametrize("field", ["banned_ids", "prompt_ids", "output_ids"])
@pytest.mark.parametrize("token", [-1, VOCAB])
def test_refuses_tokens_outside_the_vocabulary(executor, field, token) -> None:
    row = SampleRow(SamplingParams(repetition_penalty=2.0), 0, 0, **{field: (token,)})
    with pytest.raises(ExecutorError, match=str(token)):
        executor.execute(step_of([row]))


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-12, 100.0])
@pytest.mark.parametrize("more", [{}, {"top_k": 2**31 - 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_extremes_equal_the_reference(executor, temperature, more) -> None:
    """Row 3 holds ties at its top, which even the smallest temperature leaves to chance."""
    bias = {0: -100.0, 7: 100.0, 8: 100.0}
    rows = [
        SampleRow(SamplingParams(temperature=temperature, logit_bias=b, repetition_penalty=r, **more), 5, i, ids, ids)
        for i, (b, r, ids) in enumerate([({}, 1.0, ()), (bias, 1e-3, (7, 9)), ({}, 100.0, (1, 2)), (bias, 1.0, ())])
    ]
    np.testing.assert_array_equal(executor.execute(step_of(rows)).token_ids, sample(LOGITS[:4], rows).token_ids)


def test_the_peak_is_subtracted_before_the_division() -> None:
    """The other order rounds 1 / 0.3 - 0.9999999 / 0.3 another way, and -1e38 / 1e-320 is no number."""
    logits = np.full((40, 40), -1e38, np.float32)
    logits[:, 11] = logits[:, 30] = 1e38
    rows = [SampleRow(SamplingParams(temperature=1e-320), 3, i) for i in range(12)]
    executor = executor_of(logits)
    got = executor.execute(step_of(rows)).token_ids
    assert set(got.tolist()) == {11, 30}
    np.testing.assert_array_equal(got, sample(logits[:12], rows).token_ids)
