"""A step's loss and its gradients, computed in one go."""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from headrace.train.model import GraphModel

LOSSES = ("distill", "next_token")


class Gradients:
    """Gives a batch's loss, and a model's parameters their gradients.

    On a GPU the first call records its kernels as a CUDA graph, and every call replays them: to start them one by one
    takes longer than they run. So all batches have one shape.

    Args:
        model: whose parameters get gradients.
        teacher: the loss is the mean KL of its next-token distributions to the model's, its weights not rounded; or
            None: it is the cross-entropy of the next token.
        compute: ``bf16``: matrix products in bf16 (torch.autocast); or ``f32``.
    """

    def __init__(self, model: GraphModel, teacher: GraphModel | None, *, compute: str) -> None:
        self._model, self._teacher, self._compute = model, teacher, compute
        self._recorded: tuple[torch.cuda.CUDAGraph, Tensor, Tensor] | None = None  # with its input and its output
        self._written: dict[torch.nn.Parameter, Tensor] = {}  # where replayed kernels leave gradients

    def __call__(self, token_ids: np.ndarray) -> Tensor:
        """The loss, a mean over the positions of ``[n, l]`` that have a next token. The next call may overwrite it."""
        ids = torch.from_numpy(token_ids).to(self._model.device)
        if ids.device.type != "cuda":
            return self._run(ids)
        if self._recorded is None:
            self._recorded = self._record(ids)
        graph, given, loss = self._recorded
        assert ids.shape == given.shape, f"{list(ids.shape)} after {list(given.shape)}: a recorded step has one shape"
        given.copy_(ids)
        graph.replay()
        for parameter, gradient in self._written.items():
            parameter.grad = gradient
        return loss

    def _run(self, ids: Tensor) -> Tensor:
        self._model.zero_grad(set_to_none=True)  # where there is none, a gradient is written, not added
        loss = self._loss(ids)
        loss.backward()
        return loss.detach()

    def _record(self, ids: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        with torch.cuda.device(ids.device):
            given, side, current = ids.clone(), torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):  # what libraries do when they are first used cannot be recorded
                self._run(given)
            current.wait_stream(side)
            self._model.zero_grad(set_to_none=True)  # its memory is free before the recorded one is taken
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                loss = self._run(given)
        self._written = {each: each.grad for each in self._model.parameters() if each.grad is not None}
        return graph, given, loss

    def _loss(self, ids: Tensor) -> Tensor:
        count, length = ids.shape
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self._compute == "bf16"):
            student = self._model(ids).reshape(count, length, -1)[:, :-1]
            if self._teacher is None:
                return F.cross_entropy(student.float().flatten(0, 1), ids[:, 1:].flatten())
            with torch.no_grad(), self._teacher.unquantized():
                target = self._teacher(ids).reshape(count, length, -1)[:, :-1].float().log_softmax(-1)
        found = student.float().log_softmax(-1)
        return F.kl_div(found.flatten(0, 1), target.flatten(0, 1), reduction="batchmean", log_target=True)
