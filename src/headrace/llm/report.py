"""A start in a few lines, for logs and terminals."""

from collections import Counter

from headrace.engine.executor import Executor
from headrace.executors.native import NativeExecutor
from headrace.llm.config import LLMConfig
from headrace.llm.loader import LoadedModel


def describe_start(model: LoadedModel, config: LLMConfig, load_seconds: float) -> str:
    """What was loaded, the time of each part, the KV blocks, the kernels."""
    spec, memory = model.spec, model.memory
    num_params = sum(_count(param.shape) for param in model.graph.params.values())
    stored = sum(model.weights[param].num_bytes for param in model.graph.params)
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in model.seconds.items())
    return "\n".join(
        [
            f"model    {model.name}: {spec.family}, {spec.num_layers} layers, {num_params / 1e6:.0f} M parameters,"
            f" {stored / 2**20:.0f} MiB stored, context {memory.max_model_len}",
            f"start    {load_seconds:.2f} s ({parts})",
            f"KV       {memory.num_blocks} blocks of {config.block_size} tokens, {config.kv_format}:"
            f" {memory.kv_bytes / 2**20:.0f} MiB of {memory.available / 2**30:.1f} GiB free;"
            f" prefix caching {'on' if config.enable_prefix_caching else 'off'}",
            f"kernels  {_kernels(model.executor)}",
        ]
    )


def _kernels(executor: Executor) -> str:
    """Instruction set, threads, and how many matrices each kernel serves."""
    if not isinstance(executor, NativeExecutor):
        return f"{type(executor).__name__}: the reference, not the fast path"
    chosen = executor.describe()
    counts: Counter[str] = Counter()
    for kernel in chosen["kernels"]:
        counts[kernel["kernel"]] += kernel["count"]
    served = ", ".join(f"{name} ({count} matrices)" for name, count in counts.items())
    threads = f"{chosen['num_threads']} thread{'s' if chosen['num_threads'] > 1 else ''}"
    machine = f"{chosen['isa']}, {chosen['activation']} activations, {threads}"
    return f"{machine}: {served}; {chosen['packed_bytes'] / 2**20:.0f} MiB packed"


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
