"""Continuations of one beginning get what each text alone gets, however many share a step."""

from contextlib import closing

import numpy as np
import pytest

from headrace.align.branches import Branches, branch_logprobs
from headrace.align.forced import forced_logprobs
from headrace.base.errors import ContextLengthError
from headrace.executors.native import NativeExecutor
from headrace.executors.torch_executor import TorchExecutor
from headrace.graph.passes import fuse
from tests.support.tiny_llama import VOCAB, random_weights, tiny_llama

EXECUTORS = {"torch": TorchExecutor, "native": NativeExecutor}


class Counting:
    """An executor that counts what it is given."""

    def __init__(self, executor):
        self._executor = executor
        self.tokens = []

    def __getattr__(self, name):
        return getattr(self._executor, name)

    def execute(self, step):
        self.tokens.append(len(step.token_ids))
        return self._executor.execute(step)


@pytest.fixture(params=EXECUTORS)
def executor(request):
    graph = fuse(tiny_llama())
    with closing(EXECUTORS[request.param](graph, random_weights(graph), num_blocks=8, kv_format="bf16")) as made:
        yield made


def drawn(lengths):
    """Beginnings of some length, with continuations of some lengths each."""
    draw = np.random.default_rng(0)
    return [
        Branches(
            tuple(draw.integers(0, VOCAB, shared).tolist()),
            tuple(tuple(draw.integers(0, VOCAB, end).tolist()) for end in ends),
        )
        for shared, ends in lengths
    ]


def test_each_end_gets_what_its_text_alone_gets(executor):
    asked = drawn([(1, (1, 5, 2)), (16, (1, 1)), (17, (20, 3, 30, 1)), (40, (24, 24)), (5, (2,)), (31, (1, 2, 3))])
    found = list(branch_logprobs(executor, asked, rows_per_step=100))
    for each, ends in zip(asked, found, strict=True):
        for end, logprobs in zip(each.ends, ends, strict=True):
            alone = forced_logprobs(executor, [*each.shared, *end])[len(each.shared) - 1 :]
            tolerance = 1e-5 if isinstance(executor, TorchExecutor) else 0  # the native one is deterministic
            np.testing.assert_allclose(logprobs, alone, atol=tolerance, rtol=0)


def test_a_beginning_is_computed_once_and_steps_are_shared(executor):
    counting = Counting(executor)
    asked = drawn([(20, (2, 2, 3))] * 3)
    assert len(list(branch_logprobs(counting, asked, rows_per_step=128))) == 3
    assert counting.tokens == [3 * 21, 3 * 2, 3 * 3]
    counting.tokens.clear()
    list(branch_logprobs(counting, asked, rows_per_step=50))
    assert counting.tokens == [2 * 21, 2 * 2, 2 * 3, 21, 2, 3], "two at a time fit 50 rows"
    counting.tokens.clear()
    list(branch_logprobs(counting, drawn([(17, (1,))] * 5), rows_per_step=128))
    assert counting.tokens == [4 * 17, 17], "four of two blocks fit a pool of eight"


def test_what_is_too_long_is_named(executor):
    for rows, room in ((1000, 128), (100, 100)):
        with pytest.raises(ContextLengthError, match=f"132 tokens do not fit the {room}"):
            list(branch_logprobs(executor, drawn([(130, (1, 2))]), rows_per_step=rows))
