"""Reading GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

Source: https://github.com/ModelCloud/GPTQModel (``nn_modules/qlinear``, ``utils/model.py``). Per module: ``qweight``
i32 ``[in * bits / 32, out]``, packed along the inputs, lowest first; ``qzeros`` i32 ``[groups, out * bits / 32]``,
packed along the outputs; ``scales`` ``[groups, out]``; ``g_idx`` i32 ``[in]``, the group of each input. A value is
(code - zero) * scale. Version 1 ("gptq") stores zero - 1, version 2 ("gptq_v2") the zero itself.
"""

from collections.abc import Mapping

import numpy as np

from headrace.base.errors import CheckpointError, UnsupportedModelError
from headrace.formats.quantization_config import AUTO_ROUND, group_size
from headrace.formats.quantized_module import FLOATS, Parts, QuantizedModule, stored_quantized, transcoded
from headrace.formats.weight_parts import codes_in, integer_layout, transposed_words
from headrace.models.config import Config
from headrace.numerics.bitfields import Bytes
from headrace.numerics.row_blocks import Groups
from headrace.numerics.tensor import RawTensor

PARTS = ("qweight", "qzeros", "scales", "g_idx")

_WITHOUT_EFFECT = (
    "quant_method", "method", "format", "damp_percent", "damp_auto_increment", "true_sequential", "static_groups",
    "lm_head", "model_name_or_path", "model_file_base_name", "is_marlin_format", "quantizer", "meta", "dataset",
    "tokenizer", "modules_in_block_to_quantize", "batch_size", "cache_block_outputs", "use_cuda_fp16", "use_exllama",
    "max_input_length", "exllama_config", "backend", "module_name_preceding_first_block", "model_seqlen",
    "pad_token_id", *AUTO_ROUND,
)  # fmt: skip
"""How the model was quantized, or how others shall run it. Zero points are stored whether ``sym`` or not."""


def read_gptq(config: Config, modules: Mapping[str, Parts]) -> dict[str, RawTensor]:
    """The weights of all modules that are stored quantized, by module, not yet read.

    Raises:
        CheckpointError: config and tensors contradict each other; names module, part and scheme.
        UnsupportedModelError: the config asks for something that is not read; names it.
    """
    config.require("bits", 4, 8)
    bits, size, ordered = config.positive("bits"), group_size(config), config.boolean("desc_act", False)
    stated = "checkpoint_format" if config.has("checkpoint_format") else "format"  # GPTQModel says both
    config.require(stated, "gptq", "gptq_v2")
    version = 2 if config.text(stated, "gptq") == "gptq_v2" else 1
    config.require("pack_dtype", "int32")
    if "dynamic" in config.unread():
        raise UnsupportedModelError(
            f"dynamic in {config.where} (schemes that differ by module) is not read.", "Use one scheme throughout."
        )
    config.skip(*_WITHOUT_EFFECT)
    config.warn_unread()
    scheme = f"GPTQ v{version}, {bits} bits, {f'groups of {size}' if size else 'whole rows'}"
    return {
        name: _weight(QuantizedModule(name, parts, scheme), bits, size, version, ordered)
        for name, parts in stored_quantized(modules, PARTS).items()
    }


def _weight(module: QuantizedModule, bits: int, group_size: int | None, version: int, ordered: bool) -> RawTensor:
    packed = module.matrix("qweight", "i32")
    words, rows = packed.shape
    features = words * 32 // bits
    size = module.group_size_of(features, group_size)
    scales = module.shaped("scales", (features // size, rows), *FLOATS)
    zeros = module.shaped("qzeros", (features // size, -(-rows * bits // 32)), "i32")
    layout = integer_layout(module, bits, False, size, scales.format.name)
    if ordered or "g_idx" in module.parts:
        _check_groups(module, features, size)

    def read() -> Groups:
        by_output = _zeros(module, codes_in(zeros.data, bits)[:, :rows], bits, version)
        return Groups(layout, codes_in(transposed_words(packed), bits), scales.to_f32().T, by_output.T)

    return transcoded(layout, (rows, features), read)


def _zeros(module: QuantizedModule, stored: Bytes, bits: int, version: int) -> Bytes:
    if version == 2:
        return stored
    if (stored == (1 << bits) - 1).any():
        raise CheckpointError(
            f"{module.name}.qzeros holds {(1 << bits) - 1}; in {module.scheme} that may mean {1 << bits} or 0.",
            "Save the model in version 2 (checkpoint_format gptq_v2), which has no such case.",
        )
    return stored + np.uint8(1)


def _check_groups(module: QuantizedModule, features: int, group_size: int) -> None:
    groups = module.shaped("g_idx", (features,), "i32").data.view("<i4").reshape(-1)
    if not np.array_equal(groups, np.arange(features) // group_size):
        raise UnsupportedModelError(
            f"{module.name}.g_idx: groups that are no runs of inputs (desc_act) are not read.",
            "Use a version of the model that was quantized with desc_act=False.",
        )
