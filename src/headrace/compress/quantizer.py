"""One pass over a model: each matrix is rounded when the walk reaches it, and what follows sees it rounded."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headrace.base.errors import CheckpointError
from headrace.base.heap import give_back
from headrace.compress.awq import awq_factors, output_error
from headrace.compress.gptq import gptq
from headrace.compress.recipe import Recipe
from headrace.compress.smoothquant import smooth_factors
from headrace.compress.store import Store
from headrace.executors.native_quantize import quantize_tensor
from headrace.executors.torch_sequences import as_tensor, decoded, run_sequences, tokens_only, used_rows
from headrace.graph.ir import Graph, Node
from headrace.numerics.gguf_blocks import gguf_tensor
from headrace.numerics.schemes import GgufScheme, IntegerScheme, Nvfp4Scheme, Scheme
from headrace.numerics.tensor import RawTensor

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Rounded:
    """What became of one matrix.

    Attributes:
        name: the parameter's.
        tensor: in row blocks, or in GGUF's.
        error: squared error of its outputs over the calibration, relative to the outputs' own square; inputs are those
            that it meets behind the matrices rounded before it.
        seconds: that it took.
    """

    name: str
    tensor: RawTensor
    error: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Moved:
    """Scale that went from a norm into the matrices that read it. By itself it changes nothing that they compute.

    Attributes:
        norm: the name of its weights, which were divided by the factors.
        matrices: the names of those whose columns were multiplied.
        factors: float32 ``[features]``.
    """

    norm: str
    matrices: Sequence[str]
    factors: np.ndarray

    def apply(self, weights: Mapping[str, RawTensor]) -> dict[str, RawTensor]:
        """The norm's weights and the matrices after the move, unrounded, in f32; `weights` are from before it."""
        return {
            self.norm: RawTensor.from_f32(weights[self.norm].to_f32() / self.factors),
            **{name: RawTensor.from_f32(weights[name].to_f32() * self.factors) for name in self.matrices},
        }


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantized model.

    Attributes:
        weights: every parameter of the graph.
        schemes: of those that are quantized.
        rounded: the same, in order.
        moved: what was done before rounding.
    """

    weights: Mapping[str, RawTensor]
    schemes: Mapping[str, Scheme]
    rounded: Sequence[Rounded]
    moved: Sequence[Moved]


def quantize_weights(
    graph: Graph,
    weights: Mapping[str, RawTensor],
    recipe: Recipe,
    token_ids: np.ndarray,
    *,
    store: Store | None = None,
    progress: Progress | None = None,
    anchored: bool = False,
) -> Quantized:
    """Quantize a model's matrices by a recipe.

    Args:
        graph: not fused: names are those of patterns and reports.
        weights: of all its parameters; decoded one at a time, of the embedding the rows that are used.
        token_ids: int ``[sequences, length]`` to calibrate on.
        store: keeps each matrix once it is done; those it has already are taken from it. The outcome is the same, but
            memory holds one layer's matrices, the calibration's activations between two nodes, and no result.
        progress: told each matrix's name once it is done.
        anchored: of GPTQ: see `gptq`.

    Raises:
        InvalidRequestError: the recipe does not fit the model.
        CheckpointError: a matrix to quantize holds NaNs or infinities; names it.
    """
    schemes = recipe.schemes(graph)
    used, places = used_rows(token_ids)
    run = _Pass(graph, weights, recipe, schemes, used, store, progress, anchored)
    with torch.inference_mode():
        output = graph.node(graph.output)
        has_logits = not schemes.keys().isdisjoint(output.params)
        walked = _without_output(graph) if has_logits else tokens_only(graph)
        last = run_sequences(walked, places, run.visit)
        if has_logits:
            run.visit(output, [last])
    return Quantized({**weights, **run.changed}, run.schemes, tuple(run.rounded), tuple(run.moved))


class _Pass:
    """The state of one walk."""

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, RawTensor],
        recipe: Recipe,
        schemes: Mapping[str, Scheme],
        used: np.ndarray,
        store: Store | None,
        progress: Progress | None,
        anchored: bool,
    ) -> None:
        self._weights, self._recipe, self._schemes = weights, recipe, dict(schemes)
        self._used = used  # rows of the embedding table that the walk reads, by whose places here it names tokens
        self._store, self._progress, self._anchored = store, progress, anchored
        self._readers = {
            node.name: [reader for reader in graph.nodes if node.name in reader.inputs] for node in graph.nodes
        }
        self._embedded = {name for node in graph.nodes if node.op == "embed" for name in node.params}
        self._peaks: dict[str, float] = {}
        self._hessian: tuple[str, Tensor] | None = None  # of one value: what reads the same comes one after the other
        self.changed: dict[str, RawTensor] = {}
        self.rounded: list[Rounded] = []
        self.moved: list[Moved] = []

    def visit(self, node: Node, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Round what `node` multiplies with, if that is asked for; the parameters it runs with."""
        if node.op == "rms_norm" and self._recipe.moves_scale:
            self._move_scale(node, inputs[0])
        if node.op == "linear":
            for name in node.params[: node.integer("parts")]:
                if name in self._schemes and all(rounded.name != name for rounded in self.rounded):
                    self._round(name, node.inputs[0], inputs[0])
        if node.op == "embed":
            return decoded(self._weights, node, self._used)
        return [self._value(name) for name in node.params]

    def _value(self, name: str) -> Tensor:
        return as_tensor(self.changed.get(name) or self._weights[name])

    def _round(self, name: str, input_name: str, inputs: Tensor) -> None:
        start = time.perf_counter()
        hessian = self._hessian_of(input_name, inputs)
        weight = self._value(name)
        if not torch.isfinite(weight).all():
            raise CheckpointError(
                f"{name} holds values that are not finite.", f"Repair the model, or leave it out (--ignore {name})."
            )
        self._schemes[name] = self._with_peak(self._schemes[name], input_name)
        tensor = self._store.load(name) if self._store else None
        if tensor is None:
            tensor = self._rounded_by_method(weight, hessian, self._schemes[name])
            if self._store:
                tensor = self._store.keep(name, tensor)
        self.changed[name] = tensor
        square = output_error(weight, hessian)
        error = output_error(self._value(name) - weight, hessian) / square if square > 0 else 0.0
        self.rounded.append(Rounded(name, tensor, error, time.perf_counter() - start))
        give_back()
        if self._progress is not None:
            self._progress(name)

    def _rounded_by_method(self, weight: Tensor, hessian: Tensor, scheme: Scheme) -> RawTensor:
        if self._recipe.fits and isinstance(scheme, IntegerScheme | GgufScheme):
            groups = gptq(weight, hessian, scheme, anchored=self._anchored)
            return gguf_tensor(groups) if isinstance(scheme, GgufScheme) else RawTensor.from_groups(groups)
        return quantize_tensor(RawTensor.from_f32(weight.numpy()), scheme)

    def _with_peak(self, scheme: Scheme, input_name: str) -> Scheme:
        """nvfp4's scheme for the largest of all matrices that read one input: engines multiply these as one."""
        if not isinstance(scheme, Nvfp4Scheme):
            return scheme
        if input_name not in self._peaks:
            readers = [reader for reader in self._readers[input_name] if reader.op == "linear"]
            names = [name for reader in readers for name in reader.params[: reader.integer("parts")]]
            values = (self._value(name) for name in names if name in self._schemes)
            self._peaks[input_name] = max(float(value.abs().nan_to_num(0, 0, 0).max()) for value in values)
        return Nvfp4Scheme(self._peaks[input_name])

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        """As they were asked for, with what the matrices themselves decide."""
        return self._schemes

    def _hessian_of(self, name: str, inputs: Tensor) -> Tensor:
        if self._hessian is None or self._hessian[0] != name:
            self._hessian = (name, inputs.T @ inputs)
        return self._hessian[1]

    def _move_scale(self, norm: Node, x: Tensor) -> None:
        """AWQ's or SmoothQuant's factors into a norm, and into the columns of what reads it, if that is all rounded."""
        readers = self._readers[norm.name]
        if norm.integer("group") != norm.features or any(reader.op != "linear" for reader in readers):
            return
        matrices = [name for reader in readers for name in reader.params[: reader.integer("parts")]]
        if not matrices or not all(name in self._schemes for name in matrices):
            return
        if any(name in self._embedded for name in matrices):
            return  # what reads no norm would see the factors too
        weight = self._value(norm.params[0])
        outputs = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.number("eps")) * weight
        values = [self._value(name) for name in matrices]
        factors = self._factors(values, outputs, [self._schemes[name] for name in matrices])
        moved = Moved(norm.params[0], tuple(matrices), factors.numpy())
        self.changed |= moved.apply(self._weights)
        self.moved.append(moved)

    def _factors(self, values: Sequence[Tensor], outputs: Tensor, schemes: Sequence[Scheme]) -> Tensor:
        if self._recipe.method != "smoothquant":
            return awq_factors(values, outputs, outputs.T @ outputs, schemes)
        integers = [scheme for scheme in schemes if isinstance(scheme, IntegerScheme)]
        assert len(integers) == len(schemes), "the recipe has checked it"
        return smooth_factors(values, outputs, integers)


def _without_output(graph: Graph) -> Graph:
    """Up to what the logits' matrix multiplies: logits of all of the calibration's tokens would fill the memory."""
    *nodes, output = graph.nodes
    names = {name for node in nodes for name in node.params}
    params = {name: param for name, param in graph.params.items() if name in names}
    return Graph(tuple(nodes), params, output.inputs[0])
