"""The compressed-tensors package as the truth, bit for bit: we read what it writes, and it reads what we write."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter, FP8BlockDequantizer
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

from headrace.base.errors import ExecutorError
from headrace.formats.checkpoint import open_checkpoint
from headrace.formats.compressed_tensors_writer import write_compressed_tensors
from headrace.numerics.float8 import f32_to_e4m3
from headrace.numerics.quantize import quantize
from headrace.numerics.rounding import round_to
from headrace.numerics.schemes import WHOLE, Float8Scheme, IntegerScheme, Mxfp4Scheme, Nvfp4Scheme
from headrace.numerics.tensor import RawTensor
from tests.support.checkpoints import write_hf_folder
from tests.support.executors import EXECUTORS, executor_of
from tests.support.hf_models import make_model
from tests.support.quantized_parts import awq_parts
from tests.support.raw_tensors import part
from tests.support.stepping import Stepper

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def scheme(activations=None, **weights):
    quantized = None if activations is None else QuantizationArgs(dynamic=True, strategy="token", **activations)
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights), input_activations=quantized)


INT8_ACTIVATIONS = {"num_bits": 8}
FP8 = {"num_bits": 8, "type": "float"}
SCHEMES = {
    "int4_g32": scheme(num_bits=4, group_size=32),
    "int4_g16_zeros": scheme(num_bits=4, group_size=16, symmetric=False),
    "int4_rows": scheme(num_bits=4, strategy="channel"),
    "int4_rows_zeros": scheme(num_bits=4, strategy="channel", symmetric=False),
    "int8_g32": scheme(num_bits=8, group_size=32),
    "int8_g32_zeros": scheme(num_bits=8, group_size=32, symmetric=False),
    "w8a8_rows": scheme(INT8_ACTIVATIONS, num_bits=8, strategy="channel"),
    "w8a8_rows_zeros": scheme(INT8_ACTIVATIONS, num_bits=8, strategy="channel", symmetric=False),
    "w8a8_tensor": scheme(INT8_ACTIVATIONS, num_bits=8, strategy="tensor"),
    "fp8_tensor": scheme(FP8, **FP8, strategy="tensor"),
    "fp8_rows": scheme(FP8, **FP8, strategy="channel"),
    "fp8_blocks": scheme(FP8, **FP8, strategy="block", block_structure=[40, 48]),
    "fp8_alone": scheme(**FP8, strategy="channel"),
    "mxfp4": preset_name_to_scheme("MXFP4A16", ["Linear"]),
    "nvfp4": preset_name_to_scheme("NVFP4A16", ["Linear"]),
}


def compressed(schemes, folder, dtype=torch.bfloat16, ignore=("lm_head",)):
    """A tiny model with random scales and zero points, compressed and saved by the package."""
    model = make_model("llama").to(dtype)
    groups = {f"group_{i}": each for i, each in enumerate(schemes)}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=list(ignore)))
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            draw_scales(module, generator)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return model


def draw_scales(module, generator):
    """Scales and zero points of any kind, some of which clip; the package's own would hide a mistake in the order."""
    args = module.quantization_scheme.weights
    shape, peak = module.weight_scale.shape, module.weight.abs().max().item()
    if args.num_bits == 4 and args.type == "float":
        if args.group_size == 32:
            drawn = 2.0 ** torch.randint(-6, -2, shape, generator=generator)
        else:
            drawn = 30 + 300 * torch.rand(shape, generator=generator)
            module.weight_global_scale.data.fill_(300 * 6.1 / peak)
    else:
        steps = {("int", 4): 7, ("int", 8): 127}.get((args.type, args.num_bits), 448)
        drawn = peak / steps * (0.5 + torch.rand(shape, generator=generator))
    module.weight_scale.data.copy_(drawn)
    if not args.symmetric:
        half = 1 << (args.num_bits - 1)
        zeros = torch.randint(-half, half, module.weight_zero_point.shape, generator=generator)
        module.weight_zero_point.data.copy_(zeros)


