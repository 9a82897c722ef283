"""Stored matrices rounded to a scheme: the bits of `numerics.quantize`, by the native kernel where it has one."""

import numpy as np

from headrace import _native
from headrace.numerics.formats import format_named
from headrace.numerics.gguf_blocks import gguf_tensor
from headrace.numerics.quantize import quantize
from headrace.numerics.row_blocks import RowBlocks
from headrace.numerics.schemes import GgufScheme, IntegerScheme, Scheme, group_size_in
from headrace.numerics.tensor import RawTensor


def quantize_tensor(tensor: RawTensor, scheme: Scheme, *, isa: str | None = None) -> RawTensor:
    """A matrix in row blocks, equal in every bit to ``quantize(tensor.to_f32(), scheme)``; on the calling thread.

    Integer schemes take the native kernel, which reads bf16 as it is stored; other formats are decoded to f32 first.
    A scheme of GGUF's gives its blocks. Raises InvalidRequestError if groups do not divide the rows.
    """
    if isinstance(scheme, GgufScheme):
        return gguf_tensor(quantize(tensor.to_f32(), scheme))
    if not isinstance(scheme, IntegerScheme):
        return RawTensor.from_groups(quantize(tensor.to_f32(), scheme))
    group_size = group_size_in(scheme, tensor.shape[1])
    low, high = scheme.code_range
    element = f"{'' if scheme.symmetric else 'u'}int{scheme.bits}"
    layout = RowBlocks(element, group_size, scheme.scale)
    values = tensor.data.view("<u2") if tensor.format.name == "bf16" else np.ascontiguousarray(tensor.to_f32())
    blocks = _native.quantize_rows(
        values, scheme.bits, scheme.symmetric, group_size, scheme.scale, scheme.steps, low, high, isa or ""
    )
    return RawTensor(format_named(layout.name), tensor.shape, blocks)
