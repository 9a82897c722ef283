"""Reading AWQ checkpoints of AutoAWQ's GEMM version.

Source: https://github.com/casper-hansen/AutoAWQ (``awq/modules/linear/gemm.py``) and compressed-tensors' converter
from it. Per module: ``qweight`` i32 ``[in, out / 8]``, ``qzeros`` i32 ``[groups, out / 8]``, both packed along the
outputs in the order below; ``scales`` ``[groups, out]``. A value is (code - zero) * scale.
"""

from collections.abc import Mapping

import numpy as np

from headrace.formats.module_patterns import check_ignored, matches_components
from headrace.formats.quantization_config import AUTO_ROUND, group_size, texts
from headrace.formats.quantized_module import FLOATS, Parts, QuantizedModule, stored_quantized, transcoded
from headrace.formats.weight_parts import codes_in, integer_layout
from headrace.models.config import Config
from headrace.numerics.bitfields import Bytes
from headrace.numerics.row_blocks import Groups
from headrace.numerics.tensor import RawTensor

PARTS = ("qweight", "qzeros", "scales")

_NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word, lowest nibble first, its eight consecutive outputs are."""


def read_awq(config: Config, modules: Mapping[str, Parts]) -> dict[str, RawTensor]:
    """The weights of all modules that are stored quantized, by module, not yet read.

    Raises:
        CheckpointError: config and tensors contradict each other; names module, part and scheme.
        UnsupportedModelError: the config asks for something that is not read; names it.
    """
    config.require("bits", 4)
    config.require("version", "gemm", "GEMM")
    config.require("zero_point", True, False)  # either way zero points are stored: AutoRound says false of equal ones
    size = group_size(config)
    config.skip(
        "quant_method", "backend", "do_fuse", "fuse_max_seq_len", "exllama_config", "modules_to_fuse", *AUTO_ROUND
    )
    scheme = f"AWQ, 4 bits, {f'groups of {size}' if size else 'whole rows'}"
    quantized = stored_quantized(modules, PARTS)
    spared = texts(config, "modules_to_not_convert")
    config.warn_unread()
    check_ignored(f"modules_to_not_convert in {config.where}", spared, matches_components, modules, quantized)
    return {name: _weight(QuantizedModule(name, parts, scheme), size) for name, parts in quantized.items()}


def _weight(module: QuantizedModule, group_size: int | None) -> RawTensor:
    packed = module.matrix("qweight", "i32")
    features, words = packed.shape
    rows = 8 * words
    size = module.group_size_of(features, group_size)
    scales = module.shaped("scales", (features // size, rows), *FLOATS)
    zeros = module.shaped("qzeros", (features // size, words), "i32")
    layout = integer_layout(module, 4, False, size, scales.format.name)

    def read() -> Groups:
        codes = np.ascontiguousarray(_by_output(packed.data).T)
        return Groups(layout, codes, scales.to_f32().T, _by_output(zeros.data).T)

    return transcoded(layout, (rows, features), read)


def _by_output(packed: Bytes) -> Bytes:
    nibbles = codes_in(packed, 4).reshape(len(packed), -1, 8)
    return nibbles[..., _NIBBLE_OF_OUTPUT].reshape(len(packed), -1)