def decompressed(module, widen):
    """The weight that the package makes of a compressed module; if widened, with its arithmetic in float32."""
    return decoded(dict(module.named_parameters(recurse=False)), module.quantization_scheme, widen)


def decoded(state, args, widen):
    """The weight that the package makes of a module's stored parts; if widened, with its arithmetic in float32."""
    compressor = BaseCompressor.get_value_from_registry(args.format)
    if widen and args.format in ("mxfp4-pack-quantized", "nvfp4-pack-quantized"):  # whose results it rounds to bf16
        rows, num_bytes = state["weight_packed"].shape
        return dequantize(
            x_q=unpack_fp4_from_uint8(state["weight_packed"], rows, 2 * num_bytes, dtype=torch.float32),
            scale=compressor._decompress_scale(state["weight_scale"], torch.float32),
            args=args.weights,
            global_scale=state.get("weight_global_scale"),
        )
    if widen:
        state = {**state, "weight_scale": state["weight_scale"].float()}
    return compressor.decompress(state, args)["weight"].detach()


def assert_same_bits(found, expected):
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_what_it_compresses(tmp_path, name, dtype):
    model = compressed([SCHEMES[name]], tmp_path, dtype)
    checkpoint = open_checkpoint(tmp_path)
    assert "quantization_config" not in checkpoint.config
    modules = {n: m for n, m in model.named_modules() if getattr(m, "quantization_scheme", None) is not None}
    assert len(modules) == 21
    for module_name, module in modules.items():
        tensor = checkpoint.tensors[f"{module_name}.weight"]
        found = tensor.to_f32()
        assert tensor.shape == (module.out_features, module.in_features)
        assert_same_bits(found, decompressed(module, widen=True).numpy())
        narrow = decompressed(module, widen=False)
        assert_same_bits(round_to(DTYPES[narrow.dtype], found), narrow.float().numpy())
    plain = model.get_parameter("model.embed_tokens.weight").detach().float().numpy()
    np.testing.assert_array_equal(checkpoint.tensors["model.embed_tokens.weight"].to_f32(), plain)
    assert not [n for n in checkpoint.tensors if not n.endswith("weight")], "parts are left over"


def test_schemes_may_differ_by_target(tmp_path):
    by_name = SCHEMES["int4_g32"].model_copy(update={"targets": ["model.layers.1.mlp.up_proj"]})
    by_expression = SCHEMES["int8_g32"].model_copy(update={"targets": [r"re:.*layers\.[12]\.mlp\.(up|down)_proj"]})
    by_class = SCHEMES["fp8_alone"]
    model = compressed([by_class, by_expression, by_name], tmp_path, ignore=["lm_head", "re:.*layers.0.self_attn.*"])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["format"] == "mixed-precision"
    tensors = open_checkpoint(tmp_path).tensors
    formats = {
        "model.layers.1.mlp.up_proj": "int4_g32_bf16",
        "model.layers.1.mlp.down_proj": "int8_g32_bf16",
        "model.layers.2.mlp.up_proj": "int8_g32_bf16",
        "model.layers.2.mlp.gate_proj": "fp8_g64_bf16",
        "model.layers.0.self_attn.q_proj": "bf16",
        "lm_head": "bf16",
    }
    for name, number_format in formats.items():
        assert tensors[f"{name}.weight"].format.name == number_format
    for name in ("model.layers.1.mlp.up_proj", "model.layers.2.mlp.gate_proj"):
        expected = decompressed(model.get_submodule(name), widen=False).float().numpy()
        assert_same_bits(round_to("bf16", tensors[f"{name}.weight"].to_f32()), expected)


