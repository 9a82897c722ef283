"""What fits in memory, computed before anything is loaded."""

from dataclasses import dataclass

from headrace.base.errors import CapacityError, InvalidRequestError

HEADROOM = 0.9
"""Share of the free memory that may be planned for; the rest is Python, buffers, and other processes' growth."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The KV cache that was decided on.

    Attributes:
        num_blocks: KV blocks in the pool.
        block_bytes: bytes of one block, over all layers.
        max_model_len: context window that this allows.
        available: bytes that were free when this was decided.
        weight_bytes: what the weights take.
    """

    num_blocks: int
    block_bytes: int
    max_model_len: int
    available: int
    weight_bytes: int

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


def plan_memory(
    *,
    block_bytes: int,
    block_size: int,
    weight_bytes: int,
    context_length: int,
    max_model_len: int | None,
    max_num_seqs: int,
    kv_cache_memory: int | None,
    available: int,
) -> MemoryPlan:
    """Choose the number of KV blocks and the context window. All sizes in bytes, lengths in tokens.

    Raises InvalidRequestError for a context window beyond the model's own, and CapacityError, saying what would fit, if
    the weights, the asked KV memory or one asked context do not.
    """
    if max_model_len is not None and max_model_len > context_length:
        raise InvalidRequestError(
            f"max_model_len {max_model_len} exceeds the {context_length} positions that the model was made for.",
            f"Use {context_length} or less, or leave it out.",
        )
    free = int(available * HEADROOM) - weight_bytes
    if free < block_bytes:
        raise CapacityError(
            f"The weights need {_size(weight_bytes)}, and {_size(available)} of memory is free.",
            "Free memory, or use a smaller or more strongly quantized model.",
        )
    if kv_cache_memory is not None and kv_cache_memory > free:
        raise CapacityError(
            f"A KV cache of {_size(kv_cache_memory)} was asked for; {_size(free)} would fit beside the weights"
            f" ({_size(weight_bytes)} of the {_size(available)} that is free).",
            f"Ask for at most {_size(free)} ({free // block_bytes * block_size} tokens).",
        )
    wanted_len = max_model_len or context_length
    blocks_per_seq = -(-wanted_len // block_size)
    budget = kv_cache_memory if kv_cache_memory is not None else free // 2
    num_blocks = min(budget // block_bytes, blocks_per_seq * max_num_seqs)
    fitting_len = num_blocks * block_size
    if num_blocks < 1 or (max_model_len is not None and fitting_len < max_model_len):
        shorter = f"max_model_len {fitting_len} or less, " if fitting_len > 1 else ""
        raise CapacityError(
            f"One context of {wanted_len} tokens needs {_size(blocks_per_seq * block_bytes)} of KV cache, and"
            f" {_size(budget)} is planned for it ({_size(available)} of memory is free).",
            f"Use {shorter}kv_format int8 or int4, or a larger kv_cache_memory (at most {_size(free)}).",
        )
    return MemoryPlan(num_blocks, block_bytes, min(wanted_len, fitting_len), available, weight_bytes)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
