"""The reference executor: interprets a graph node by node over torch, on a CPU or any other device torch knows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from headrace.base.errors import ExecutorError, InvalidRequestError, MissingDependencyError

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":  # torch is there, but broken: its own message says how
        raise
    raise MissingDependencyError("The torch executor needs torch.", "pip install headrace[torch]") from error

from torch import Tensor

from headrace.engine.step import Float32, Step, StepResult
from headrace.executors import sampler
from headrace.executors.torch_device import torch_device
from headrace.executors.torch_numerics import Numerics, ops_with
from headrace.executors.torch_ops import Batch, Call, KVCache
from headrace.graph.ir import Graph
from headrace.graph.ops import validate
from headrace.numerics.kv_formats import KV_FORMATS
from headrace.numerics.tensor import RawTensor

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TorchExecutor:
    """Implements `headrace.engine.executor.Executor`; what the other executors are compared with.

    Args:
        graph: what to run; fused or not.
        weights: a tensor for every parameter of the graph. Decoded to `dtype` here; not kept.
        num_blocks: KV blocks to allocate.
        block_size: tokens per block.
        kv_format: one of `kv_formats.KV_FORMATS`; keys and values are rounded to it when they are appended.
        dtype: a key of `DTYPES`: of the weights and of the activations between nodes.
        numerics: how ops are computed if not as the reference does.
        device: as torch names it; one that it cannot use is an InvalidRequestError.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, RawTensor],
        *,
        num_blocks: int,
        block_size: int = 16,
        kv_format: str = "f32",
        dtype: str = "float32",
        device: str = "cpu",
        numerics: Numerics | None = None,
    ) -> None:
        if kv_format not in KV_FORMATS:
            raise InvalidRequestError(f"kv_format {kv_format!r} is unknown.", f"Use one of {KV_FORMATS}.")
        if dtype not in DTYPES:
            raise InvalidRequestError(f"dtype {dtype!r} is unknown.", f"Use one of {tuple(DTYPES)}.")
        validate(graph)
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.vocab_size = graph.node(graph.output).features
        self._graph = graph
        self._ops = ops_with(numerics or Numerics(), graph.output)
        self._device = torch_device(device)
        self._dead_after = _dead_after(graph)
        self._dtype = DTYPES[dtype]
        self._params = dict(_load(graph, weights, self._dtype, self._device))
        self._kv = tuple(
            KVCache.zeros((num_blocks, block_size, kv.num_kv_heads, kv.head_dim), kv_format, self._device)
            for kv in graph.kv_layers
        )

    def execute(self, step: Step) -> StepResult:
        """Run one step. Writes KV only into the step's own blocks. Raises on failure, leaving the pool usable."""
        assert len(step.token_ids) > 0, "a step without tokens"
        assert 0 <= step.token_ids.min() <= step.token_ids.max() < self.vocab_size, "a token id leaves the vocabulary"
        for name in step.taps:
            if all(name != node.name for node in self._graph.nodes):
                raise ExecutorError(f"No node is named {name!r}, so it can't be tapped.")
        values = self._run(step)
        made = sampler.sample(values[self._graph.output], step.sampling)
        return StepResult(*made, taps={name: values[name] for name in step.taps})

    def stage_weights(self, weights: Mapping[str, RawTensor]) -> "StagedParams":
        """Decode other values of all parameters. Takes as much memory again as the weights."""
        return StagedParams(dict(_load(self._graph, weights, self._dtype, self._device)))

    def swap_weights(self, staged: "StagedParams") -> None:
        """Exchange the weights between two steps; `staged` then holds those that ran until now."""
        self._params, staged.params = staged.params, self._params

    def close(self) -> None:
        """Drop the weights and the KV pool. Idempotent; no step may follow."""
        self._params = {}
        self._kv = ()

    @torch.inference_mode()
    def _run(self, step: Step) -> dict[str, Float32]:
        """Evaluate the graph; the values of the output and the taps."""
        wanted = {self._graph.output, *step.taps}
        batch = Batch.of_step(step, self._kv, self.block_size, self._device)
        live: dict[str, Tensor] = {}
        kept: dict[str, Float32] = {}
        for node in self._graph.nodes:
            inputs = [live[name] for name in node.inputs]
            params = [self._params[name] for name in node.params]
            live[node.name] = self._ops[node.op](Call(node, inputs, params, batch))
            if node.name in wanted:
                kept[node.name] = live[node.name].to("cpu", torch.float32).contiguous().numpy()
            for name in self._dead_after[node.name]:
                del live[name]
        return kept


@dataclass(slots=True)
class StagedParams:
    """Decoded parameters that wait to be exchanged with those an executor has."""

    params: dict[str, Tensor]


def _load(
    graph: Graph, weights: Mapping[str, RawTensor], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    for name, param in graph.params.items():
        assert weights[name].shape == param.shape, f"{name} is {weights[name].shape}, not {param.shape}"
        decoded = np.array(weights[name].to_f32())  # a copy: torch refuses the read-only views of a mapped file
        yield name, torch.from_numpy(decoded).to(device, dtype)


def _dead_after(graph: Graph) -> dict[str, tuple[str, ...]]:
    """For each node, the values that nothing reads once it has run: their memory can go."""
    last_reader = {name: node.name for node in graph.nodes for name in (node.name, *node.inputs)}
    return {
        node.name: tuple(name for name, reader in last_reader.items() if reader == node.name) for node in graph.nodes
    }
