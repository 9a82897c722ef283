"""Weights exchanged under a living executor: what runs afterwards is what an executor made with them would run."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest

from headrace.base.errors import ExecutorError
from headrace.executors.native import NativeExecutor
from headrace.executors.torch_executor import TorchExecutor
from headrace.graph.passes import fuse
from headrace.numerics.tensor import RawTensor
from tests.support.stepping import Stepper
from tests.support.tiny_llama import random_weights, tiny_llama

GRAPH = fuse(tiny_llama())
FORMATS = ("f32", "bf16", "q4_1", "q8_0", "int4_g32_bf16", "uint8_g64_f16")
IDS = list(range(1, 30))
EXECUTORS = {"native": NativeExecutor, "torch": TorchExecutor}


def made(kind, weights):
    return closing(EXECUTORS[kind](GRAPH, weights, num_blocks=16))


def logits_of(executor):
    return Stepper(executor).logits({"a": IDS})["a"]


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("form", [*FORMATS, FORMATS])
def test_a_swap_brings_the_new_weights_and_a_second_one_the_old(kind, form):
    old, new = (random_weights(GRAPH, (form,) if isinstance(form, str) else form, seed) for seed in (0, 1))
    with made(kind, new) as fresh:
        expected = logits_of(fresh)
    with made(kind, old) as executor:
        before = logits_of(executor)
        staged = executor.stage_weights(new)
        np.testing.assert_array_equal(logits_of(executor), before, err_msg="staging changes nothing")
        for wanted in (expected, before, expected):
            executor.swap_weights(staged)
            np.testing.assert_array_equal(logits_of(executor), wanted)
    assert not np.array_equal(before, expected)


def test_interleaved_heads_are_put_in_order():
    weights = dict(random_weights(GRAPH, ("q8_0",)))
    ordered = weights["layers.0.q.weight"]
    rows = np.arange(ordered.shape[0]).reshape(4, 2, -1).swapaxes(1, 2).reshape(-1)
    with made("native", weights) as executor:
        before = logits_of(executor)
        weights["layers.0.q.weight"] = RawTensor(ordered.format, ordered.shape, ordered.data[rows], 4)
        executor.swap_weights(executor.stage_weights(weights))
        np.testing.assert_array_equal(logits_of(executor), before)


def test_staging_beside_steps_disturbs_none():
    old, new = (random_weights(GRAPH, FORMATS, seed) for seed in (0, 1))
    with made("native", old) as executor, ThreadPoolExecutor(1) as helper:
        before = logits_of(executor)
        staging = helper.submit(lambda: [executor.stage_weights(new) for _ in range(20)])
        while not staging.done():
            np.testing.assert_array_equal(logits_of(executor), before)
        staging.result()


def test_weights_that_do_not_fit_are_named_and_change_nothing():
    weights = random_weights(GRAPH, ("q8_0",))
    other_format = {**weights, "layers.1.up.weight": random_weights(GRAPH, ("bf16",))["layers.1.up.weight"]}
    name = "layers.1.mlp_norm.weight"
    other_shape = {**weights, name: RawTensor.from_f32(np.ones(63, np.float32))}
    with made("native", weights) as executor:
        before = logits_of(executor)
        for wrong, named in ((other_format, "layers.1.up.weight"), (other_shape, name)):
            with pytest.raises(ExecutorError, match=named):
                executor.stage_weights(wrong)
        np.testing.assert_array_equal(logits_of(executor), before)
