"""AWQ: before rounding, let columns that meet large inputs be larger, and what makes those inputs smaller.

Lin et al.: "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (arXiv:2306.00978). Here
the factors go into the norm before the matrices, so the graph stays as it is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace.numerics.fake_quantize import fake_quantize
from headrace.numerics.schemes import Scheme

_EXPONENTS = tuple(i / 20 for i in range(20))


def awq_factors(weights: Sequence[Tensor], inputs: Tensor, hessian: Tensor, schemes: Sequence[Scheme]) -> Tensor:
    """By what to multiply the columns of matrices that read the same inputs, ``[in]``, all above 0.

    Of mean magnitudes of the inputs to twenty powers from 0 (all ones) up, those with the least squared error of the
    outputs over the calibration.

    Args:
        weights: float32 ``[out, in]`` each.
        inputs: float32 ``[tokens, in]``.
        hessian: their sum of x xᵀ.
        schemes: of each matrix.
    """
    magnitudes = inputs.abs().mean(0).clamp_min(1e-8)
    best, least = torch.ones_like(magnitudes), torch.inf
    for exponent in _EXPONENTS:
        factors = magnitudes**exponent
        factors = factors / (factors.max() * factors.min()).sqrt()
        error = sum(
            output_error(fake_quantize(w * factors, scheme) / factors - w, hessian)
            for w, scheme in zip(weights, schemes, strict=True)
        )
        if error < least:
            best, least = factors, error
    return best


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """The squared error of outputs over the inputs whose sum of x xᵀ is given: trace(D H Dᵀ)."""
    return float(((difference @ hessian) * difference).sum())
