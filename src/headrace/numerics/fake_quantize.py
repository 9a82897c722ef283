"""`quantize` and back in torch, differentiable: what training sees of a matrix that will be served quantized.

Rounds as `headrace.numerics.quantize` does, bit for bit, on every device whose float32 division is IEEE's. Divisors are
tensors, since torch may multiply by the inverse of a plain number; and made where they are used, since a copy from the
CPU would wait for the device.
"""

from headrace.base.errors import InvalidRequestError, MissingDependencyError

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":  # torch is there, but broken: its own message says how
        raise
    raise MissingDependencyError("Fake quantization needs torch.", "pip install headrace[torch]") from error

import math
from functools import cache
from typing import Any

from torch import Tensor

from headrace.numerics.float4 import E2M1_BOUNDS, E2M1_MAX, E2M1_VALUES
from headrace.numerics.float8 import E4M3_MAX, E8M0_VALUES
from headrace.numerics.schemes import (
    Float8Scheme,
    GgufScheme,
    IntegerScheme,
    Mxfp4Scheme,
    Nvfp4Scheme,
    Scheme,
    group_size_in,
)

_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def fake_quantize(values: Tensor, scheme: Scheme) -> Tensor:
    """A matrix rounded to a scheme and read back, with a straight-through gradient.

    The gradient of a value that its group's codes reach is passed as it is, as if nothing had been rounded (Bengio et
    al., arXiv:1308.3432). That of a value which was clipped to the last code is zero (with ``clip="full"``, a positive
    value that sets its group's scale is one). Scales count as constants. A group that is all zeros, or not finite,
    passes its gradient.

    Args:
        values: float32 ``[rows, features]``, on any device.
        scheme: how to round.

    Returns:
        float32 of the same shape, equal to ``quantize(values, scheme).to_f32()`` in every bit (but for NaNs' payloads).
    """
    if values.ndim != 2 or values.numel() == 0:
        raise InvalidRequestError(f"Values of shape {list(values.shape)} are no matrix.", "Quantize matrices only.")
    if values.dtype != torch.float32:
        raise InvalidRequestError(f"Values are {values.dtype}.", "Give float32: values.float() passes gradients on.")
    rounded: Tensor = _StraightThrough.apply(values, scheme)  # type: ignore[no-untyped-call]
    return rounded


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scheme: Scheme) -> Tensor:
        rounded, reached = _round(values.detach(), scheme)
        ctx.save_for_backward(reached.reshape(values.shape))
        return rounded.reshape(values.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (reached,) = ctx.saved_tensors
        (gradient,) = gradients
        return torch.where(reached, gradient, 0), None


def _round(values: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The rounded values in groups, and which of them no clipping held back."""
    match scheme:
        case IntegerScheme(symmetric=True):
            return _symmetric(values, scheme)
        case IntegerScheme():
            return _asymmetric(values, scheme)
        case Float8Scheme():
            return _float8(values, scheme)
        case Mxfp4Scheme():
            groups = _grouped(values, group_size_in(scheme, values.shape[1]))
            return _float4(groups, _mxfp4_scales(_peaks(groups)))
        case Nvfp4Scheme():
            groups = _grouped(values, group_size_in(scheme, values.shape[1]))
            return _float4(groups, _nvfp4_scales(_peaks(groups), scheme))
        case GgufScheme(name="q8_0"):
            return _symmetric(values, IntegerScheme(bits=8, group_size=scheme.group_size, scale="f16"))
        case GgufScheme(name="q4_0"):
            return _down_to_minus_eight(values, scheme)
        case GgufScheme():
            return _above_minima(values, scheme)


def _symmetric(values: Tensor, scheme: IntegerScheme) -> tuple[Tensor, Tensor]:
    groups = _grouped(values, group_size_in(scheme, values.shape[1]))
    scales = _scales(scheme.scale, _peaks(groups), scheme.steps)
    multiples = torch.round(_quotients(groups, scales))
    codes = multiples.clamp(*scheme.code_range)
    return _whole(codes) * scales, codes == multiples


def _asymmetric(values: Tensor, scheme: IntegerScheme) -> tuple[Tensor, Tensor]:
    groups = _grouped(values, group_size_in(scheme, values.shape[1]))
    least, most = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scales = _scales(scheme.scale, most - least, scheme.steps)
    zeros = torch.round(_quotients(-least, scales)).clamp(*scheme.code_range)
    unclipped = torch.round(_quotients(groups, scales)) + zeros
    codes = unclipped.clamp(*scheme.code_range)
    return _whole(codes - zeros) * scales, codes == unclipped


def _down_to_minus_eight(values: Tensor, scheme: GgufScheme) -> tuple[Tensor, Tensor]:
    groups = _grouped(values, group_size_in(scheme, values.shape[1]))
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    magnitudes = _scales("f16", torch.maximum(-least, most), -scheme.code_range[0])
    turned = torch.where(-least >= most, 1.0, -1.0)
    multiples = torch.round(_quotients(groups * turned, magnitudes))
    codes = multiples.clamp(*scheme.code_range)
    return _whole(codes) * torch.where(magnitudes > 0, magnitudes * turned, magnitudes), codes == multiples


def _above_minima(values: Tensor, scheme: GgufScheme) -> tuple[Tensor, Tensor]:
    groups = _grouped(values, group_size_in(scheme, values.shape[1]))
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scales = _scales("f16", most - least, scheme.code_range[1])
    minima = least.to(torch.float16).to(torch.float32)
    scales, minima = torch.where(minima.isfinite(), scales, torch.nan), torch.where(minima.isfinite(), minima, 0)
    multiples = torch.round(_quotients(groups - minima, scales))
    codes = multiples.clamp(*scheme.code_range)
    return _whole(codes) * scales + torch.where(scales.isnan(), 0, minima), codes == multiples


def _float8(values: Tensor, scheme: Float8Scheme) -> tuple[Tensor, Tensor]:
    rows, features = values.shape
    block_rows, block_columns = scheme.block_of(rows, features)
    padding = (0, -features % block_columns, 0, -rows % block_rows)
    padded = torch.nn.functional.pad(values, padding)
    blocks = padded.reshape(len(padded) // block_rows, block_rows, -1, block_columns)
    scales = _scales(scheme.scale, blocks.abs().amax((1, 3)), float(E4M3_MAX))
    by_row = scales.repeat_interleave(block_rows, 0)[:rows]
    group_size = math.gcd(block_columns, features)
    spread = by_row.repeat_interleave(block_columns // group_size, 1)[:, : features // group_size, None]
    quotients = _quotients(_grouped(values, group_size), spread)
    return _to_e4m3(quotients) * spread, quotients.abs() <= float(E4M3_MAX)


def _float4(groups: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    quotients = _quotients(groups, scales)
    magnitudes = quotients.abs()
    bounds, e2m1, _ = _tables(groups.device)
    codes = torch.searchsorted(bounds, magnitudes)
    values = e2m1[codes + 8 * quotients.signbit()]
    return values * scales, magnitudes <= float(E2M1_MAX)


@cache  # recorded kernels go on reading them
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """e2m1's bounds and values, e8m0's values: copied to a device once."""
    with torch.inference_mode(False):
        bounds, e2m1, e8m0 = (torch.tensor(table, device=device) for table in (E2M1_BOUNDS, E2M1_VALUES, E8M0_VALUES))
    return bounds, e2m1, e8m0


def _mxfp4_scales(peaks: Tensor) -> Tensor:
    _, exponents = torch.frexp(torch.where(peaks.isfinite(), peaks, 0))
    codes = (exponents - 3).clamp(min=-127) + 127
    *_, e8m0 = _tables(peaks.device)
    return torch.where(peaks.isfinite(), e8m0[codes.long()], torch.nan)


def _nvfp4_scales(peaks: Tensor, scheme: Nvfp4Scheme) -> Tensor:
    finite = torch.where(peaks.isfinite(), peaks, 0)
    peak = finite.max() if scheme.peak is None else finite.new_full((), scheme.peak)
    divisor = (peaks.new_full((), float(E2M1_MAX * E4M3_MAX)) / peak).clamp(max=torch.finfo(torch.float32).max)
    divisor = torch.where(peak > 0, divisor, 1)
    scales = _to_e4m3(finite / finite.new_full((), float(E2M1_MAX)) * divisor)
    return torch.where(peaks.isfinite(), scales / divisor, torch.nan)


def _scales(dtype: str, spans: Tensor, steps: float) -> Tensor:
    scales = (spans / spans.new_full((), steps)).to(_DTYPES[dtype]).to(torch.float32)
    return torch.where(scales.isfinite(), scales, torch.nan)


def _quotients(values: Tensor, scales: Tensor) -> Tensor:
    usable = scales > 0
    return torch.where(usable, values, 0) / torch.where(usable, scales, 1)


def _whole(codes: Tensor) -> Tensor:
    """Without minus zeros, as integers have none."""
    return codes.to(torch.int16).to(torch.float32)


def _to_e4m3(values: Tensor) -> Tensor:
    return values.clamp(-float(E4M3_MAX), float(E4M3_MAX)).to(torch.float8_e4m3fn).to(torch.float32)


def _grouped(values: Tensor, group_size: int) -> Tensor:
    return values.reshape(len(values), -1, group_size)


def _peaks(groups: Tensor) -> Tensor:
    return groups.abs().amax(-1, keepdim=True)