@pytest.mark.parametrize("name", ["int4_g16_zeros", "w8a8_rows", "fp8_blocks", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("kind", EXECUTORS)
def test_logits(tmp_path, name, kind):
    """Those of transformers with the decompressed weights."""
    quantized = compressed([SCHEMES[name]], tmp_path, torch.float32)
    plain = make_model("llama")
    with torch.no_grad():
        for module_name, module in quantized.named_modules():
            if getattr(module, "quantization_scheme", None) is not None:
                plain.get_submodule(module_name).weight.copy_(decompressed(module, widen=True))
        tokens = np.random.default_rng(0).integers(0, 320, 20).tolist()
        expected = plain(torch.tensor([tokens])).logits[0].numpy()
    with executor_of(kind, tmp_path) as executor:
        found = Stepper(executor).logits({"a": tokens})["a"]
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_what_the_native_executor_does_not_take_is_refused_by_name(tmp_path):
    written(tmp_path / "out", {"": IntegerScheme(group_size=8)})
    named = r"layers\.0\.attn\.q\.weight: .*'int4_g8_bf16'"
    with pytest.raises(ExecutorError, match=named) as caught, executor_of("native", tmp_path / "out"):
        pass
    assert "weight_format='f32'" in caught.value.remedy


def test_a_quantized_embedding(tmp_path):
    """Written, decompressed, and read."""
    model = make_model("llama-tied")
    name, scheme_of = "model.embed_tokens.weight", IntegerScheme(bits=8, group_size=WHOLE, scale="f32")
    tensors = {key: RawTensor.from_f32(param.detach().numpy()) for key, param in model.named_parameters()}
    tensors[name] = RawTensor.from_groups(quantize(tensors[name].to_f32(), scheme_of))
    config = json.loads(model.config.to_json_string())
    write_compressed_tensors(tmp_path / "out", config, tensors, {name: scheme_of})
    with torch.no_grad():
        model.get_parameter(name).copy_(torch.from_numpy(tensors[name].to_f32()))
        expected = model(torch.arange(20)[None]).logits[0].numpy()
    for kind in EXECUTORS:
        with executor_of(kind, tmp_path / "out") as executor:
            found = Stepper(executor).logits({"a": list(range(20))})["a"]
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


WRITTEN = [
    IntegerScheme(group_size=32),
    IntegerScheme(group_size=16, clip="full", scale="f32"),
    IntegerScheme(group_size=32, symmetric=False, scale="f16"),
    IntegerScheme(group_size=WHOLE, symmetric=False),
    IntegerScheme(bits=8, group_size=WHOLE),
    IntegerScheme(bits=8, group_size=32, symmetric=False),
    Float8Scheme(block=(WHOLE, WHOLE)),
    Float8Scheme(block=(1, WHOLE), scale="bf16"),
    Float8Scheme(block=(40, 24)),
    Mxfp4Scheme(),
    Nvfp4Scheme(peak=0.75),
]


def written(folder, schemes, **options):
    """A tiny model with its linear layers quantized and written by us: config.json comes from transformers.

    Args:
        folder: where to.
        schemes: of the layers' modules by the last part of their names; "" for all others.
        options: of `write_compressed_tensors`.
    """
    model = make_model("llama")
    tensors, of = {}, {}
    for name, param in model.named_parameters():
        tensors[name] = RawTensor.from_f32(param.detach().numpy())
        if param.ndim == 2 and "layers" in name:
            of[name] = schemes.get(name.split(".")[-2], schemes[""])
            tensors[name] = RawTensor.from_groups(quantize(param.detach().numpy(), of[name]))
    write_compressed_tensors(folder, json.loads(model.config.to_json_string()), tensors, of, **options)
    return tensors


def assert_read_by_the_package(folder, tensors):
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    state = safetensors.torch.load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "proj" in name]:
        module = name.removesuffix(".weight")
        args = next(g for g in config.config_groups.values() if {"Linear", module} & set(g.targets))
        parts = {key.removeprefix(module + "."): value for key, value in state.items() if key.startswith(module + ".")}
        assert_same_bits(tensors[name].to_f32(), decoded(parts, args, widen=True).numpy())
        narrow = decoded(parts, args, widen=False)
        assert_same_bits(round_to(DTYPES[narrow.dtype], tensors[name].to_f32()), narrow.float().numpy())


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("quantized_by", WRITTEN, ids=str)
def test_what_we_write(tmp_path, quantized_by):
    """Decompressed by the package to our values, and loaded and run by transformers."""
    folder = tmp_path / "out"
    tensors = written(folder, {"": quantized_by})
    assert_read_by_the_package(folder, tensors)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=transformers.CompressedTensorsConfig(dequantize=True)
    )
    tokens = np.random.default_rng(0).integers(0, 320, 20).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].float().numpy()
    scale_type = getattr(quantized_by, "scale", "bf16")
    for name in [
        name for name in tensors if "proj" in name
    ]:  # which it rounds to the scale's type, 4-bit floats to bf16
        loaded = model.get_parameter(name).detach().float().numpy()
        assert_same_bits(loaded, round_to(scale_type, tensors[name].to_f32()))
    with executor_of("torch", folder) as executor:
        found = Stepper(executor).logits({"a": tokens})["a"]
    tolerance = 1e-4 if scale_type == "f32" else 2e-2
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def test_what_we_write_of_several_schemes(tmp_path):
    tensors = written(tmp_path / "out", {"": WRITTEN[0], "down_proj": WRITTEN[4], "o_proj": WRITTEN[6]})
    assert_read_by_the_package(tmp_path / "out", tensors)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_shards_as_transformers_reads_them(tmp_path):
    logits = []
    for name, max_bytes in (("whole", None), ("sharded", 20_000)):
        written(tmp_path / name, {"": WRITTEN[0]}, max_shard_bytes=max_bytes)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / name,
            dtype=torch.float32,
            quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
        )
        with torch.inference_mode():
            logits.append(model(torch.arange(20)[None]).logits[0].numpy())
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    np.testing.assert_array_equal(*logits)


