"""Training without a gap: log-probabilities with the bits of the engine that serves, gradients through torch.

In reinforcement learning the tokens come from an engine and the loss from a trainer. Where both compute the same
log-probability differently, the importance ratio is off before anything was learned. Here the trainer's forward values
are the engine's: its executor, its number formats, its sampler's logarithm; only the way back is torch's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.align.forced import forced_logprobs
from headrace.align.native_scoring import scoring_executor
from headrace.base.errors import InvalidRequestError
from headrace.engine.step import Float32
from headrace.llm.config import LLMConfig
from headrace.llm.loader import LoadedModel
from headrace.llm.refit import as_served
from headrace.train.model import GraphModel


class ServedLogprobs:
    """Log-probabilities of tokens as an engine with certain settings gives them, differentiable in a model's masters.

    Args:
        model: what is trained; of the served model's architecture.
        served: the model that the engine loaded, whose number formats count.
        config: the engine's settings: activation, KV format and instruction set decide bits; threads and batches do
            not.
        max_len: tokens that a sequence may have.

    Raises InvalidRequestError for an engine that does not run on the native executor.
    """

    def __init__(self, model: GraphModel, served: LoadedModel, config: LLMConfig, *, max_len: int) -> None:
        if config.executor != "native":
            raise InvalidRequestError(
                f"The {config.executor} executor's bits depend on its batches.", 'Serve with executor="native".'
            )
        self._model, self._served = model, served
        self._executor = scoring_executor(
            served.graph,
            served.weights,
            max_len,
            kv_format=config.kv_format,
            activation=config.activation,
            num_threads=config.num_threads,
            isa=config.isa,
            fuse=config.fuse,
        )

    def refresh(self) -> None:
        """Take the model's masters as they are now, as `update_weights` of an engine does: call after each step of the
        optimizer."""
        made = {name: as_served(name, each, self._served.weights[name]) for name, each in self._model.weights().items()}
        self._executor.swap_weights(self._executor.stage_weights(made))

    def values(self, token_ids: Sequence[int]) -> Float32:
        """The log-probability of each token after the first, float32 ``[n - 1]``, bit for bit the engine's."""
        return forced_logprobs(self._executor, token_ids)

    def __call__(self, token_ids: Sequence[int]) -> Tensor:
        """`values` with a gradient: that of the same figures computed by torch over the rounded masters."""
        device = self._model.device
        values = torch.from_numpy(self.values(token_ids)).to(device)
        ids = torch.tensor([list(token_ids)], device=device)
        logits = self._model(ids)[:-1].float()
        surrogate = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        found: Tensor = _ValuesOf.apply(surrogate, values)  # type: ignore[no-untyped-call]
        return found

    def close(self) -> None:
        """Free the executor."""
        self._executor.close()


class _ValuesOf(torch.autograd.Function):
    """The second argument's values with the first one's gradient."""

    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, values: Tensor) -> Tensor:  # noqa: ARG004
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None
