from contextlib import closing

import numpy as np
import pytest

from headrace._native import available_isas
from headrace.align.forced import forced_logits
from headrace.align.native_scoring import scoring_executor
from headrace.base.errors import ContextLengthError, InvalidRequestError
from headrace.executors.native import NativeExecutor
from headrace.executors.torch_executor import TorchExecutor
from headrace.graph.passes import fuse
from tests.support.stepping import Stepper
from tests.support.tiny_llama import VOCAB, random_weights, tiny_llama

IDS = np.random.default_rng(0).integers(0, VOCAB, 100).tolist()
EXECUTORS = {"torch": TorchExecutor, "native": NativeExecutor}


@pytest.fixture(params=EXECUTORS)
def executor(request):
    graph = fuse(tiny_llama())
    with closing(EXECUTORS[request.param](graph, random_weights(graph), num_blocks=8, kv_format="f32")) as made:
        yield made


def test_chunks_give_what_one_token_at_a_time_gives(executor):
    found = forced_logits(executor, "logits", IDS, rows_per_step=48)
    stepper = Stepper(executor)
    expected = np.concatenate([stepper.logits({"a": [token]})["a"] for token in IDS])
    np.testing.assert_allclose(found, expected, atol=1e-4 if isinstance(executor, TorchExecutor) else 0, rtol=0)
    assert found.shape == (100, VOCAB)


def test_nothing_is_kept_between_calls(executor):
    first = forced_logits(executor, "logits", IDS)
    forced_logits(executor, "logits", IDS[::-1])
    np.testing.assert_array_equal(forced_logits(executor, "logits", IDS), first)


def test_scoring_follows_the_environment_as_an_engine_does(monkeypatch):
    graph = fuse(tiny_llama())
    monkeypatch.setenv("HEADRACE_ISA", "portable")
    monkeypatch.setenv("HEADRACE_THREADS", "3")
    with closing(scoring_executor(graph, random_weights(graph), 8)) as executor:
        assert (executor.isa, executor.num_threads) == ("portable", 3)
    best = available_isas()[-1]
    with closing(scoring_executor(graph, random_weights(graph), 8, isa=best)) as executor:
        assert executor.isa == best


def test_bad_tokens_are_named_before_anything_runs(executor):
    for ids, error in (([], InvalidRequestError), ([1, VOCAB], InvalidRequestError), ([-1], InvalidRequestError)):
        with pytest.raises(error):
            forced_logits(executor, "logits", ids)
    with pytest.raises(ContextLengthError, match="128"):
        forced_logits(executor, "logits", [0] * 129)
