"""Quantized Hugging Face folders: read as their makers mean them, refused by name where config and tensors differ."""

import json
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.base.errors import CheckpointError, HeadraceError, UnsupportedModelError
from headrace.formats.checkpoint import open_checkpoint
from headrace.numerics.float8 import f32_to_e4m3
from tests.support.checkpoints import write_hf_folder
from tests.support.quantized_parts import awq_parts, compressed_tensors_parts, gptq_parts, modelopt_parts
from tests.support.raw_tensors import part

MODULE = "model.layers.0.mlp.up_proj"
PLAIN = {"model.norm.weight": np.ones(4, np.float32), "model.embed_tokens.weight": np.ones((2, 4), np.float32)}


def write(folder, parts, config, companions=None, **extra):
    tensors = {**PLAIN, **{f"{MODULE}.{name}": tensor for name, tensor in parts.items()}, **extra}
    values = {"model_type": "llama"} | ({} if config is None else {"quantization_config": config})
    return write_hf_folder(folder, values, tensors, companions=companions)


def write_modelopt(folder, parts, config):
    return write(folder, parts, None, {"hf_quant_config.json": {"producer": {}, "quantization": config}})


def refused(folder, *named, kind=CheckpointError):
    with pytest.raises(kind) as caught:
        open_checkpoint(folder)
    for text in named:
        assert text in caught.value.cause, caught.value.cause
    assert caught.value.remedy
    return caught.value


def auto_round_parts():
    parts, config, values = gptq_parts()
    return parts, auto_round_config(config), values


def auto_round_config(config, **changes):
    """As AutoRound 0.16 says it of its own format."""
    return {
        "quant_method": "auto-round",
        "autoround_version": "0.16.1",
        "bits": config["bits"],
        "block_name_to_quantize": "model.layers",
        "data_type": "int",
        "enable_quanted_input": False,
        "group_size": config["group_size"],
        "iters": 200,
        "packing_format": "auto_round:auto_gptq",
        "sym": True,
        **changes,
    }


def assert_reads_as(folder, values, number_format):
    checkpoint = open_checkpoint(folder)
    assert sorted(checkpoint.tensors) == sorted([*PLAIN, f"{MODULE}.weight"])
    tensor = checkpoint.tensors[f"{MODULE}.weight"]
    assert (tensor.format.name, tensor.shape) == (number_format, values.shape)
    np.testing.assert_array_equal(tensor.to_f32().view(np.uint32), values.view(np.uint32))


