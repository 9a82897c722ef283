"""What rounding each matrix to each format would cost, in nats, from one pass forward and one back.

To second order, KL(model || model whose weights moved by D) is ½ vec(D)ᵀ F vec(D) per position, F being the Fisher
information: the expected outer product of gradients of log p(y) where y is drawn from the model itself. Of F, this
keeps what single outputs of a matrix say on their own (Martens and Grosse, arXiv:1503.05671, with the left factor's
diagonal only): ½ Σ_r mean(g_r²) (D H Dᵀ)_rr, with g_r the gradient by output r and H the mean of x xᵀ of the inputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headrace.compress.gptq import remaining_errors
from headrace.compress.recipe import PLAIN
from headrace.executors.native_quantize import quantize_tensor
from headrace.executors.torch_sequences import run_sequences
from headrace.graph.ir import Graph, Node
from headrace.numerics.row_blocks import groups_in, row_blocks
from headrace.numerics.schemes import IntegerScheme, scheme_named
from headrace.numerics.tensor import RawTensor


@dataclass(frozen=True, slots=True)
class Option:
    """One matrix in one format.

    Attributes:
        format: its name, or `PLAIN`.
        num_bytes: scales and zero points counted.
        kl: predicted KL(source || model), nats per position, if nothing else were quantized.
    """

    format: str
    num_bytes: int
    kl: float


def measure_options(
    graph: Graph,
    weights: Mapping[str, RawTensor],
    formats: Mapping[str, Sequence[str]],
    token_ids: np.ndarray,
    *,
    compensated: bool = False,
) -> dict[str, tuple[Option, ...]]:
    """What each matrix costs in each of its formats.

    Memory is that of all weights in float32, of one layer's activations with gradients, and of all positions' logits,
    twice.

    Args:
        graph: not fused.
        weights: of all its parameters.
        formats: of the matrices to be measured, the names of formats; none of the logits' matrices.
        token_ids: int ``[sequences, length]`` to run.
        compensated: expect what GPTQ leaves of the error of rounding to nearest.
    """
    assert not formats.keys() & graph.logits_params, "a gradient is needed behind each matrix"
    run = _Measurement(graph, weights, formats, compensated)
    logits = run_sequences(graph, torch.from_numpy(token_ids.astype(np.int64)), run.visit, checkpointed=True)
    logits.backward(_drawn_gradient(logits.detach()))  # type: ignore[no-untyped-call]
    return {name: run.options(name) for name in formats}


def _drawn_gradient(logits: Tensor) -> Tensor:
    """The gradient of -log p(y) by each row of logits, a y drawn for each from what they say."""
    found = torch.softmax(logits, -1)
    drawn = torch.multinomial(found, 1, generator=torch.Generator().manual_seed(0))
    return found.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=found.dtype))


class _Measurement:
    """What one run gathers: errors of outputs on the way forward, how much outputs matter on the way back."""

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, RawTensor],
        formats: Mapping[str, Sequence[str]],
        compensated: bool,
    ) -> None:
        self._graph, self._weights, self._formats, self._compensated = graph, weights, formats, compensated
        self._moments: tuple[str, Tensor, Tensor | None] | None = None
        self._errors: dict[str, dict[str, tuple[int, Tensor]]] = {}  # by matrix and format: bytes, error of each output
        self._importance: dict[str, Tensor] = {}  # by node: mean squared gradient of each output

    def visit(self, node: Node, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Look at what `node` reads. Called a second time when a layer is computed again for its gradients."""
        for name, value in zip(node.inputs, inputs, strict=True):
            if self._graph.node(name).op == "linear" and name not in self._importance and value.requires_grad:
                self._importance[name] = torch.zeros(value.shape[1])
                value.register_hook(lambda gradient, name=name: self._weigh(name, gradient))
        values = [torch.from_numpy(np.array(self._weights[name].to_f32())) for name in node.params]
        if node.op == "linear":
            for name, value in zip(node.params[: node.integer("parts")], values, strict=False):
                if name in self._formats and name not in self._errors:
                    with torch.no_grad():
                        self._errors[name] = self._errors_of(name, value, *self._moments_of(node.inputs[0], inputs[0]))
        if node.op == "embed":
            values[0].requires_grad_()  # so that there are gradients behind it; its own is not looked at
        return values

    def options(self, name: str) -> tuple[Option, ...]:
        node = next(node for node in self._graph.nodes if node.op == "linear" and name in node.params)
        begin = 0
        for part in node.params[: node.params.index(name)]:
            begin += self._graph.params[part].shape[0]
        importance = self._importance[node.name][begin : begin + self._graph.params[name].shape[0]]
        return tuple(
            Option(format_name, num_bytes, 0.5 * float(importance @ errors))
            for format_name, (num_bytes, errors) in self._errors[name].items()
        )

    def _weigh(self, name: str, gradient: Tensor) -> None:
        self._importance[name] += gradient.square().mean(0)

    def _moments_of(self, name: str, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean of x xᵀ, and what GPTQ leaves of each column's errors: of one value: its readers follow each other."""
        if self._moments is None or self._moments[0] != name:
            hessian = inputs.T @ inputs / len(inputs)
            self._moments = (name, hessian, remaining_errors(hessian).float() if self._compensated else None)
        return self._moments[1:]

    def _errors_of(
        self, name: str, weight: Tensor, hessian: Tensor, remaining: Tensor | None
    ) -> dict[str, tuple[int, Tensor]]:
        found = {}
        for format_name in self._formats[name]:
            if format_name == PLAIN:
                found[format_name] = (2 * weight.numel(), torch.zeros(len(weight)))
                continue
            scheme = scheme_named(format_name)
            rounded = quantize_tensor(RawTensor.from_f32(weight.numpy()), scheme)
            difference = torch.from_numpy(rounded.to_f32()) - weight
            errors = ((difference @ hessian) * difference).sum(1).clamp_min(0)
            if remaining is not None and isinstance(scheme, IntegerScheme):
                errors = errors * _left_by_gptq(rounded, hessian, remaining)
            found[format_name] = (rounded.num_bytes, errors)
        return found


def _left_by_gptq(rounded: RawTensor, hessian: Tensor, remaining: Tensor) -> Tensor:
    """The share of rounding to nearest's error that is to be expected, of each row: errors as large as the groups'
    steps, independent of each other."""
    layout = row_blocks(rounded.format.name)
    assert layout is not None
    squares = torch.from_numpy(groups_in(layout, rounded.data).scales).float().square()
    squares = squares.repeat_interleave(layout.group_size, 1)
    return (squares @ remaining / (squares @ hessian.diagonal()).clamp_min(1e-30)).clamp_max(1.0)
