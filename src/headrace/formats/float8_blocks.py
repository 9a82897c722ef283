"""Reading Hugging Face's ``fp8`` checkpoints: DeepSeek-V3's and Qwen3's e4m3 in blocks.

Source: https://github.com/deepseek-ai/DeepSeek-V3 (``README_WEIGHTS.md``, ``inference/fp8_cast_bf16.py``). Per module:
``weight`` f8_e4m3 and ``weight_scale_inv``, which is, despite its name, the factor of each block.
"""

from collections.abc import Mapping

from headrace.formats.module_patterns import check_ignored, matches_components
from headrace.formats.quantization_config import texts
from headrace.formats.quantized_module import Parts, QuantizedModule, stored_quantized
from headrace.formats.weight_parts import float8
from headrace.models.config import Config
from headrace.numerics.tensor import RawTensor

PARTS = ("weight", "weight_scale_inv", "activation_scale", "input_scale")


def read_float8_blocks(config: Config, modules: Mapping[str, Parts]) -> dict[str, RawTensor]:
    """The weights of all modules that are stored quantized, by module, not yet read.

    Raises:
        CheckpointError: config and tensors contradict each other; names module, part and scheme.
        UnsupportedModelError: the config asks for something that is not read; names it.
    """
    config.require("fmt", "e4m3", "float8_e4m3fn")
    rows, columns = _block(config)
    scheme = f"fp8 in blocks of {rows} by {columns}" if rows else "fp8 with one scale per tensor"
    quantized = stored_quantized(modules, PARTS)
    spared = texts(config, "modules_to_not_convert")
    config.skip("quant_method", "activation_scheme", "scale_fmt", "dequantize")
    config.warn_unread()
    check_ignored(f"modules_to_not_convert in {config.where}", spared, matches_components, modules, quantized)
    return {
        name: float8(QuantizedModule(name, parts, scheme), "weight_scale_inv", (rows, columns))
        for name, parts in quantized.items()
    }


def _block(config: Config) -> tuple[int | None, int | None]:
    if not config.has("weight_block_size"):
        return None, None
    rows, columns = config.numbers("weight_block_size", 2)
    if min(rows, columns) < 1 or rows != int(rows) or columns != int(columns):
        raise config.wrong("weight_block_size", "rows and columns", [rows, columns])
    return int(rows), int(columns)
