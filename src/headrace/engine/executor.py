"""What the engine needs of whatever runs its steps."""

from collections.abc import Mapping
from typing import Any, Protocol

from headrace.engine.step import Step, StepResult


class Executor(Protocol):
    """Runs steps over a KV pool of `num_blocks` blocks of `block_size` tokens, whose bytes it alone owns.

    Implementations are the native, torch and simulated executors; the engine cannot tell them apart.
    """

    @property
    def block_size(self) -> int:
        """Tokens per KV block."""
        ...

    @property
    def num_blocks(self) -> int:
        """KV blocks in the pool; the engine numbers them 0 … num_blocks - 1."""
        ...

    @property
    def vocab_size(self) -> int:
        """Columns of the logits; every token id is below it."""
        ...

    def execute(self, step: Step) -> StepResult:
        """Run one step. Writes KV only into the step's own blocks. Raises on failure, leaving the pool usable."""
        ...

    def stage_weights(self, weights: Mapping[str, Any]) -> object:
        """Make other values of all parameters ready to run, beside whatever runs; on any thread.

        Args:
            weights: one stored tensor per parameter, in the number format that the parameter has now.

        Raises, and nothing changes, for tensors that cannot take the place of the present ones.
        """
        ...

    def swap_weights(self, staged: object) -> None:
        """Between two steps, exchange the weights for what `stage_weights` made, which then holds the old ones: a
        second swap brings them back. Takes microseconds; cannot fail half-way."""
        ...

    def close(self) -> None:
        """Free threads and memory. Idempotent; no step may follow."""
        ...
