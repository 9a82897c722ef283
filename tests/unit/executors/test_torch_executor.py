"""The reference executor on a small graph: paging, ragged batches, taps, precision, and what is refused."""

import importlib
import sys

import numpy as np
import pytest

from headrace.base.errors import ExecutorError, InvalidRequestError, MissingDependencyError
from headrace.executors.kv_layout import kv_bytes_per_block, kv_bytes_per_value
from headrace.executors.torch_executor import TorchExecutor
from headrace.graph.builder import GraphBuilder
from headrace.graph.ir import Graph, KVLayer, RopeTable
from headrace.numerics.kv_formats import KV_FORMATS
from headrace.numerics.tensor import RawTensor
from tests.support.stepping import Stepper

VOCAB, HIDDEN, BLOCK_SIZE = 40, 16, 4
TOKENS = np.random.default_rng(1).integers(0, VOCAB, 30).tolist()


def small_graph() -> Graph:
    """Two layers of attention alone, the second with a window; logits tied to the embedding."""
    g = GraphBuilder()
    x = g.embed("embed", VOCAB, HIDDEN)
    for i, window in enumerate((0, 5)):
        h = g.rms_norm(f"layers.{i}.attn_norm", x, eps=1e-5)
        q = g.linear(f"layers.{i}.attn.q", h, 16)
        k, v = (g.linear(f"layers.{i}.attn.{part}", h, 8) for part in "kv")
        table = RopeTable((1.0, 0.1))
        q = g.rope(f"layers.{i}.attn.q_rope", q, head_dim=4, table=table)
        k = g.rope(f"layers.{i}.attn.k_rope", k, head_dim=4, table=table)
        shape = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
        y = g.attention(f"layers.{i}.attn.core", q, k, v, layer=i, scale=0.5, window=window, **shape)
        x = g.add(f"layers.{i}.attn_add", x, y)
    return g.build(g.linear("logits", g.select_rows("sampled", x), VOCAB, weight="embed.weight"))


def weights_of(graph: Graph) -> dict[str, RawTensor]:
    generator = np.random.default_rng(2)
    return {
        name: RawTensor.from_f32(generator.normal(size=param.shape).astype(np.float32) / 2)
        for name, param in graph.params.items()
    }


def executor(**options) -> TorchExecutor:
    graph = small_graph()
    return TorchExecutor(graph, weights_of(graph), **{"num_blocks": 40, "block_size": BLOCK_SIZE, **options})


def logits_at_once(**options) -> np.ndarray:
    return Stepper(executor(**options)).logits({"a": TOKENS})["a"]


def test_says_what_it_is() -> None:
    made = executor()
    assert (made.block_size, made.num_blocks, made.vocab_size) == (BLOCK_SIZE, 40, VOCAB)


@pytest.mark.parametrize("chunk", [1, 3, 4, 7])
def test_chunks_give_what_one_step_gives(chunk: int) -> None:
    stepper = Stepper(executor())
    chunks = [stepper.logits({"a": TOKENS[i : i + chunk]})["a"] for i in range(0, len(TOKENS), chunk)]
    np.testing.assert_allclose(np.concatenate(chunks), logits_at_once(), atol=1e-5)


def test_company_does_not_matter() -> None:
    stepper = Stepper(executor())
    stepper.logits({"b": TOKENS[:3], "a": TOKENS[:11]})
    together = stepper.logits({"c": TOKENS[5:9], "a": TOKENS[11:], "b": TOKENS[3:4]})
    np.testing.assert_allclose(together["a"], logits_at_once()[11:], atol=1e-5)


def test_a_shared_prefix_is_read_where_another_wrote_it() -> None:
    stepper = Stepper(executor())
    stepper.logits({"a": TOKENS[:10]})
    stepper.tables["b"], stepper.lengths["b"] = stepper.tables["a"][:2], 2 * BLOCK_SIZE
    found = stepper.logits({"b": TOKENS[8:]})["b"]
    np.testing.assert_allclose(found, logits_at_once()[8:], atol=1e-5)


def test_samples_the_asked_rows_alone() -> None:
    stepper = Stepper(executor())
    made = stepper.run({"a": TOKENS[:9], "b": TOKENS[4:6]}, sampled=1, taps=("logits",))
    assert made.taps["logits"].shape == (2, VOCAB)
    assert made.token_ids.tolist() == made.taps["logits"].argmax(axis=1).tolist()


def test_a_step_that_samples_nothing() -> None:
    made = Stepper(executor()).run({"a": TOKENS[:9]}, sampled=0)
    assert made.token_ids.shape == (0,)


def test_any_node_can_be_tapped() -> None:
    graph = small_graph()
    names = tuple(node.name for node in graph.nodes)
    made = Stepper(executor()).run({"a": TOKENS[:9]}, sampled=2, taps=names)
    assert set(made.taps) == set(names)
    for node in graph.nodes:
        assert made.taps[node.name].shape == (9 if node.rows == "tokens" else 2, node.features)
        assert made.taps[node.name].dtype == np.float32
    embeddings = weights_of(graph)["embed.weight"].to_f32()
    np.testing.assert_array_equal(made.taps["embed"], embeddings[TOKENS[:9]])


