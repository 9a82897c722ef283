"""Packing groups into the blocks of 32 that GGUF files hold: what `legacy_quants` decodes.

q8_0 has a scale and 32 bytes; q4_0 and q4_1 have nibbles, that of value i low and that of value i + 16 high, and q4_1 a
minimum behind its scale.
"""

import numpy as np

from headrace.numerics.bitfields import Bytes
from headrace.numerics.formats import FORMATS
from headrace.numerics.rounding import f32_to_f16
from headrace.numerics.row_blocks import MINIMA, Groups, RowBlocks
from headrace.numerics.tensor import RawTensor

_NAMES = {RowBlocks("int8", 32, "f16"): "q8_0", RowBlocks("int4", 32, "f16"): "q4_0", MINIMA: "q4_1"}


def gguf_format(layout: RowBlocks) -> str | None:
    """The GGUF format that holds groups of a layout bit for bit; None: none does."""
    return _NAMES.get(layout)


def gguf_tensor(groups: Groups) -> RawTensor:
    """A quantized matrix in GGUF's blocks: the same values. Its layout must be one that `gguf_format` names."""
    number_format = FORMATS[_NAMES[groups.layout]]
    fields = [_halves(groups.scales)]
    if groups.minima is not None:
        fields.append(_halves(groups.minima))
    codes = groups.codes.reshape(-1, 32)
    fields.append(codes if groups.layout.bits == 8 else codes[:, :16] | (codes[:, 16:] << np.uint8(4)))
    blocks = np.concatenate(fields, axis=1)
    return RawTensor(number_format, groups.codes.shape, blocks.reshape(len(groups.codes), -1))


def _halves(values: np.ndarray) -> Bytes:
    return f32_to_f16(values.reshape(-1, 1)).astype("<u2").view(np.uint8)