class TestReading:
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("rows", [8, 11])  # 11: words of packed zero points that are not full
    def test_compressed_tensors(self, tmp_path, bits, symmetric, rows):
        parts, config, values = compressed_tensors_parts(rows, 64, bits, 32, symmetric)
        name = f"{'' if symmetric else 'u'}int{bits}_g32_bf16"
        assert_reads_as(write(tmp_path, parts, config), values, name)

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("version", [1, 2])
    @pytest.mark.parametrize("g_idx", [True, False])
    def test_gptq(self, tmp_path, bits, version, g_idx):
        parts, config, values = gptq_parts(bits=bits, version=version, g_idx=g_idx)
        assert_reads_as(write(tmp_path, parts, config), values, f"uint{bits}_g32_f16")

    def test_gptq_whose_version_stands_under_format(self, tmp_path):
        parts, config, values = gptq_parts(version=2)
        config["format"] = config.pop("checkpoint_format")
        assert_reads_as(write(tmp_path, parts, config), values, "uint4_g32_f16")

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize(
        ("packing", "version"), [("auto_round:auto_gptq", 1), ("auto_round", 2), ("auto_round:gptqmodel", 2)]
    )
    def test_auto_round(self, tmp_path, caplog, bits, packing, version):
        parts, config, values = gptq_parts(bits=bits, version=version, g_idx=False)
        folder = write(tmp_path, parts, auto_round_config(config, packing_format=packing))
        assert_reads_as(folder, values, f"uint{bits}_g32_f16")
        assert "without effect" not in caplog.text

    @pytest.mark.parametrize("zero_point", [True, False])  # AutoRound says false where zero points are all the same
    def test_awq_by_auto_round(self, tmp_path, zero_point):
        parts, config = awq_parts(np.random.default_rng(0))
        expected = open_checkpoint(write(tmp_path / "awq", parts, config)).tensors[f"{MODULE}.weight"].to_f32()
        config["zero_point"] = zero_point
        assert_reads_as(write(tmp_path / "auto_awq", parts, config), expected, "uint4_g32_f16")
        own = auto_round_config(config, packing_format="auto_round:auto_awq")
        assert_reads_as(write(tmp_path / "auto_round", parts, own), expected, "uint4_g32_f16")

    @pytest.mark.parametrize(
        ("algorithm", "name"),
        [("FP8", "fp8_g64_f32"), ("W4A16_AWQ", "int4_g32_f32"), ("NVFP4", "nvfp4"), ("W4A16_NVFP4", "nvfp4")],
    )
    def test_modelopt(self, tmp_path, algorithm, name):
        parts, config, values = modelopt_parts(algorithm)
        assert_reads_as(write_modelopt(tmp_path, parts, config), values, name)

    def test_modelopt_in_config_json_alone(self, tmp_path):
        parts, _, values = modelopt_parts("FP8")
        stated = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": []}
        assert_reads_as(write(tmp_path, parts, stated), values, "fp8_g64_f32")

    def test_whole_rows(self, tmp_path):
        parts, config, values = gptq_parts(group_size=64)
        assert_reads_as(write(tmp_path, parts, {**config, "group_size": -1}), values, "uint4_g64_f16")

    def test_nothing_is_read_before_it_is_used(self, tmp_path, monkeypatch):
        parts, config, _ = compressed_tensors_parts()
        folder = write(tmp_path, parts, config)
        monkeypatch.setattr("headrace.formats.weight_parts.codes_in", lambda *_: pytest.fail("codes were unpacked"))
        checkpoint = open_checkpoint(folder)
        assert checkpoint.tensors[f"{MODULE}.weight"].num_bytes == 8 * 2 * 18

    def test_a_bias_stays(self, tmp_path):
        parts, config, _ = compressed_tensors_parts()
        parts["bias"] = part("f32", np.ones(8, np.float32))
        checkpoint = open_checkpoint(write(tmp_path, parts, config))
        assert (checkpoint.tensors[f"{MODULE}.bias"].to_f32() == 1).all()

    def test_e8m0_block_scales(self, tmp_path):
        parts = {
            "weight": part("f8_e4m3", f32_to_e4m3(np.full((4, 8), 1.5, np.float32))),
            "weight_scale_inv": part("f8_e8m0", np.array([[128]], np.uint8)),
        }
        config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        assert_reads_as(write(tmp_path, parts, config), np.full((4, 8), 3, np.float32), "fp8_g8_f32")