def test_an_unknown_tap_is_named() -> None:
    with pytest.raises(ExecutorError, match=r"layers\.9"):
        Stepper(executor()).run({"a": TOKENS[:2]}, taps=("layers.9",))


def test_a_failed_step_leaves_the_pool_usable() -> None:
    stepper = Stepper(executor())
    first = stepper.logits({"a": TOKENS[:9]})["a"]
    with pytest.raises(AssertionError, match="vocabulary"):
        stepper.run({"b": [VOCAB]})
    second = stepper.logits({"a": TOKENS[9:]})["a"]
    np.testing.assert_allclose(np.concatenate([first, second]), logits_at_once(), atol=1e-5)


def test_precisions() -> None:
    exact = logits_at_once(dtype="float64")
    scale = np.abs(exact).max()
    errors = {
        name: np.abs(logits_at_once(**options) - exact).max() / scale
        for name, options in {
            "f32": {},
            "bf16 kv": {"kv_format": "bf16"},
            "fp8 kv": {"kv_format": "fp8"},
            "int8 kv": {"kv_format": "int8"},
            "int4 kv": {"kv_format": "int4"},
            "bf16": {"dtype": "bfloat16"},
        }.items()
    }
    assert errors["f32"] < 1e-5 < errors["bf16 kv"] < 1e-2
    assert errors["bf16 kv"] < errors["bf16"] < 1e-1
    assert errors["bf16 kv"] < errors["int8 kv"] < errors["fp8 kv"] < errors["int4 kv"] < 0.3


@pytest.mark.parametrize("options", [{"kv_format": "int3"}, {"dtype": "float3"}])
def test_an_unknown_precision_is_named(options: dict[str, str]) -> None:
    with pytest.raises(InvalidRequestError, match="3"):
        executor(**options)


@pytest.mark.parametrize("device", ["abacus", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there_is_named(device: str) -> None:
    with pytest.raises(InvalidRequestError, match=device):
        executor(device=device)


def test_close_twice() -> None:
    made = executor()
    made.close()
    made.close()


def test_kv_bytes() -> None:
    layers = [KVLayer(num_kv_heads=2, head_dim=4), KVLayer(num_kv_heads=1, head_dim=6)]
    assert kv_bytes_per_block(layers, block_size=16, kv_format="f32") == 2 * (8 + 6) * 16 * 4
    assert kv_bytes_per_block(layers, block_size=16, kv_format="bf16") == 2 * (8 + 6) * 16 * 2
    assert kv_bytes_per_block(layers, block_size=16, kv_format="int8") == 2 * (8 + 6 + (2 + 1) * 4) * 16
    assert kv_bytes_per_block(layers, block_size=16, kv_format="fp8") == 2 * (8 + 6 + (2 + 1) * 4) * 16
    assert kv_bytes_per_block(layers, block_size=16, kv_format="int4") == 2 * (4 + 3 + (2 + 1) * 4) * 16
    wide = [KVLayer(num_kv_heads=3, head_dim=80)]
    assert kv_bytes_per_block(wide, block_size=16, kv_format="int4") == 2 * 3 * (40 + 3 * 4) * 16, "three groups"
    odd = [KVLayer(num_kv_heads=1, head_dim=7)]
    assert kv_bytes_per_block(odd, block_size=3, kv_format="fp8") == 2 * 3 * (7 + 4) + 2, "scales stay aligned"
    assert kv_bytes_per_block(odd, block_size=3, kv_format="bf16") == 2 * 4 * 8 * 2
    assert kv_bytes_per_block(odd, block_size=3, kv_format="int8") == 2 * (4 * 8 + 3 * 4), "in pairs"
    assert kv_bytes_per_block(odd, block_size=3, kv_format="int4") == 2 * (4 * 8 // 2 + 3 * 4)
    assert kv_bytes_per_value(layers, "bf16") == 2
    assert kv_bytes_per_value(layers, "int8") == 1 + 4 * 3 / 14
    assert kv_bytes_per_value(wide, "int4") == 0.5 + 4 * 3 / 80


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_the_pool_takes_the_planned_bytes(kv_format: str) -> None:
    caches = executor(kv_format=kv_format)._kv
    held = sum(part.nbytes for cache in caches for part in (cache.keys, cache.values, cache.scales) if part is not None)
    assert held == 40 * kv_bytes_per_block(small_graph().kv_layers, BLOCK_SIZE, kv_format)


def test_without_torch_the_remedy_is_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "headrace.executors.torch_executor")
    with pytest.raises(MissingDependencyError) as raised:
        importlib.import_module("headrace.executors.torch_executor")
    assert raised.value.remedy == "pip install headrace[torch]"
