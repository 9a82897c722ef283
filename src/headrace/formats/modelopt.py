"""Reading what NVIDIA's Model Optimizer exports for Hugging Face: ``hf_quant_config.json`` beside the weights.

Source: https://github.com/NVIDIA/TensorRT-Model-Optimizer (0.47: ``modelopt/torch/export/quant_utils.py``). FP8: as
``weight`` f8_e4m3 and one ``weight_scale``. NVFP4: ``weight`` u8, ``weight_scale`` f8_e4m3 and ``weight_scale_2``, a
factor. W4A16_AWQ: ``weight`` u8 ``[out / 2, in]``, two's complement nibbles of two outputs to a byte, the even one low,
``weight_scale`` ``[out, groups]``, and where no layer before could take it, ``pre_quant_scale`` ``[in]``, by which the
module multiplies its input.
"""

import logging
from collections.abc import Mapping

import numpy as np

from headrace.formats.module_patterns import check_ignored, matches_wildcard
from headrace.formats.quantization_config import group_size, texts
from headrace.formats.quantized_module import FLOATS, Parts, QuantizedModule, stored_quantized, transcoded
from headrace.formats.weight_parts import float8, integer_layout, nvfp4
from headrace.models.config import Config
from headrace.numerics.formats import FORMATS
from headrace.numerics.row_blocks import Groups
from headrace.numerics.tensor import RawTensor

log = logging.getLogger(__name__)

CONFIG_FILE = "hf_quant_config.json"
PARTS = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
_ALGORITHMS = ("FP8", "NVFP4", "W4A16_NVFP4", "W4A16_AWQ")


def read_modelopt(config: Config, modules: Mapping[str, Parts]) -> dict[str, RawTensor]:
    """The weights of all modules that are stored quantized, by module, not yet read.

    Args:
        config: the ``quantization`` of ``hf_quant_config.json``.
        modules: all that is stored.

    Raises:
        CheckpointError: config and tensors contradict each other; names module, part and scheme.
        UnsupportedModelError: the config asks for something that is not read; names it.
    """
    config.require("quant_algo", *_ALGORITHMS)
    algorithm = config.text("quant_algo")
    if config.has("kv_cache_quant_algo"):
        log.warning("%s: kv_cache_quant_algo is without effect: see kv_format.", config.where)
    quantized = stored_quantized(modules, PARTS)
    key = "exclude_modules" if config.has("exclude_modules") else "ignore"
    check_ignored(f"{key} in {config.where}", texts(config, key), matches_wildcard, modules, quantized)
    size = group_size(config)
    return {
        name: _weight(QuantizedModule(name, parts, f"ModelOpt's {algorithm}"), algorithm, size)
        for name, parts in quantized.items()
    }


def _weight(module: QuantizedModule, algorithm: str, group_size: int | None) -> RawTensor:
    match algorithm:
        case "FP8":
            weight = float8(module, "weight_scale", (None, None))
        case "W4A16_AWQ":
            weight = _int4(module, group_size)
        case _:
            weight = nvfp4(module, "weight", "weight_scale_2", divides=False)
    return _with_scaled_inputs(module, weight) if "pre_quant_scale" in module.parts else weight


def _with_scaled_inputs(module: QuantizedModule, weight: RawTensor) -> RawTensor:
    """The weight with its columns multiplied by what multiplies the inputs: no scheme of groups can hold that."""
    factors = module.shaped("pre_quant_scale", weight.shape[1:], *FLOATS)
    log.warning("%s is read as f32, since its inputs are scaled (pre_quant_scale): it takes more memory.", module.name)
    return RawTensor(FORMATS["f32"], weight.shape, lambda: (weight.to_f32() * factors.to_f32()).view(np.uint8))


def _int4(module: QuantizedModule, group_size: int | None) -> RawTensor:
    packed = module.matrix("weight", "u8")
    half_rows, features = packed.shape
    rows = 2 * half_rows
    size = module.group_size_of(features, group_size)
    scales = module.shaped("weight_scale", (rows, features // size), *FLOATS)
    layout = integer_layout(module, 4, True, size, scales.format.name)

    def read() -> Groups:
        stored = packed.data
        both = np.stack([stored & np.uint8(15), stored >> np.uint8(4)], axis=1).reshape(rows, features)
        return Groups(layout, both ^ np.uint8(8), scales.to_f32())  # two's complement to offset binary

    return transcoded(layout, (rows, features), read)
