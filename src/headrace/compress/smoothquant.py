"""SmoothQuant: where inputs have channels far larger than others, 8-bit inputs lose the rest; weights can take it over.

Xiao, Lin, Seznec, Wu, Demouth, Han: "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models" (arXiv:2211.10438), equation 4. As with AWQ, the factors go into the norm before the matrices.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace.numerics.fake_quantize import fake_quantize
from headrace.numerics.schemes import IntegerScheme, group_size_in

_STRENGTHS = (0.5, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9)  # the paper's alpha, its default first
_ROWS = 512  # inputs that strengths are tried on


def smooth_factors(weights: Sequence[Tensor], inputs: Tensor, schemes: Sequence[IntegerScheme]) -> Tensor:
    """By what to multiply the columns of matrices that read the same inputs, ``[in]``, all above 0.

    The largest input of a channel to the power of alpha, by its largest weight to that of 1 - alpha. Of some alphas,
    and of all ones, those with the least squared error of the outputs, inputs and weights rounded as they are served.

    Args:
        weights: float32 ``[out, in]`` each.
        inputs: float32 ``[tokens, in]``.
        schemes: of each matrix.
    """
    most = inputs.abs().amax(0).clamp_min(1e-5)
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).clamp_min(1e-5)
    tried = inputs[:: -(-len(inputs) // _ROWS)]
    best = torch.ones_like(most)
    least = _error(best, weights, tried, schemes)
    for alpha in _STRENGTHS:
        factors = most**alpha / largest ** (1 - alpha)
        error = _error(factors, weights, tried, schemes)
        if error < least:
            best, least = factors, error
    return best


def _error(factors: Tensor, weights: Sequence[Tensor], inputs: Tensor, schemes: Sequence[IntegerScheme]) -> float:
    total = 0.0
    for weight, scheme in zip(weights, schemes, strict=True):
        # The executor rounds inputs in the groups of the weights that they meet, by this rule.
        group_size = group_size_in(scheme, weight.shape[1])
        rounding = IntegerScheme(bits=8, group_size=group_size, scale="f32")
        outputs = fake_quantize(inputs / factors, rounding) @ fake_quantize(weight * factors, scheme).T
        total += float((outputs - inputs @ weight.T).square().sum())
    return total
