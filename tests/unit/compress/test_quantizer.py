"""The pass over a whole, tiny model."""

from dataclasses import replace

import numpy as np
import pytest

from headrace.base.errors import CheckpointError, InvalidRequestError, StorageError
from headrace.compress.gate import Evaluator, Thresholds
from headrace.compress.quantizer import quantize_weights
from headrace.compress.recipe import Recipe
from headrace.compress.store import Store
from headrace.models.decoder import build_graph
from headrace.models.spec import LayerSpec, ModelSpec
from headrace.numerics.quantize import quantize
from headrace.numerics.schemes import Nvfp4Scheme, scheme_named
from headrace.numerics.tensor import RawTensor
from tests.support.tiny_llama import ROPE, VOCAB, random_weights

SPEC = ModelSpec(
    family="llama", vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_heads=4, num_kv_heads=2, head_dim=16,
    layers=(LayerSpec(rope=ROPE), LayerSpec(rope=ROPE, window=9)), norm_eps=1e-5, max_position_embeddings=64,
    attention_scale=0.25, tie_embeddings=False,
)  # fmt: skip
GRAPH = build_graph(SPEC)
WEIGHTS = random_weights(GRAPH)
PARTS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
IDS = np.random.default_rng(0).integers(0, VOCAB, (6, 24))


@pytest.mark.parametrize("name", ["int4-g32", "int4-g64-asym", "int8-channel", "fp8-tensor", "fp8-block", "mxfp4"])
def test_rounding_to_nearest_is_the_rule(name):
    done = quantize_weights(GRAPH, WEIGHTS, Recipe(format=name), IDS)
    assert len(done.schemes) == 14, "seven matrices a layer; not the logits"
    for param, tensor in done.weights.items():
        if param in done.schemes:
            expected = RawTensor.from_groups(quantize(WEIGHTS[param].to_f32(), scheme_named(name)))
            np.testing.assert_array_equal(tensor.data, expected.data)
        else:
            assert tensor is WEIGHTS[param]


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_nvfp4_has_one_divisor_for_what_reads_the_same(method):
    done = quantize_weights(GRAPH, WEIGHTS, Recipe(format="nvfp4", method=method), IDS)
    peaks = {name: scheme.peak for name, scheme in done.schemes.items()}
    for layer in (0, 1):
        of = {part: peaks[f"layers.{layer}.{part}.weight"] for part in PARTS}
        assert of["attn.q"] == of["attn.k"] == of["attn.v"]
        assert of["mlp.gate"] == of["mlp.up"]
        assert len(set(of.values())) == 4
    if method == "rtn":
        q, k, v = (np.abs(WEIGHTS[f"layers.0.attn.{part}.weight"].to_f32()).max() for part in "qkv")
        assert peaks["layers.0.attn.q.weight"] == max(q, k, v)
        name = "layers.0.mlp.down.weight"
        expected = quantize(WEIGHTS[name].to_f32(), Nvfp4Scheme())
        np.testing.assert_array_equal(done.weights[name].to_f32(), expected.to_f32())


def kl_of(done):
    return Evaluator(GRAPH, WEIGHTS, IDS.tolist()).compare(done.weights).divergence.kl_mean


def test_calibrated_methods_beat_rounding_to_nearest():
    methods = ("rtn", "gptq", "awq+gptq")
    found = {method: kl_of(quantize_weights(GRAPH, WEIGHTS, Recipe(method=method), IDS)) for method in methods}
    assert max(found["gptq"], found["awq+gptq"]) < 0.8 * found["rtn"]


def test_awq_leaves_the_model_what_it_computes_but_for_rounding():
    """With sixteen times the levels it is nearly the source's again, as near as without factors."""
    done, plain = (
        quantize_weights(GRAPH, WEIGHTS, Recipe(format="int8-g32", method=method), IDS) for method in ("awq", "rtn")
    )
    moved = [name for name in GRAPH.params if name.endswith("norm.weight") and done.weights[name] is not WEIGHTS[name]]
    assert moved, "a norm has taken factors"
    assert kl_of(done) < 2 * kl_of(plain) < 0.01


@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_moving_scale_alone_changes_nothing(method):
    done = quantize_weights(GRAPH, WEIGHTS, Recipe(method=method), IDS)
    moved = dict(WEIGHTS)
    assert len(done.moved) == 4, "two norms a layer"
    for each in done.moved:
        assert not np.allclose(each.factors, 1)
        moved |= each.apply(WEIGHTS)
    evaluator = Evaluator(GRAPH, WEIGHTS, IDS.tolist())
    assert evaluator.compare(moved).divergence.kl_mean < 1e-6 < evaluator.compare(done.weights).divergence.kl_mean


def test_scale_does_not_move_into_a_table_that_embeds_too():
    """What embeds would see the factors; the last norm, which only such a matrix reads, keeps its weights."""
    graph = build_graph(replace(SPEC, tie_embeddings=True))
    weights = random_weights(graph)
    (table,) = graph.logits_params
    done = quantize_weights(graph, weights, Recipe(method="awq", logits="int8-channel"), IDS)
    assert table in done.schemes
    assert all(table not in each.matrices for each in done.moved)
    assert len(done.moved) == 4, "two norms a layer"
    expected = quantize(weights[table].to_f32(), done.schemes[table])
    np.testing.assert_array_equal(done.weights[table].to_f32(), expected.to_f32())


def test_later_matrices_are_fitted_to_what_earlier_ones_became():
    """GPTQ of the last matrix alone differs from that in a model whose other matrices are rounded too."""
    everything = quantize_weights(GRAPH, WEIGHTS, Recipe(method="gptq"), IDS)
    alone = quantize_weights(GRAPH, WEIGHTS, Recipe(method="gptq", ignore=("layers.0.*", "*.attn.*", "*.[gu]*")), IDS)
    (name,) = alone.schemes
    assert not np.array_equal(everything.weights[name].data, alone.weights[name].data)


def test_the_logits_matrix_on_demand():
    done = quantize_weights(GRAPH, WEIGHTS, Recipe(logits="int8-channel"), IDS)
    assert done.weights["logits.weight"].format.name == "int8_g64_bf16"


@pytest.mark.parametrize("wrong", [
    {"ignore": ("layers.7.*",)}, {"format": "int4-g48"}, {"format": "int5-g32"}, {"method": "magic"},
    {"ignore": ("*",)}, {"format": "fp8-block", "method": "gptq"}, {"format": "mxfp4", "method": "awq+gptq"},
    {"logits": "int4-g96"},
])  # fmt: skip
def test_recipes_that_do_not_fit_say_why(wrong):
    with pytest.raises(InvalidRequestError):
        quantize_weights(GRAPH, WEIGHTS, Recipe(**wrong), IDS)


def test_damaged_weights_are_named():
    values = np.array(WEIGHTS["layers.1.mlp.up.weight"].to_f32())
    values[3, 5] = np.nan
    broken = {**WEIGHTS, "layers.1.mlp.up.weight": RawTensor.from_f32(values)}
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up\.weight"):
        quantize_weights(GRAPH, broken, Recipe(), IDS)


def test_a_run_that_was_stopped_goes_on_and_ends_the_same(tmp_path):
    recipe, run = Recipe(method="gptq"), {"model": 1}
    whole = quantize_weights(GRAPH, WEIGHTS, recipe, IDS)

    def stop(name):
        if name == "layers.1.attn.q.weight":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_weights(GRAPH, WEIGHTS, recipe, IDS, store=Store(tmp_path / "work", run), progress=stop)
    store = Store(tmp_path / "work", run)
    assert store.num_kept == 8
    damaged = tmp_path / "work" / "layers.0.mlp.up.weight.npy"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    resumed = quantize_weights(GRAPH, WEIGHTS, recipe, IDS, store=store)
    for name in whole.schemes:
        np.testing.assert_array_equal(resumed.weights[name].data, whole.weights[name].data)
    assert [r.error for r in resumed.rounded] == [r.error for r in whole.rounded]
    assert Store(tmp_path / "work", {"model": 2}).num_kept == 0, "another run's"


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    store = Store(tmp_path / "work", {})

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headrace.compress.store.np.save", full)
    with pytest.raises(StorageError, match="No space left"):
        quantize_weights(GRAPH, WEIGHTS, Recipe(), IDS, store=store)
    assert not list((tmp_path / "work").glob("layers.*"))


def test_thresholds():
    found = Evaluator(GRAPH, WEIGHTS, IDS.tolist()).compare(quantize_weights(GRAPH, WEIGHTS, Recipe(), IDS).weights)
    divergence = found.divergence
    assert sum(each.count for each in found.by_rarity) == sum(each.count for each in found.by_position) == 6 * 23
    assert not Thresholds(kl=None, flips=None, perplexity=None).exceeded(divergence)
    assert not Thresholds(kl=divergence.kl_mean, flips=1.0, perplexity=9e9).exceeded(divergence)
    (said,) = Thresholds(kl=divergence.kl_mean / 2, flips=1.0, perplexity=9e9).exceeded(divergence)
    assert said.startswith("mean KL")