class TestLies:
    """A config that says other than the tensors is an error that names module, part and scheme."""

    @pytest.fixture
    def lie(self, tmp_path):
        """Change parts and weights' scheme of a sound int4 folder, then give the error of opening it."""

        def lie(*named, kind=CheckpointError, drop=(), ignore=(), extra=None, scheme=None, group=None, **weights):
            parts, config, _ = compressed_tensors_parts(symmetric=False)
            for name in drop:
                del parts[name]
            target = config["config_groups"]["group_0"]
            target["weights"].update(weights)
            target.update(group or {})
            config.update({"ignore": list(ignore)} | (scheme or {}))
            return refused(write(tmp_path, parts | (extra or {}), config), *named, kind=kind)

        return lie

    def test_another_group_size(self, lie):
        lie(f"{MODULE}.weight_scale has shape [8, 2], not [8, 1]", "groups of 64", group_size=64)

    def test_groups_that_do_not_divide(self, lie):
        lie(MODULE, "rows of 64, no multiple of its groups of 48", group_size=48)

    def test_another_width(self, lie):
        lie(f"{MODULE}.weight_packed has shape [8, 8], not [8, 16]", num_bits=8)

    @pytest.mark.parametrize("name", ["weight_scale", "weight_packed", "weight_shape", "weight_zero_point"])
    def test_a_part_is_missing(self, lie, name):
        lie(f"{MODULE} (group_0: pack-quantized, asymmetric int4, groups of 32) lacks its {name}", drop=[name])

    def test_a_part_of_another_type(self, lie):
        lie(f"{MODULE}.weight_scale is stored as i8", extra={"weight_scale": part("i8", np.ones((8, 2), np.int8))})

    @pytest.mark.parametrize("shape", [[8, 63], [7, 64], [0, 64], [-8, 64]])
    def test_a_shape_that_is_not_that_of_the_codes(self, lie, shape):
        error = lie(MODULE, extra={"weight_shape": part("i64", np.array(shape, np.int64))})
        assert "weight_shape is" in error.cause or "no multiple" in error.cause

    @pytest.mark.parametrize("pattern", ["re:.*up_prj", "model.layers.1.mlp.up_proj", "up_proj", "Linear"])
    def test_an_ignore_pattern_that_matches_nothing(self, lie, pattern):
        lie(repr(pattern), "matches no module", ignore=["re:.*norm", pattern])

    def test_a_pattern_may_name_a_parent_or_a_tied_head(self, tmp_path):
        parts, config, values = compressed_tensors_parts()
        config["ignore"] = ["model.layers.0.mlp", "lm_head", "re:.*embed_tokens"]
        assert_reads_as(write(tmp_path, parts, config), values, "int4_g32_bf16")

    @pytest.mark.parametrize("pattern", [MODULE, "re:.*up_proj", "re:model"])
    def test_an_ignored_module_that_is_quantized(self, lie, pattern):
        lie(f"{MODULE} is stored quantized", repr(pattern), ignore=[pattern])

    def test_an_expression_that_is_none(self, lie):
        lie("'re:(' is no regular expression", ignore=["re:("])

    def test_a_module_that_is_no_target(self, lie):
        lie(f"{MODULE} is stored quantized, but is no target", group={"targets": ["model.layers.1.mlp.up_proj"]})
        lie("'LlamaMLP' of group_0", "class", kind=UnsupportedModelError, group={"targets": ["LlamaMLP"]})

    def test_zero_points_where_there_should_be_none(self, tmp_path, lie):
        lie(f"{MODULE}.weight_zero_point is not zero", symmetric=True)
        parts, config, values = compressed_tensors_parts()
        parts["weight_zero_point"] = part("i8", np.zeros((8, 2), np.int8))
        assert_reads_as(write(tmp_path, parts, config), values, "int4_g32_bf16")

    def test_a_named_target_that_is_plain_or_not_there(self, lie):
        for other in ("model.embed_tokens", "model.layers.9.mlp.up_proj"):
            lie(f"{other}, a target of group_0: pack", "not stored quantized", group={"targets": [MODULE, other]})

    def test_a_group_without_modules(self, lie):
        more = {"targets": ["re:.*down_proj"], "weights": {"num_bits": 8, "strategy": "channel"}}
        _, config, _ = compressed_tensors_parts()
        groups = config["config_groups"] | {"group_1": {**more, "format": "pack-quantized"}}
        lie(
            "is a target of group_1: pack-quantized, int8", scheme={"config_groups": groups}, drop=["weight_zero_point"]
        )

    @pytest.mark.parametrize(
        ("named", "changes"),
        [
            ("Format 'marlin-24'", {"scheme": {"format": "marlin-24"}}),
            ("Strategy 'attn_head'", {"strategy": "attn_head"}),
            ("num_bits = 3", {"num_bits": 3}),
            ("strategy 'tensor'", {"strategy": "tensor"}),
            ("actorder = 'group'", {"actorder": "group"}),
            ("dynamic = True", {"dynamic": True}),
            ("quantization_status = 'frozen'", {"scheme": {"quantization_status": "frozen"}}),
            ("transform_config", {"scheme": {"transform_config": {"config_groups": {"a": 1}}}}),
            ("sparse-24-bitmask", {"scheme": {"sparsity_config": {"format": "sparse-24-bitmask"}}}),
            ("rounding", {"rounding": "stochastic"}),
            ("weight_g_idx", {"extra": {"weight_g_idx": part("i32", np.zeros(64, np.int32))}}),
            ("quant_method 'bitsandbytes'", {"scheme": {"quant_method": "bitsandbytes"}}),
        ],
    )
    def test_what_is_not_read_is_refused_by_name(self, lie, named, changes):
        if named in ("num_bits = 3", "strategy 'tensor'"):  # known words in a combination that is not
            lie(MODULE, "a scheme that is not read", kind=UnsupportedModelError, **changes)
        else:
            lie(named, kind=UnsupportedModelError, **changes)

    @pytest.mark.parametrize(
        "changes",
        [{"group_size": 0}, {"group_size": -2}, {"group_size": 1.5}, {"group_size": "32"}, {"symmetric": "no"},
         {"group": {"targets": [3]}}, {"group": {"targets": "Linear"}}, {"scheme": {"config_groups": []}},
         {"scheme": {"ignore": "lm_head"}}, {"strategy": "block", "block_structure": [128]}, {"strategy": "block"},
         {"group_size": None}, {"group_size": -1}],
    )  # fmt: skip
    def test_nonsense(self, lie, changes):
        lie("must be", **changes)

    @pytest.mark.parametrize(("strategy", "stored"), [("channel", (1,)), ("tensor", (8, 1)), ("channel", (8,))])
    def test_one_scale_or_many(self, tmp_path, strategy, stored):
        weights = {"num_bits": 8, "type": "int", "strategy": strategy}
        group = {"targets": ["Linear"], "format": "int-quantized", "weights": weights}
        config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
        parts = {
            "weight": part("i8", np.ones((8, 64), np.int8)),
            "weight_scale": part("f32", np.ones(stored, np.float32)),
        }
        refused(write(tmp_path, parts, config), f"{MODULE}.weight_scale has shape {list(stored)}", strategy)

    def test_a_row_of_odd_nibbles(self, tmp_path):
        parts, config, _ = compressed_tensors_parts(8, 63, 4, 63)
        config["config_groups"]["group_0"]["weights"].update(strategy="channel", group_size=None)
        refused(write(tmp_path, parts, config), MODULE, "63 4-bit codes", kind=UnsupportedModelError)

    def test_no_scheme_at_all(self, tmp_path):
        parts, _, _ = compressed_tensors_parts()
        refused(write(tmp_path, parts, None), "weight_packed", "nothing that says how")

    def test_a_scheme_of_nothing(self, tmp_path):
        refused(write(tmp_path, {"weight": np.ones((8, 64), np.float32)}, {"quant_method": "awq", "bits": 4}), "awq")

    def test_an_fp8_weight_without_its_scale(self, tmp_path):
        weight = part("f8_e4m3", np.zeros((8, 64), np.uint8))
        config = {"quant_method": "fp8", "weight_block_size": [4, 32]}
        refused(write(tmp_path, {"weight": weight}, config), f"{MODULE} (fp8 in blocks of 4 by 32) lacks")
        scale = part("f32", np.ones((2, 3), np.float32))
        folder = write(tmp_path, {"weight": weight, "weight_scale_inv": scale}, config)
        refused(folder, f"{MODULE}.weight_scale_inv has shape [2, 3], not [2, 2]")

    def test_modules_that_were_not_to_be_converted(self, tmp_path):
        parts, config = awq_parts(np.random.default_rng(0))
        for pattern, named in (("visual", "'visual' of modules_to_not_convert"), ("mlp", f"{MODULE} is stored")):
            refused(write(tmp_path, parts, {**config, "modules_to_not_convert": [pattern]}), named)
        open_checkpoint(write(tmp_path, parts, {**config, "modules_to_not_convert": ["embed_tokens"]}))

    def test_modules_that_were_excluded(self, tmp_path):
        parts, config, _ = modelopt_parts("FP8")
        for pattern, named in (("model.vision*", "'model.vision*' of exclude_modules"), ("model.layers.0*", MODULE)):
            refused(write_modelopt(tmp_path, parts, {**config, "exclude_modules": [pattern]}), named)
        open_checkpoint(write_modelopt(tmp_path, parts, {**config, "exclude_modules": ["lm_head", "model.norm*"]}))