def test_awq_as_its_converter_reads_it(tmp_path):
    """The package's converter from AutoAWQ, and then the package."""
    rows, features = 32, 128
    tensors, config = awq_parts(np.random.default_rng(0), rows, features, 32)
    folder = write_hf_folder(tmp_path, {"quantization_config": config}, {f"m.{k}": v for k, v in tensors.items()})
    found = open_checkpoint(folder).tensors["m.weight"]
    assert (found.format.name, found.shape) == ("uint4_g32_f16", (rows, features))
    converter = AutoAWQConverter.from_autoawq_config(config)
    state = converter.process(safetensors.torch.load_file(folder / "model.safetensors"))
    state = {name.removeprefix("m."): tensor for name, tensor in state.items()}
    state["weight_scale"] = state["weight_scale"].float()
    args = scheme(num_bits=4, group_size=32, symmetric=False)
    expected = BaseCompressor.get_value_from_registry("pack-quantized").decompress(state, args)["weight"]
    assert_same_bits(found.to_f32(), expected.numpy())


def test_fp8_blocks_as_its_converter_reads_them(tmp_path):
    rows, features = 200, 160
    rng = np.random.default_rng(1)
    tensors = {
        "m.weight": part("f8_e4m3", f32_to_e4m3(rng.normal(size=(rows, features)).astype(np.float32))),
        "m.weight_scale_inv": part("f32", rng.random((2, 2), np.float32)),
    }
    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    folder = write_hf_folder(tmp_path, {"quantization_config": config}, tensors)
    found = open_checkpoint(folder).tensors["m.weight"]
    assert (found.format.name, found.shape) == ("fp8_g32_f32", (rows, features))
    converter = FP8BlockDequantizer(targets=["m"], weight_block_size=(128, 128), dtype=torch.float32)
    expected = converter.process(safetensors.torch.load_file(folder / "model.safetensors"))["m.weight"]
    assert_same_bits(found.to_f32(), expected.numpy())
