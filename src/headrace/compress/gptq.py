"""GPTQ: rounding the columns of a matrix one after the other, the rest making up for each error.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (arXiv:2210.17323). Scales are those of the unrounded matrix ("static groups"), so that columns may go in
order of the inputs' size and groups stay runs of neighbours.
"""

import numpy as np
import torch
from torch import Tensor

from headrace.base.errors import InvalidRequestError
from headrace.numerics.quantize import quantize
from headrace.numerics.row_blocks import Groups
from headrace.numerics.schemes import GgufScheme, IntegerScheme

DAMPING = 0.01
"""Added to the diagonal of the Hessian, times its mean."""

_BLOCK = 128  # columns whose errors reach the columns behind them together


def gptq(
    weight: Tensor,
    hessian: Tensor,
    scheme: IntegerScheme | GgufScheme,
    *,
    damping: float = DAMPING,
    anchored: bool = False,
) -> Groups:
    """Round a matrix for inputs with a given second moment.

    Args:
        weight: float32 ``[out, in]``.
        hessian: ``[in, in]``, the sum (or mean) of x xᵀ over inputs; a multiple of it gives the same.
        scheme: integers; scales, zero points and minima are those of rounding to nearest.
        anchored: of symmetric codes, leave the largest of each group at the end of the range, so that the result
            rounded again is itself: what training that rounds in every step can start from.

    Raises InvalidRequestError if the Hessian is not finite.
    """
    nearest = quantize(weight.numpy(), scheme)
    symmetric = nearest.zeros is None and nearest.minima is None
    assert symmetric or not anchored, "with zero points or minima there is no end to hold on to"
    group_size = nearest.layout.group_size
    # What follows has columns as rows: they are what is worked on, one after the other.
    scales = torch.from_numpy(nearest.scales.T.copy()).double()
    zeros = torch.zeros_like(scales) if nearest.zeros is None else torch.from_numpy(nearest.zeros.T.copy()).double()
    minima = torch.zeros_like(scales) if nearest.minima is None else torch.from_numpy(nearest.minima.T.copy()).double()
    usable = scales.abs() > 0  # q4_0's may be negative
    divisors = torch.where(usable, scales, 1.0)
    low, high = scheme.code_range
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    upper = _inverse_factor(hessian, order, damping)
    left = weight.T[order].double()
    codes = torch.empty_like(left)
    fixed = _largest(weight, group_size).T[order] if anchored else None
    nearest_codes = _unsigned(nearest.codes, nearest.layout.element).T[order] if anchored else None
    for begin in range(0, len(order), _BLOCK):
        end = min(begin + _BLOCK, len(order))
        errors = torch.empty(end - begin, len(weight), dtype=torch.double)
        for i in range(begin, end):
            group = int(order[i]) // group_size
            zero, minimum, divisor = zeros[group], minima[group], divisors[group]
            # In float32, as the rule divides: where nothing has been made up for, the codes are its codes.
            multiples = torch.round((left[i] - minimum).float() / divisor.float()).double()
            codes[i] = torch.where(usable[group], multiples + zero, zero).clamp(low, high)
            if fixed is not None and nearest_codes is not None:
                codes[i] = torch.where(fixed[i], nearest_codes[i], codes[i])
            rounded = torch.where(usable[group], (codes[i] - zero) * divisor, 0.0) + minimum
            errors[i - begin] = (left[i] - rounded) / upper[i, i]
            left[i:end].addr_(upper[i, i:end], errors[i - begin], alpha=-1)
        left[end:].addmm_(upper[begin:end, end:].T, errors, alpha=-1)
    in_place = torch.empty_like(weight, dtype=torch.double)
    in_place[:, order] = codes.T
    offset = 8 if nearest.layout.element == "int4" else 0
    stored = (in_place + offset).to(torch.int16).numpy().astype("int8" if symmetric else "uint8").view("uint8")
    return Groups(nearest.layout, stored, nearest.scales, nearest.zeros, nearest.minima)


def remaining_errors(hessian: Tensor, met: Tensor, damping: float = DAMPING) -> Tensor:
    """What a squared rounding error of one in each column costs once the columns behind have made up for it.

    With U the upper Cholesky factor of the inverse Hessian, GPTQ leaves a row off by e U, where column i was rounded by
    an error e_i U_ii. Where these do not depend on each other, the outputs' expected squared error over inputs of
    second moment M is the sum of the columns' squared errors times (U M Uᵀ)_ii / U_ii².

    Args:
        hessian: ``[in, in]``, of the inputs that GPTQ is fitted to.
        met: ``[in, in]``, the mean of x xᵀ over inputs that the matrix then meets. If these are the same, errors look
            far smaller than they are on others: there is one free value per column to fit.

    Returns:
        float64 ``[in]``, in the matrix's order.
    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    upper = _inverse_factor(hessian, order, damping)
    found = torch.empty(len(order), dtype=torch.double)
    found[order] = ((upper @ met[order][:, order].double()) * upper).sum(1) / upper.diagonal().square()
    return found


def _largest(weight: Tensor, group_size: int) -> Tensor:
    """Where the largest magnitude of each group is, the first of equals: bool of the weight's shape."""
    groups = weight.abs().reshape(len(weight), -1, group_size)
    return (
        torch.zeros_like(groups, dtype=torch.bool)
        .scatter_(2, groups.argmax(2, keepdim=True), True)
        .reshape(weight.shape)
    )


def _unsigned(codes: np.ndarray, element: str) -> Tensor:
    """Stored codes as the numbers they stand for."""
    values = codes.astype(np.float64) - 8 if element == "int4" else codes.view(np.int8).astype(np.float64)
    return torch.from_numpy(values)


def _inverse_factor(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian, whose columns and rows are put in order first.

    Float64. With LAPACK's own copies, five such matrices are held at a time.
    """
    damped = hessian[order[:, None], order].double()
    diagonal = damped.diagonal()
    if not torch.isfinite(damped).all():
        raise InvalidRequestError("The calibration's activations are not finite.", "Check the weights.")
    mean = diagonal.mean()
    diagonal += damping * mean if mean > 0 else 1.0
    lower = torch.linalg.cholesky(damped)
    del damped, diagonal
    inverse = torch.cholesky_inverse(lower)
    del lower
    return torch.linalg.cholesky(inverse, upper=True)
