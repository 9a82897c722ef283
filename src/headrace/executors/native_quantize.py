"""Rounding to integer schemes by the native kernel: the bits of `numerics.quantize`, fast enough for weight updates."""

import numpy as np

from headrace import _native
from headrace.numerics.formats import format_named
from headrace.numerics.row_blocks import RowBlocks
from headrace.numerics.schemes import IntegerScheme, group_size_in
from headrace.numerics.tensor import RawTensor


def quantize_tensor(tensor: RawTensor, scheme: IntegerScheme, *, isa: str | None = None) -> RawTensor:
    """A matrix in row blocks, equal in every bit to ``quantize(tensor.to_f32(), scheme)``; on the calling thread.

    bf16 is read as it is stored; other formats are decoded to f32 first. Raises InvalidRequestError if groups do not
    divide the rows.
    """
    group_size = group_size_in(scheme, tensor.shape[1])
    low, high = scheme.code_range
    element = f"{'' if scheme.symmetric else 'u'}int{scheme.bits}"
    layout = RowBlocks(element, group_size, scheme.scale)
    values = tensor.data.view("<u2") if tensor.format.name == "bf16" else np.ascontiguousarray(tensor.to_f32())
    blocks = _native.quantize_rows(
        values, scheme.bits, scheme.symmetric, group_size, scheme.scale, scheme.steps, low, high, isa or ""
    )
    return RawTensor(format_named(layout.name), tensor.shape, blocks)
