"""A model to train: the graph that is served, over master parameters that it sees rounded."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from headrace.executors.torch_sequences import run_sequences
from headrace.graph.ir import Graph, Node
from headrace.numerics.fake_quantize import fake_quantize
from headrace.numerics.schemes import Scheme
from headrace.numerics.tensor import RawTensor


class GraphModel(torch.nn.Module):
    """A graph as a torch module. Every parameter of the graph is one parameter here, shared or not.

    Args:
        graph: not fused.
        weights: the parameters' values; masters are f32.
        schemes: the parameters that the forward pass sees rounded, by the rule that packs them to be served.
        device: as torch names it.
        checkpointed: compute layers again for gradients rather than keep what is between (`run_sequences`).
    """

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, RawTensor],
        schemes: Mapping[str, Scheme],
        *,
        device: str = "cpu",
        checkpointed: bool = False,
    ) -> None:
        super().__init__()
        unknown = schemes.keys() - graph.params.keys()
        assert not unknown, f"schemes of {sorted(unknown)}, which the graph does not have"
        self.graph, self.schemes, self._checkpointed = graph, dict(schemes), checkpointed
        self._quantized = True
        self.masters = torch.nn.ParameterDict(
            {
                _key(name): torch.nn.Parameter(torch.from_numpy(np.array(weights[name].to_f32())).to(device))
                for name in graph.params
            }
        )

    def forward(self, token_ids: Tensor) -> Tensor:
        """Logits ``[n * l, vocab]`` of n sequences of l tokens, int64 ``[n, l]``; row i is what follows token i."""
        return run_sequences(self.graph, token_ids, self._params_of, checkpointed=self._checkpointed)

    @property
    def device(self) -> torch.device:
        """Where the masters are."""
        return next(self.parameters()).device

    @contextmanager
    def unquantized(self) -> Iterator[None]:
        """Within, the forward pass sees the masters as they are."""
        before, self._quantized = self._quantized, False
        try:
            yield
        finally:
            self._quantized = before

    def weights(self) -> dict[str, RawTensor]:
        """The masters' values, f32, copied."""
        return {name: RawTensor.from_f32(self.master(name).detach().cpu().numpy().copy()) for name in self.graph.params}

    def master(self, name: str) -> Tensor:
        """A parameter of the graph, unrounded."""
        return self.masters[_key(name)]

    def _params_of(self, node: Node, _: object) -> list[Tensor]:
        return [self._seen(name) for name in node.params]

    def _seen(self, name: str) -> Tensor:
        value = self.master(name)
        scheme = self.schemes.get(name) if self._quantized else None
        return value if scheme is None else fake_quantize(value, scheme)


def _key(name: str) -> str:
    return name.replace(".", "/")  # modules know no dots
