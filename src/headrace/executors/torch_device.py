"""The devices that torch computes on: finding one by name, and computing alike each time there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from headrace.base.errors import InvalidRequestError


def torch_device(name: str) -> torch.device:
    """A device by the name torch has for it, such as ``cpu`` or ``cuda:1``.

    Raises InvalidRequestError if there is none of that name, or this torch cannot use it.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        cause = str(error).strip().partition("\n")[0].rstrip(".")
        raise InvalidRequestError(
            f"torch {torch.__version__} cannot compute on {name!r}: {cause}.",
            "Use cpu; a GPU also needs a torch that was built for it.",
        ) from error
    return device


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Within, the same calls give the same bits on a GPU too, as they do on a CPU anyway: no sums in the order in which
    threads happen to end. Begin it before the process has multiplied its first matrices there."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's own condition, read when it starts
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it did not write
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled
