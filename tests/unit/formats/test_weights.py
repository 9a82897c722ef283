"""Parameters from stored tensors: found, shaped, transformed exactly in every number format."""

import numpy as np
import pytest

from headrace.base.errors import CheckpointError, UnsupportedModelError
from headrace.formats.checkpoint import Checkpoint, open_checkpoint
from headrace.formats.weights import load_weights
from headrace.graph.ir import Param
from headrace.models.sources import Source, Transform
from headrace.numerics.formats import FORMATS
from headrace.numerics.tensor import RawTensor
from tests.support.checkpoints import write_tiny_gguf
from tests.support.raw_tensors import part, quantized, random_tensor


def checkpoint_of(tmp_path, **tensors):
    raw = {name: t if isinstance(t, RawTensor) else RawTensor.from_f32(t) for name, t in tensors.items()}
    return Checkpoint("gguf", tmp_path / "m.gguf", {}, raw)


def load(checkpoint, shapes, sources, ignorable=()):
    params = {name: Param(name, shape) for name, shape in shapes.items()}
    return load_weights(checkpoint, params, sources, ignorable)


def test_matrices_stay_views_of_the_file(tmp_path):
    stored = random_tensor("q4_1", (4, 64))
    checkpoint = open_checkpoint(write_tiny_gguf(tmp_path / "m.gguf", tensors={"w": stored}))
    weights = load(checkpoint, {"p": (4, 64)}, {"p": Source("w")})
    assert dict(weights) == {"p": weights["p"]}
    assert weights["p"].format.name == "q4_1"
    assert np.shares_memory(weights["p"].data, checkpoint.tensors["w"].data)
    assert weights.unused == ()


@pytest.mark.parametrize("format_name", ["f32", "f16", "bf16", "q8_0"])
def test_vectors_become_f32(tmp_path, format_name):
    stored = quantized(np.linspace(-1, 1, 32), format_name)
    weights = load(checkpoint_of(tmp_path, w=stored), {"p": (32,)}, {"p": Source("w")})
    assert weights["p"].format.name == "f32"
    assert weights["p"].shape == (32,)
    np.testing.assert_array_equal(weights["p"].to_f32(), stored.to_f32())


@pytest.mark.parametrize("format_name", ["f32", "bf16"])
def test_add_one(tmp_path, format_name):
    stored = quantized(np.array([0.5, -0.25, 1e-3]), format_name)
    weights = load(checkpoint_of(tmp_path, w=stored), {"p": (3,)}, {"p": Source("w", Transform.ADD_ONE)})
    np.testing.assert_array_equal(weights["p"].to_f32(), 1 + stored.to_f32())


def interleaved(values, num_heads):
    """What llama.cpp's converter does to the rows of q and k (`LlamaModel.permute` in convert_hf_to_gguf.py)."""
    halves = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


@pytest.mark.parametrize("num_heads", [1, 3])
def test_uninterleave_rope_undoes_the_converter(tmp_path, num_heads):
    values = np.random.default_rng(0).normal(size=(num_heads * 8, 32)).astype(np.float32)
    source = Source("w", Transform.UNINTERLEAVE_ROPE, num_heads)
    for array in (values, np.ascontiguousarray(values[:, 0])):  # a matrix, and a bias
        weights = load(checkpoint_of(tmp_path, w=interleaved(array, num_heads)), {"p": array.shape}, {"p": source})
        np.testing.assert_array_equal(weights["p"].to_f32(), array)


@pytest.mark.parametrize("format_name", FORMATS)
def test_uninterleave_rope_moves_rows_of_any_format_as_they_are(tmp_path, format_name):
    stored = random_tensor(format_name, (16, 256))
    source = Source("w", Transform.UNINTERLEAVE_ROPE, 2)
    moved = load(checkpoint_of(tmp_path, w=stored), {"p": (16, 256)}, {"p": source})["p"]
    order = [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert moved.format == stored.format
    np.testing.assert_array_equal(moved.data, stored.data[order])
    assert moved.data.flags.c_contiguous


def test_one_stored_tensor_may_be_two_parameters(tmp_path):
    checkpoint = checkpoint_of(tmp_path, embedding=np.ones((2, 4), np.float32))
    weights = load(
        checkpoint, {"embed": (2, 4), "output": (2, 4)}, {"embed": Source("embedding"), "output": Source("embedding")}
    )
    assert np.shares_memory(weights["embed"].data, weights["output"].data)
    assert weights.unused == ()


def test_all_missing_tensors_are_named_at_once(tmp_path):
    sources = {"a": Source("blk.a"), "b": Source("blk.b"), "c": Source("blk.c")}
    checkpoint = checkpoint_of(tmp_path, **{"blk.b": np.ones(2, np.float32)})
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors .*: blk\.a, blk\.c\."):
        load(checkpoint, dict.fromkeys("abc", (2,)), sources)


@pytest.mark.parametrize("shape", [(3, 2), (2, 4), (6,), (2, 3, 1)])
def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path, shape):
    checkpoint = checkpoint_of(tmp_path, w=np.ones(shape, np.float32))
    with pytest.raises(CheckpointError) as caught:
        load(checkpoint, {"layers.0.mlp.up": (2, 3)}, {"layers.0.mlp.up": Source("w")})
    for named in ("'w'", str(list(shape)), "[2, 3]", "layers.0.mlp.up"):
        assert named in caught.value.cause


@pytest.mark.parametrize("format_name", ["f8_e4m3", "i8"])
def test_codes_without_their_scale_are_no_weights(tmp_path, format_name):
    """As a plain fp8 cast of a model has them: read as numbers, they might even look right."""
    checkpoint = checkpoint_of(tmp_path, w=part(format_name, np.ones((2, 4), np.uint8)))
    with pytest.raises(
        UnsupportedModelError, match=f"'w' is stored as {format_name}, part of a quantized weight"
    ) as caught:
        load(checkpoint, {"p": (2, 4)}, {"p": Source("w")})
    assert "quantization_config" in caught.value.remedy


def test_leftover_tensors_are_unused_unless_ignorable(tmp_path):
    one = np.ones(1, np.float32)
    checkpoint = checkpoint_of(tmp_path, w=one, **{"rope_freqs.weight": one, "blk.0.extra": one, "blk.1.rot": one})
    weights = load(checkpoint, {"p": (1,)}, {"p": Source("w")}, ("rope_freqs.weight", "blk.*.rot"))
    assert weights.unused == ("blk.0.extra",)
