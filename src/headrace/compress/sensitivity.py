"""What rounding each matrix to each format would cost, in nats: what outputs err by, times how much they matter.

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

from headrace.base.heap import give_back
from headrace.compress.gptq import remaining_errors
from headrace.compress.recipe import PLAIN
from headrace.executors.native_quantize import quantize_tensor
from headrace.executors.torch_sequences import decoded, run_sequences, tokens_only, used_rows
from headrace.formats.compressed_tensors_writer import stored_bytes
from headrace.graph.ir import Graph, Node
from headrace.numerics.row_blocks import groups_in, row_blocks
from headrace.numerics.schemes import GgufScheme, IntegerScheme, scheme_named
from headrace.numerics.tensor import RawTensor


@dataclass(frozen=True, slots=True)
class Option:
    """One matrix in one format.

    Attributes:
        format: its name, or `PLAIN`.
        num_bytes: in the files, scales and zero points counted.
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
    fitted: np.ndarray | None = None,
) -> dict[str, tuple[Option, ...]]:
    """What each matrix costs in each of its formats.

    One pass forward finds the errors of outputs; one forward and back for each text how much outputs matter. Memory is
    that of all texts' activations between two nodes, then of one text's activations and logits with gradients.

    Args:
        graph: not fused.
        weights: of all its parameters.
        formats: of the matrices to be measured, the names of formats; none of the logits' matrices.
        token_ids: int ``[sequences, length]`` to measure on.
        fitted: the same, other texts, as many as GPTQ will be calibrated on: integers are expected to err as it leaves
            them. None: as rounding to nearest does.
    """
    assert not formats.keys() & graph.logits_params, "a gradient is needed behind each matrix"
    errors = _Errors(graph, weights, formats, 0 if fitted is None else fitted.size)
    importance = _Importance(graph, weights)
    together = token_ids if fitted is None else np.concatenate([fitted, token_ids])
    errors.used, places = used_rows(together)
    with torch.inference_mode():
        run_sequences(tokens_only(graph), places, errors.visit)
    generator = torch.Generator().manual_seed(0)
    for text in token_ids:
        importance.used, places = used_rows(text[None])
        logits = run_sequences(graph, places, importance.visit, checkpointed=True)
        logits.backward(_drawn_gradient(logits.detach(), generator))  # type: ignore[no-untyped-call]
        del logits
        give_back()
    found = {}
    for node in graph.nodes:
        parts = node.params[: node.integer("parts")] if node.op == "linear" else ()
        begin = 0
        for name in parts:
            end = begin + graph.params[name].shape[0]
            if name in formats:
                matters = importance.of_node[node.name][begin:end] / len(token_ids)
                found[name] = tuple(
                    Option(format_name, num_bytes, 0.5 * float(matters @ error))
                    for format_name, (num_bytes, error) in errors.of_matrix[name].items()
                )
            begin = end
    return found


def _drawn_gradient(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient of -log p(y) by each row of logits, a y drawn for each from what they say."""
    found = torch.softmax(logits, -1)
    drawn = torch.multinomial(found, 1, generator=generator)
    return found.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=found.dtype))


class _Importance:
    """How much outputs matter: the sum over texts of their mean squared gradients, by the name of the linear node."""

    def __init__(self, graph: Graph, weights: Mapping[str, RawTensor]) -> None:
        self._graph, self._weights = graph, weights
        self.used: np.ndarray = np.empty(0, np.int64)
        self._hooked: set[str] = set()
        self.of_node: dict[str, Tensor] = {}

    def visit(self, node: Node, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Look at what `node` reads. Called a second time when a layer is computed again for its gradients."""
        values = decoded(self._weights, node, self.used)
        if node.op == "embed":
            self._hooked.clear()  # another text begins
            values[0].requires_grad_()  # so that there are gradients behind it; its own is not looked at
        for name, value in zip(node.inputs, inputs, strict=True):
            if self._graph.node(name).op == "linear" and name not in self._hooked and value.requires_grad:
                self._hooked.add(name)
                value.register_hook(lambda gradient, name=name: self._weigh(name, gradient))
        return values

    def _weigh(self, name: str, gradient: Tensor) -> None:
        mean = gradient.square().mean(0)
        self.of_node[name] = self.of_node[name] + mean if name in self.of_node else mean


class _Errors:
    """What outputs err by: of each matrix, by the name of a format, its bytes and each output's mean squared error.

    Args:
        num_fitted: how many of the first rows GPTQ is fitted to; errors are those on the others.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, RawTensor],
        formats: Mapping[str, Sequence[str]],
        num_fitted: int,
    ) -> None:
        self._graph, self._weights, self._formats, self._num_fitted = graph, weights, formats, num_fitted
        self.used: np.ndarray = np.empty(0, np.int64)
        self._moments: tuple[str, Tensor, Tensor | None] | None = None
        self.of_matrix: dict[str, dict[str, tuple[int, Tensor]]] = {}

    def visit(self, node: Node, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Measure the matrices that `node` multiplies with."""
        values = decoded(self._weights, node, self.used)
        if node.op == "linear":
            for name, value in zip(node.params[: node.integer("parts")], values, strict=False):
                if name in self._formats and name not in self.of_matrix:
                    self.of_matrix[name] = self._errors_of(name, value, *self._moments_of(node.inputs[0], inputs[0]))
                    give_back()
        return values

    def _moments_of(self, name: str, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean of x xᵀ, and what GPTQ leaves of each column's errors: of one value: its readers follow each other."""
        if self._moments is None or self._moments[0] != name:
            fitted, met = inputs[: self._num_fitted], inputs[self._num_fitted :]
            moment = met.T @ met / len(met)
            remaining = remaining_errors(fitted.T @ fitted, moment) if len(fitted) else None
            self._moments = (name, moment, None if remaining is None else remaining.float())
        return self._moments[1:]

    def _errors_of(
        self, name: str, weight: Tensor, moment: Tensor, remaining: Tensor | None
    ) -> dict[str, tuple[int, Tensor]]:
        found = {}
        for format_name in self._formats[name]:
            if format_name == PLAIN:
                found[format_name] = (2 * weight.numel(), torch.zeros(len(weight)))
                continue
            scheme = scheme_named(format_name)
            assert not isinstance(scheme, GgufScheme), "formats of a folder"
            rounded = quantize_tensor(RawTensor.from_f32(weight.numpy()), scheme)
            if remaining is not None and isinstance(scheme, IntegerScheme):
                errors = _expected_squares(rounded) @ remaining
            else:
                difference = torch.from_numpy(rounded.to_f32()) - weight
                errors = ((difference @ moment) * difference).sum(1).clamp_min(0)
            found[format_name] = (stored_bytes(rounded, scheme), errors)
        return found


def _expected_squares(rounded: RawTensor) -> Tensor:
    """Squared rounding errors that are to be expected of each value, those of a uniform error within a group's step."""
    layout = row_blocks(rounded.format.name)
    assert layout is not None
    scales = torch.from_numpy(np.array(groups_in(layout, rounded.data).scales))
    return scales.square().repeat_interleave(layout.group_size, 1) / 12