class TestGptqLies:
    def test_activation_order(self, tmp_path):
        parts, config, _ = gptq_parts()
        parts["g_idx"] = part("i32", np.random.default_rng(0).permutation(np.arange(64) // 32).astype(np.int32))
        refused(write(tmp_path, parts, config), f"{MODULE}.g_idx", "desc_act", kind=UnsupportedModelError)

    def test_activation_order_without_its_order(self, tmp_path):
        parts, config, values = gptq_parts()
        assert_reads_as(write(tmp_path, parts, {**config, "desc_act": True}), values, "uint4_g32_f16")
        del parts["g_idx"]
        refused(write(tmp_path, parts, {**config, "desc_act": True}), f"{MODULE} (GPTQ v1", "lacks its g_idx")

    @pytest.mark.parametrize(
        ("key", "value"),
        [("bits", 3), ("checkpoint_format", "marlin"), ("pack_dtype", "int16"), ("dynamic", {"-:.*": {}})],
    )
    def test_what_is_not_read(self, tmp_path, key, value):
        parts, config, _ = gptq_parts()
        refused(write(tmp_path, parts, {**config, key: value}), key, kind=UnsupportedModelError)

    def test_another_group_size(self, tmp_path):
        parts, config, _ = gptq_parts()
        refused(write(tmp_path, parts, {**config, "group_size": 64}), f"{MODULE}.scales has shape [2, 8], not [1, 8]")

    def test_a_zero_that_version_1_cannot_hold(self, tmp_path):
        parts, config, _ = gptq_parts()
        parts["qzeros"] = part("i32", np.full((2, 1), -1, np.int32))
        tensor = open_checkpoint(write(tmp_path, parts, config)).tensors[f"{MODULE}.weight"]
        with pytest.raises(CheckpointError, match=r"qzeros holds 15; in GPTQ v1.* 16 or 0"):
            tensor.to_f32()


class TestAutoRoundLies:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("packing_format", "auto_round:llm_compressor"),
            ("data_type", "mx_fp"),
            ("bits", 2),
            ("extra_config", {MODULE: {"bits": 8}}),
            ("extra_config", {MODULE: {"group_size": 64}}),
        ],
    )
    def test_what_is_not_read(self, tmp_path, key, value):
        parts, config, _ = gptq_parts(g_idx=False)
        changed = auto_round_config(config, **{key: value})
        refused(write(tmp_path, parts, changed), key, kind=UnsupportedModelError)

    def test_modules_that_were_left(self, tmp_path):
        parts, config, values = gptq_parts(g_idx=False)
        left = auto_round_config(config, extra_config={"lm_head": {"bits": 16, "data_type": "float"}})
        assert_reads_as(write(tmp_path, parts, left), values, "uint4_g32_f16")


@pytest.mark.parametrize("algorithm", ["INT8", "MIXED_PRECISION", None])
def test_modelopt_algorithms_that_are_not_read(tmp_path, algorithm):
    parts, config, _ = modelopt_parts("FP8")
    folder = write_modelopt(tmp_path, parts, {**config, "quant_algo": algorithm})
    with pytest.raises((UnsupportedModelError, CheckpointError), match="quant_algo"):
        open_checkpoint(folder)


@pytest.mark.parametrize("algorithm", ["W4A16_AWQ", "NVFP4"])
def test_inputs_that_are_scaled_first(tmp_path, caplog, algorithm):
    """ModelOpt's AWQ: multiplied into the columns, which f32 alone can hold, and said so."""
    parts, config, values = modelopt_parts(algorithm)
    factors = np.random.default_rng(0).random(64, np.float32)
    parts["pre_quant_scale"] = part("f32", factors)
    assert_reads_as(write_modelopt(tmp_path, parts, config), values * factors, "f32")
    assert f"{MODULE} is read as f32" in caplog.text
    parts["pre_quant_scale"] = part("f32", factors[:63])
    refused(write_modelopt(tmp_path, parts, config), f"{MODULE}.pre_quant_scale has shape [63], not [64]")


def test_a_plain_folder_with_another_tools_file(tmp_path):
    """ModelOpt's own file goes before its copy in config.json, and after any other scheme."""
    parts, config, values = compressed_tensors_parts()
    companions = {"hf_quant_config.json": {"quantization": {"quant_algo": "FP8"}}}
    assert_reads_as(write(tmp_path, parts, config, companions), values, "int4_g32_bf16")
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == config


MAKERS = {
    "auto-round": auto_round_parts,
    "compressed-tensors": compressed_tensors_parts,
    "gptq": gptq_parts,
    "modelopt": lambda: modelopt_parts("NVFP4"),
    "awq": lambda: (*awq_parts(np.random.default_rng(0)), None),
}
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 200), st.floats(), st.text(max_size=5),
              st.sampled_from(["re:.*", "Linear", "group", "channel", "tensor", "float", "int-quantized"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=4,
)  # fmt: skip


def places(value, path=()):
    """Where something stands in nested objects and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in items for found in ((*path, key), *places(inner, (*path, key)))]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(method=st.sampled_from(sorted(MAKERS)), data=st.data())
def test_whatever_a_config_says_opening_ends(tmp_path, method, data):
    """With weights of the right shape, or with an error for users."""
    parts, config, _ = MAKERS[method]()
    *way, last = data.draw(st.sampled_from(places(config)))
    inner = config
    for key in way:
        inner = inner[key]
    inner[last] = data.draw(JSON)
    if (part_name := data.draw(st.sampled_from([None, *parts]))) is not None:
        parts[part_name] = part(
            "i32", np.zeros(data.draw(st.sampled_from([(), (2,), (8, 64), (0, 8), (2, 2, 2)])), np.int32)
        )
    folder = write_modelopt(tmp_path, parts, config) if method == "modelopt" else write(tmp_path, parts, config)
    with suppress(HeadraceError):
        for tensor in open_checkpoint(folder).tensors.values():
            assert tensor.to_f32().shape == tensor.shape
    (folder / "hf_quant_config.json").unlink(missing_ok=True)
